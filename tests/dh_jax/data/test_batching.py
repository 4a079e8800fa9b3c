"""Batches against a literal, token-by-token reading of what a row means."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dh_jax.config import PackingConfig
from dh_jax.data.batching import MixedRow, assemble, trained_tokens
from dh_jax.data.packing import Row, Shards, TokenShard, Window, pack

ROW = 24
SEGMENTS = 16


def window_of(lengths: list[int], shards: int, masked: bool, seed: int = 0) -> Window:
    """Documents of random tokens dealt over several shards, with or without a loss mask."""
    rng = np.random.default_rng(seed)
    parts, starts, which = [], [], []
    for shard in range(shards):
        mine = [d for d in range(len(lengths)) if d % shards == shard]
        size = sum(lengths[d] for d in mine)
        mask = rng.random(size) < 0.6 if masked else None
        parts.append(TokenShard(rng.integers(1, 60000, size).astype(np.uint16), mask))
    at = [0] * shards
    for d, length in enumerate(lengths):
        which.append(d % shards)
        starts.append(at[d % shards])
        at[d % shards] += length
    return Window(
        Shards(parts),
        np.array(which, np.int32),
        np.array(starts, np.int64),
        np.array(lengths, np.int64),
        rng.integers(0, 2**64, len(lengths), dtype=np.uint64),
        0,
    )


def rows_of(window: Window, strategy: str) -> list[Row]:
    packing = PackingConfig(strategy=strategy, max_segments=SEGMENTS, window=15)  # leaves nothing
    packed = pack(window, ROW, packing, shuffle=False)
    return [Row(packed, r, tokens) for r, tokens in enumerate(packed.tokens_R)]


@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=20),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["best_fit", "first_fit", "concat"]),
)
def test_a_batch_says_of_every_token_what_its_document_says(
    lengths: list[int], shards: int, masked: bool, strategy: str
) -> None:
    window = window_of(lengths, shards, masked)
    rows = rows_of(window, strategy)
    batch, origins = assemble([MixedRow(3, r) for r in rows], len(rows) + 1, ROW, SEGMENTS)
    seen = {d: np.zeros(n, int) for d, n in enumerate(lengths)}
    by_id = {int(i): d for d, i in enumerate(window.ids_D)}
    for b in range(len(rows)):
        for t in range(ROW):
            s = batch.segment_ids_BT[b, t] - 1
            if s < 0:
                fields = (batch.tokens_BT, batch.targets_BT, batch.positions_BT)
                assert not batch.loss_mask_BT[b, t] and not any(f[b, t] for f in fields)
                continue
            d = by_id[int(origins.document_ids_BS[b, s])]
            position = int(batch.positions_BT[b, t])
            at = int(origins.offsets_BS[b, s]) + position
            seen[d][at] += 1
            tokens, mask = window.shards[window.shards_D[d]]
            start = int(window.starts_D[d])
            assert batch.tokens_BT[b, t] == tokens[start + at]
            if at + 1 < lengths[d]:  # the next token of the same document, across a cut too
                assert batch.targets_BT[b, t] == tokens[start + at + 1]
                learnt = True if mask is None else mask[start + at + 1]
                assert batch.loss_mask_BT[b, t] == learnt
            else:  # nothing follows a document's last token
                assert batch.targets_BT[b, t] == 0 and not batch.loss_mask_BT[b, t]
            if t and batch.segment_ids_BT[b, t - 1] == s + 1:
                assert position == batch.positions_BT[b, t - 1] + 1
            else:
                assert position == 0  # positions restart in every segment
    assert all((count == 1).all() for count in seen.values())
    assert batch.source_ids_B.tolist() == [3] * len(rows) + [-1]
    assert not batch.segment_ids_BT[-1].any()
    assert [trained_tokens(r) for r in rows] == batch.loss_mask_BT[:-1].sum(1).tolist()
    other, same = assemble([MixedRow(3, r) for r in rows], len(rows) + 1, ROW, SEGMENTS, -100)
    assert other.targets_BT.dtype == np.int64
    expected = np.where(batch.loss_mask_BT, batch.targets_BT, -100)
    np.testing.assert_array_equal(other.targets_BT, expected)
    for a, b in zip(
        (*batch[:1], *batch[2:6], *origins), (*other[:1], *other[2:6], *same), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_types_and_shapes_are_those_of_the_legend() -> None:
    batch, origins = assemble(
        [MixedRow(0, rows_of(window_of([5], 1, False), "concat")[0])], 2, ROW, 4
    )
    for array in (batch.tokens_BT, batch.targets_BT, batch.segment_ids_BT, batch.positions_BT):
        assert array.dtype == np.int32 and array.shape == (2, ROW)
    assert batch.loss_mask_BT.dtype == np.bool_ and batch.source_ids_B.dtype == np.int32
    assert batch.teacher is None
    assert origins.document_ids_BS.dtype == np.uint64 and origins.document_ids_BS.shape == (2, 4)
