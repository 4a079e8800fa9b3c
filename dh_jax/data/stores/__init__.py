"""Tokens on disk: guarded shards of our own, and other trainers' files read in place."""
