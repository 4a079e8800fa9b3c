"""Batching: rows -> one `Batch` and its `Origins`, tokens gathered straight from the shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

from dh_jax.batch import Batch, Origins
from dh_jax.data.packing import (
    DOCUMENT,
    GOES_ON,
    LENGTH,
    OFFSET,
    SHARD,
    START,
    PackedWindow,
    Row,
)


class MixedRow(NamedTuple):
    """A row together with the index of the source it came from."""

    source: int
    row: Row


def assemble(
    rows: Sequence[MixedRow],
    batch_size: int,
    row_length: int,
    max_segments: int,
    unlearnt: int | None = None,
) -> tuple[Batch, Origins]:
    """Materialise rows as arrays of B rows, T tokens and at most S segments.

    Targets are the next token of the *same document*: a document's last token has none, while
    the last token of a piece whose document goes on elsewhere has the token that follows it.

    Args:
        rows: at most B rows with their sources; missing ones become padding of source -1,
            so that the last batch of an evaluation has the shape of all others.
        batch_size: B.
        row_length: T.
        max_segments: S, the static bound on segments of a row.
        unlearnt: targets are int64 and this number where nothing is learnt, as torch's losses
            take them; None: int32, there the next token or 0.

    Returns:
        A NumPy `Batch` (no teacher) and the `Origins` of its segments.
    """
    grid = np.empty((3, batch_size, row_length), np.int32)
    targets = np.empty((batch_size, row_length), np.int32 if unlearnt is None else np.int64)
    padding = 0 if unlearnt is None else unlearnt
    mask = np.empty((batch_size, row_length), np.bool_)
    ids = np.zeros((batch_size, max_segments), np.uint64)
    offsets = np.zeros((batch_size, max_segments), np.int64)
    lengths = np.zeros((batch_size, max_segments), np.int32)
    sources = np.full(batch_size, -1, np.int32)
    by_window: dict[int, tuple[PackedWindow, list[tuple[int, int]]]] = {}
    for b, (source, row) in enumerate(rows):
        sources[b] = source
        packed = row.packed
        by_window.setdefault(id(packed), (packed, []))[1].append((b, row.place))
    for packed, places in by_window.values():
        window = packed.window
        _fill(
            grid, targets, mask, ids, offsets, lengths, np.array(places), packed.pieces_P6,
            packed.splits_R1, window.ids_D, window.shards.addresses_S2, window.shards.width,
            padding, unlearnt is not None,
        )  # fmt: skip
    grid[:, len(rows) :] = 0
    targets[len(rows) :] = padding
    mask[len(rows) :] = False
    return (
        Batch(grid[0], targets, mask, grid[1], grid[2], sources),
        Origins(ids, offsets, lengths),
    )


def trained_tokens(row: Row) -> int:
    """Targets of a row that are learnt."""
    window = row.packed.window
    return int(_trained(row.pieces_P6, window.shards.addresses_S2))


# --- compiled --------------------------------------------------------------------------------


def _cast(typing_context: Any, address: Any) -> Any:
    """An integer as a pointer, for compiled code."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


_pointer: Any = intrinsic(_cast)


@numba.njit(cache=True, nogil=True)
def _fill(  # type: ignore[no-untyped-def]
    grid_3BT, targets_BT, mask_BT, ids_BS, offsets_BS, lengths_BS, places_N2, pieces_P6,
    splits_R1, ids_D, addresses_S2, width, padding, only_learnt,
):  # fmt: skip
    """Write some rows of one window; ``width`` is the bytes of a token. ``padding`` is the target
    where there is none, and with ``only_learnt`` where it is not learnt."""
    row_length = mask_BT.shape[1]
    for n in range(places_N2.shape[0]):
        b, r = places_N2[n]
        column = 0
        first = splits_R1[r]
        for p in range(first, splits_R1[r + 1]):
            start, length = pieces_P6[p, START], pieces_P6[p, LENGTH]
            targets = length if pieces_P6[p, GOES_ON] else length - 1
            base = addresses_S2[pieces_P6[p, SHARD], 0] + start * width
            tokens_n = grid_3BT[0, b, column : column + length]
            targets_n = targets_BT[b, column : column + length]
            if width == 2:
                u16_n = numba.carray(_pointer(base), length + 1, np.uint16)
                _copy(u16_n, tokens_n, targets_n, targets)
            elif width == 4:
                u32_n = numba.carray(_pointer(base), length + 1, np.uint32)
                _copy(u32_n, tokens_n, targets_n, targets)
            elif width == 1:
                u8_n = numba.carray(_pointer(base), length + 1, np.uint8)
                _copy(u8_n, tokens_n, targets_n, targets)
            else:
                u64_n = numba.carray(_pointer(base), length + 1, np.uint64)
                _copy(u64_n, tokens_n, targets_n, targets)
            segment = p - first
            # Slices, since indices known not to be negative let the loop be vectorised.
            segments_n = grid_3BT[1, b, column : column + length]
            positions_n = grid_3BT[2, b, column : column + length]
            for i in range(length):
                segments_n[i] = segment + 1
                positions_n[i] = i
            learnt = addresses_S2[pieces_P6[p, SHARD], 1]
            if learnt:
                mask_n = numba.carray(_pointer(learnt + start), length + 1, np.bool_)
                mask_BT[b, column : column + targets] = mask_n[1 : targets + 1]
                if only_learnt:
                    for i in range(targets):
                        if not mask_n[i + 1]:
                            targets_n[i] = padding
            else:
                mask_BT[b, column : column + targets] = True
            if targets < length:
                targets_n[targets] = padding
                mask_BT[b, column + targets] = False
            ids_BS[b, segment] = ids_D[pieces_P6[p, DOCUMENT]]
            offsets_BS[b, segment] = pieces_P6[p, OFFSET]
            lengths_BS[b, segment] = length
            column += length
        for i in range(column, row_length):
            for plane in range(3):
                grid_3BT[plane, b, i] = 0
            targets_BT[b, i] = padding
            mask_BT[b, i] = False


@numba.njit(cache=True, nogil=True, inline="always")
def _copy(source_n, tokens_n, targets_n, targets):  # type: ignore[no-untyped-def]
    for i in range(targets):
        tokens_n[i] = source_n[i]
        targets_n[i] = source_n[i + 1]
    if targets < len(tokens_n):  # a document's last token, which has no target
        tokens_n[targets] = source_n[targets]


@numba.njit(cache=True, nogil=True)
def _trained(pieces_P6, addresses_S2):  # type: ignore[no-untyped-def]
    total = 0
    for p in range(pieces_P6.shape[0]):
        length = pieces_P6[p, LENGTH]
        targets = length if pieces_P6[p, GOES_ON] else length - 1
        learnt = addresses_S2[pieces_P6[p, SHARD], 1]
        if learnt:
            mask_n = numba.carray(_pointer(learnt + pieces_P6[p, START]), length + 1, np.bool_)
            for i in range(targets):
                total += mask_n[i + 1]
        else:
            total += targets
    return total
