"""An index of documents in token files, and ids for those that have none."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dh_jax.data.packing import TokenShard
from dh_jax.errors import DataError

# What a token may be stored as. Eight-byte tokens are read as they are; ids fit in four.
TOKEN_TYPES = ("uint8", "uint16", "int16", "uint32", "int32", "int64", "uint64")


class TokenIndex(NamedTuple):
    """Where the D documents of a token store lie."""

    shards: tuple[TokenShard, ...]
    shards_D: npt.NDArray[np.int32]
    starts_D: npt.NDArray[np.int64]  # in tokens, within the shard
    lengths_D: npt.NDArray[np.int64]  # in tokens
    fingerprint: int  # 64 bits, of the store's index


def fingerprint_of(*parts: bytes) -> int:
    """64 bits of BLAKE2b over the bytes that describe a store."""
    return int.from_bytes(hashlib.blake2b(b"".join(parts), digest_size=8).digest(), "little")


def map_bytes(path: Path) -> npt.NDArray[np.uint8]:
    """A file as a read-only memory map.

    Raises:
        DataError: it is missing, unreadable or empty.
    """
    try:
        return np.memmap(path, mode="r", dtype=np.uint8)
    except (OSError, ValueError) as error:  # ValueError: empty
        raise DataError(
            f"token file {path} cannot be mapped ({error}); restore it, or correct the path"
        ) from error


def position_ids(fingerprint: int, count: int) -> npt.NDArray[np.uint64]:
    """Ids from positions: the finaliser of SplitMix64 (Steele et al. 2014) over a counter."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = steps + np.uint64(fingerprint)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def content_ids(index: TokenIndex) -> npt.NDArray[np.uint64]:
    """Ids from content: 8 bytes of BLAKE2b over the tokens as little-endian uint32."""
    ids = np.empty(index.lengths_D.size, np.uint64)
    places = zip(index.shards_D, index.starts_D, index.lengths_D, strict=True)
    for d, (shard, start, length) in enumerate(places):
        tokens = index.shards[shard].tokens[start : start + length].astype("<u4")
        ids[d] = int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")
    return ids
