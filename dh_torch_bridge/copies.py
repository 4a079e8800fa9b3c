"""What the bridge copies, counted: a copy that nobody wanted shows up in a test."""

from __future__ import annotations

from collections import Counter

# Bytes by reason: "labels" (int64 for torch's losses), "pinned", "to_jax" (memory that JAX cannot
# read in place), "to_torch" (an array that others still use).
COPIED: Counter[str] = Counter()
