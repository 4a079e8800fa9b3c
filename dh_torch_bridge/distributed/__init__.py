"""Torch ranks: their mesh, and a model spread over it."""
