"""Seeds that depend on names, never on the machine, the process or ``PYTHONHASHSEED``."""

from __future__ import annotations

import hashlib
import json


def derive(seed: int, *names: str | int) -> int:
    """A 32-bit seed for one purpose, a pure function of its arguments."""
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
