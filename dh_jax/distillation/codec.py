"""A teacher's entries of one token as a record of fixed size.

``plain`` is, for K entries, the most probable first: K ids (uint16, or uint32 for a vocabulary
above 65,536), K codes of 8 bits, the depth, the tail.

``dense`` holds the same entries in rising order of their ids, whose ids then fit the code of Elias
(1974) and Fano (1971): the low bits of each as they are, the high ones as a map in which the n-th
set bit stands at its high part plus n. For 64 of 49,152 ids that is 92 bytes instead of 128.

**Codes.** With ``d = log p_1 - log p_k`` and ``R`` the largest, rounded up to eighths of a nat and
at most 255 of them, the code is ``255 (d / R)^0.75`` rounded, so entries of large probability are
the finer ones. The tail is the log of the unseen mass as float16. The entries' sum is one less
the tail, which gives ``log p_1``; it is never stored. On SmolLM2-135M's own logits (371 tokens,
K = 64) this adds 1.1e-5 nats to the KL; an exponent of 1 or .5 adds as much or 1.4 times that.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from dh_jax.batch import TopKLogits
from dh_jax.config import suggest
from dh_jax.errors import ConfigError

CODECS = ("plain", "dense")
EXPONENT = 0.75
STEPS_A_NAT = 8  # of depth
LEAST_TAIL = -24.0  # log of a mass that float32 probabilities cannot tell from 0

Bytes = npt.NDArray[np.uint8]


class Layout(NamedTuple):
    """Where in a record of ``width`` bytes its parts begin; sizes in bytes but for ``low``."""

    dense: bool
    sampled: bool  # draws: the two last bytes are the first entry's log-probability, not the tail
    entries: int  # K
    wide: bool  # ids of 32 bits (plain)
    low: int  # bits of an id kept as they are (dense)
    codes: int
    depth: int
    tail: int
    width: int


def layout(codec: str, entries: int, vocabulary: int, sampled: bool = False) -> Layout:
    """The record of K entries out of a vocabulary.

    Raises:
        ConfigError: the codec is unknown or cannot hold draws, or K is not from 1 to the
            vocabulary's size.
    """
    if codec not in CODECS:
        raise ConfigError(
            f"codec {codec!r}{suggest(codec, list(CODECS))}; known: {', '.join(CODECS)}"
        )
    if sampled and codec == "dense":
        raise ConfigError("draws repeat ids, which codec dense cannot hold; take codec plain")
    if not 1 <= entries <= vocabulary:
        raise ConfigError(f"{entries} entries of a vocabulary of {vocabulary}; give 1 to all")
    wide = vocabulary > 65_536
    low = int(math.log2(vocabulary / entries))
    if codec == "plain":
        codes = entries * (4 if wide else 2)
    else:
        codes = -(-entries * low // 8) + -(-(entries + ((vocabulary - 1) >> low)) // 8)
    depth = codes + entries
    return Layout(codec == "dense", sampled, entries, wide, low, codes, depth, depth + 1, depth + 3)


def encode(entries: TopKLogits, of: Layout) -> Bytes:
    """Records of N tokens.

    Args:
        entries: NumPy, ``[N, K]`` ids and log-probabilities, the most probable first (draws in
            any order), and ``[N]`` log-tails.
        of: the layout.

    Returns:
        ``[N, width]``.
    """
    ids: Any = np.ascontiguousarray(entries.ids_BTK, np.uint32)
    logp: Any = np.asarray(entries.log_probs_BTK, np.float64)
    last, least = entries.log_tail_BT, -1e-3
    if of.sampled:
        order = np.argsort(-logp, axis=-1)
        ids, logp = (np.take_along_axis(x, order, -1) for x in (ids, logp))
        last, least = logp[:, 0], 0.0
    count = len(ids)
    down = np.maximum(logp[:, :1] - logp, 0.0)
    depth = np.ceil(down[:, -1] * STEPS_A_NAT).clip(1, 255)
    share = (down / (depth / STEPS_A_NAT)[:, None]).clip(max=1)
    codes = np.round(255 * share**EXPONENT).astype(np.uint8)
    records = np.zeros((count, of.width), np.uint8)
    if of.dense:
        order = np.argsort(ids, axis=-1)
        ids = np.take_along_axis(ids, order, -1)
        codes = np.take_along_axis(codes, order, -1)
        _pack_ids(records, ids, of.low, -(-of.entries * of.low // 8))
    else:
        dtype = "<u4" if of.wide else "<u2"
        records[:, : of.codes] = np.ascontiguousarray(ids, dtype).view(np.uint8)
    records[:, of.codes : of.depth] = codes
    records[:, of.depth] = depth
    last = np.asarray(last, np.float32).clip(LEAST_TAIL, least)
    records[:, of.tail :] = last.astype("<f2").view(np.uint8).reshape(count, 2)
    return records


def decode(records: Bytes, of: Layout) -> TopKLogits:
    """What `encode` wrote, the most probable first: ``[N, K]``, ``[N, K]`` and ``[N]``."""
    count = len(records)
    ids = np.empty((count, of.entries), np.int32)
    logp = np.empty((count, of.entries), np.float32)
    tail = np.empty(count, np.float32)
    decode_into(records, of, ids, logp, tail)
    return TopKLogits(ids, logp, tail)


def decode_into(records: Bytes, of: Layout, ids: Any, logp: Any, tail: Any) -> None:
    """`decode` into arrays that are there."""
    bits = of.dense, of.sampled, of.wide, of.low
    _decode(records, *bits, of.codes, of.depth, ids, logp, tail, *_TABLES)


def _tables() -> tuple[Any, Any]:
    """Depth below the first entry by (R, code), and its exponential."""
    share = (np.arange(256) / 255.0) ** (1 / EXPONENT)
    down = (np.arange(256) / STEPS_A_NAT)[:, None] * share
    return down.astype(np.float32), np.exp(-down).astype(np.float32)


_TABLES = _tables()


# --- compiled --------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _pack_ids(records_NW, ids_NK, low, high_begin):  # type: ignore[no-untyped-def]
    for n in range(ids_NK.shape[0]):
        for k in range(ids_NK.shape[1]):
            value = ids_NK[n, k]
            for b in range(low):
                if (value >> b) & 1:
                    at = k * low + b
                    records_NW[n, at >> 3] |= np.uint8(1 << (at & 7))
            at = (value >> low) + k
            records_NW[n, high_begin + (at >> 3)] |= np.uint8(1 << (at & 7))


@numba.njit(cache=True, nogil=True)
def _decode(  # type: ignore[no-untyped-def]
    records_NW, dense, sampled, wide, low, codes_begin, depth_begin, ids_NK, logp_NK, tail_N,
    down_RC, exp_RC,
):  # fmt: skip
    K = ids_NK.shape[1]
    raw_K = np.empty(K, np.int32)
    counts = np.empty(257, np.int32)
    mask = (1 << low) - 1
    high_begin = (K * low + 7) >> 3
    for n in range(records_NW.shape[0]):
        record = records_NW[n]
        depth = record[depth_begin]
        bits = np.int64(record[depth_begin + 1]) | (np.int64(record[depth_begin + 2]) << 8)
        tail = _float16(bits)
        tail_N[n] = tail
        total = np.float32(0)
        for k in range(K):
            total += exp_RC[depth, record[codes_begin + k]]
        if sampled:
            first, tail_N[n] = tail, -np.inf
        else:
            first = np.log1p(-np.exp(tail)) - np.log(total)
        if not dense:
            for k in range(K):
                if wide:
                    at = 4 * k
                    word = np.int64(0)
                    for b in range(4):
                        word |= np.int64(record[at + b]) << (8 * b)
                    ids_NK[n, k] = word
                else:
                    ids_NK[n, k] = np.int64(record[2 * k]) | (np.int64(record[2 * k + 1]) << 8)
                logp_NK[n, k] = first - down_RC[depth, record[codes_begin + k]]
            continue
        k, at, byte = 0, 0, high_begin
        while k < K:  # set bits of the map, in rising order
            bits = np.int64(record[byte])
            while bits and k < K:
                bit = 0
                while not (bits >> bit) & 1:
                    bit += 1
                bits &= bits - 1
                begin = k * low
                word = np.int64(0)
                for b in range(4):
                    if (begin >> 3) + b < codes_begin:
                        word |= np.int64(record[(begin >> 3) + b]) << (8 * b)
                raw_K[k] = ((at + bit - k) << low) | ((word >> (begin & 7)) & mask)
                k += 1
            at += 8
            byte += 1
        counts[:] = 0  # a counting sort: rising codes, so falling probabilities
        for k in range(K):
            counts[record[codes_begin + k] + 1] += 1
        for c in range(256):
            counts[c + 1] += counts[c]
        for k in range(K):
            code = record[codes_begin + k]
            place = counts[code]
            counts[code] += 1
            ids_NK[n, place] = raw_K[k]
            logp_NK[n, place] = first - down_RC[depth, code]


@numba.njit(cache=True, nogil=True, inline="always")
def _float16(bits):  # type: ignore[no-untyped-def]
    """A float16 that is not positive, as float32."""
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    if exponent == 0:
        return np.float32(-fraction * 2.0**-24)
    return np.float32(-(1 + fraction / 1024) * 2.0 ** (exponent - 15))
