"""Distillation: losses that never hold the vocabulary table, and a teacher cached on disk."""
