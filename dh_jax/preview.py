"""What a data config yields, before anything is trained on it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dh_jax.config import SPLITS, DataConfig
from dh_jax.data.loader import get_loader
from dh_jax.data.prepare import pipeline_fingerprint
from dh_jax.data.store import open_store
from dh_jax.data.tokenization import TokenizerWrapper


class Segment(NamedTuple):
    """One document (or piece) of a packed row, decoded."""

    document_id: int
    offset: int  # first token within its document
    text: str
    trained: int  # targets that are learnt
    tokens: int


class PreviewRow(NamedTuple):
    source: str
    segments: list[Segment]
    padding: int  # tokens


class Preview(NamedTuple):
    """Counts, packing, and a few rows."""

    documents: dict[str, dict[str, dict[str, int]]]  # source -> split -> counts; {} when streamed
    skipped: dict[str, dict[str, int]]  # source -> reason -> documents
    stats: dict[str, Any]  # of the loader, over the batches looked at
    trained_share: float  # targets learnt / tokens placed
    documents_a_row: float
    rows: list[PreviewRow]


def preview(
    config: DataConfig,
    *,
    split: str = "train",
    batches: int = 8,
    batch_size: int = 16,
    rows: int = 4,
) -> Preview:
    """Draw a few batches of a data config and describe them.

    Args:
        config: a validated data config.
        split: train, probe or eval.
        batches: how many batches to draw for the statistics.
        batch_size: rows of each.
        rows: how many rows to decode.

    Raises:
        ConfigError, DataError, StateError: whatever keeps the config from being read.
    """
    tokenizer = TokenizerWrapper.load(
        config.tokenizer, add_bos=config.add_bos, add_eos=config.add_eos
    )
    documents: dict[str, dict[str, dict[str, int]]] = {}
    skipped: dict[str, dict[str, int]] = {}
    if config.store is not None:
        store = open_store(
            config.store, tokenizer=tokenizer.fingerprint, pipeline=pipeline_fingerprint(config)
        )
        skipped = store.manifest["skipped"]
        for name in store.manifest["sources"]:
            documents[name] = {
                each: {
                    what: store.total(name, each, what) for what in ("documents", "tokens", "bytes")
                }
                for each in SPLITS
            }
    shown: list[PreviewRow] = []
    trained = placed = pieces = drawn = 0
    with get_loader(
        config, tokenizer=tokenizer, batch_size=batch_size, split=split, prefetch=0
    ) as loader:
        for _, batch in zip(range(batches), loader, strict=False):
            origins = loader.origins
            trained += int(batch.loss_mask_BT.sum())
            placed += int(origins.lengths_BS.sum())
            pieces += int((origins.lengths_BS > 0).sum())
            drawn += int((batch.source_ids_B >= 0).sum())
            for b in range(batch_size):
                if len(shown) < rows and batch.source_ids_B[b] >= 0:
                    shown.append(_row(b, batch, origins, loader.names, tokenizer))
        stats = loader.stats()
    return Preview(
        documents, skipped, stats, trained / max(placed, 1), pieces / max(drawn, 1), shown
    )


def _row(b: int, batch: Any, origins: Any, names: Any, tokenizer: TokenizerWrapper) -> PreviewRow:
    segments = []
    for s in np.flatnonzero(origins.lengths_BS[b]):
        inside = batch.segment_ids_BT[b] == s + 1
        segments.append(
            Segment(
                int(origins.document_ids_BS[b, s]),
                int(origins.offsets_BS[b, s]),
                tokenizer.decode(batch.tokens_BT[b][inside]),
                int(batch.loss_mask_BT[b][inside].sum()),
                int(inside.sum()),
            )
        )
    return PreviewRow(
        names[batch.source_ids_B[b]], segments, int((batch.segment_ids_BT[b] == 0).sum())
    )
