"""Decoders in Flax NNX."""
