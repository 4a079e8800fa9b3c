"""Meshes and checkpoints."""
