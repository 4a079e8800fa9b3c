"""Megatron's token files, ``NAME.bin`` and ``NAME.idx``, as an index of documents.

``.bin`` holds tokens end to end. Two layouts of ``.idx`` are in use, both little-endian::

    MMIDIDX (9 bytes with two zeros)       TNTIDX (8 bytes with two zeros)
    version         u64 = 1                version          u64 = 1
    type of tokens  u8                     type, item size  u64 u64
    sequences S     u64                    items S, sizes   u64 u64
    boundaries D+1  u64                    boundaries D+1   u64
    lengths    [S]  i32                    dimensions [S+1] i64
    pointers   [S]  i64, in bytes          pointers   [S+1] i64, in tokens
    documents[D+1]  i64                    lengths    [S]   i64
    modes      [S]  i8, optional           documents  [D+1] i64

A document is the sequences between two boundaries (sentences, where they were split). The first
layout is that of Megatron-LM and its descendants today, the second fairseq's, which older
Megatrons wrote as well ("lazy" and "cached" data sets).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dh_jax.data.packing import TokenShard
from dh_jax.data.stores.token_index import TokenIndex, fingerprint_of, map_bytes
from dh_jax.errors import DataError

TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
MMAP, LEGACY = b"MMIDIDX\0\0", b"TNTIDX\0\0"


def read_megatron(path: str) -> TokenIndex:
    """Map a pair of files and read its index.

    Args:
        path: the pair's path, with either ending or none.

    Raises:
        DataError: a file is missing, damaged or of another format.
    """
    base = path.removesuffix(".bin").removesuffix(".idx")
    header, data = Path(f"{base}.idx"), Path(f"{base}.bin")
    raw = map_bytes(header)
    try:
        code, lengths, starts, documents = _parse(raw)
        if code not in TYPES:
            raise ValueError(f"tokens of type {code}, known are {', '.join(map(str, TYPES))}")
    except (ValueError, struct.error) as error:
        raise DataError(
            f"{header} is no whole Megatron index ({error}); restore it, or prepare it again"
        ) from error
    tokens = map_bytes(data)
    tokens = tokens[
        : tokens.size // np.dtype(TYPES[code]).itemsize * np.dtype(TYPES[code]).itemsize
    ]
    tokens_n = tokens.view(TYPES[code])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if lengths.size and (starts != ends[:-1]).any():
        raise DataError(f"{header}: sequences do not follow one another; prepare it again")
    if ends[-1] > tokens_n.size:
        raise DataError(
            f"{data} is cut short: {tokens_n.size} tokens of {ends[-1]}; restore it from its source"
        )
    if documents.size and (documents.min() < 0 or documents.max() >= ends.size):
        raise DataError(f"{header}: a document ends beyond the {lengths.size} sequences")
    bounds = ends[documents]
    lengths_D = np.diff(bounds)
    return TokenIndex(
        (TokenShard(tokens_n),),
        np.zeros(lengths_D.size, np.int32),
        bounds[:-1].astype(np.int64),
        lengths_D.astype(np.int64),
        # Both ends: an index of a billion documents is 20 GB.
        fingerprint_of(str(raw.size).encode(), raw[: 1 << 20].tobytes(), raw[-1 << 20 :].tobytes()),
    )


def _parse(raw: npt.NDArray[np.uint8]) -> tuple[int, Any, Any, Any]:
    """Type of tokens, lengths and starts of sequences (in tokens), boundaries of documents."""

    def take(at: int, dtype: str, count: int) -> tuple[npt.NDArray[Any], int]:
        end = at + np.dtype(dtype).itemsize * count
        if end > raw.size:
            raise ValueError(f"it ends at byte {raw.size} of {end}")
        return raw[at:end].view(dtype), end

    head = raw[:64].tobytes()
    if head.startswith(MMAP):
        version, code, sequences, boundaries = struct.unpack_from("<QBQQ", head, len(MMAP))
        lengths, at = take(len(MMAP) + 25, "<i4", sequences)
        pointers, at = take(at, "<i8", sequences)
        documents, at = take(at, "<i8", boundaries)
        item = np.dtype(TYPES.get(code, "<u1")).itemsize
        starts = pointers // item
    elif head.startswith(LEGACY):
        fields = struct.unpack_from("<6Q", head, len(LEGACY))
        version, code, _, sequences, sizes, boundaries = fields
        if sizes != sequences:
            raise ValueError(f"{sequences} items of {sizes} dimensions, not of one each")
        _, at = take(len(LEGACY) + 48, "<i8", sequences + 1)
        pointers, at = take(at, "<i8", sequences + 1)
        lengths, at = take(at, "<i8", sequences)
        documents, at = take(at, "<i8", boundaries)
        starts = pointers[:-1]
    else:
        raise ValueError(f"it begins with {head[:9]!r}")
    if version != 1:
        raise ValueError(f"version {version}, known is 1")
    return code, lengths.astype(np.int64), starts, documents
