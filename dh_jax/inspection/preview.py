"""What a data config yields, before anything is trained on it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dh_jax.batch import Batch, Origins
from dh_jax.config import SPLITS, DataConfig, SourceConfig
from dh_jax.data.loader import get_loader
from dh_jax.data.prepare import open_prepared
from dh_jax.data.sources import DocumentSource
from dh_jax.data.store import TokenStore
from dh_jax.data.text.encoding import make_encoder
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError
from dh_jax.inspection.rows import DecodedRow, decode_rows

ENCODE_TOGETHER = 512  # documents handed to the tokenizer at once


class Lengths(NamedTuple):
    """Lengths of documents in tokens. Bin k holds those from 2^k to 2^(k+1) - 1."""

    documents_K: npt.NDArray[np.int64]
    tokens_K: npt.NDArray[np.int64]
    median: float
    mean: float
    longest: int
    over_row: float  # share of documents that are longer than a row


class SourcePreview(NamedTuple):
    """One source: its documents as surveyed, and its part of the batches drawn."""

    weight: float
    share: float  # of the tokens drawn
    rows: int
    tokens: int
    learnt: float  # targets learnt / tokens; nan if no row was drawn
    documents: int  # surveyed: all of the split where a store knows them, else its beginning
    lengths: Lengths
    duplicates: int  # dropped when the store was prepared; else found among those surveyed
    left_out: dict[str, int]  # reason -> documents


class Preview(NamedTuple):
    """Counts, packing, and a few rows."""

    name: str
    split: str
    row_length: int
    batches: int  # drawn
    streamed: bool  # False: from a store
    prepared: dict[str, dict[str, dict[str, int]]]  # source -> split -> counts; {} when streamed
    sources: dict[str, SourcePreview]
    packing_efficiency: float  # tokens / places in the rows drawn
    documents_a_row: float  # pieces of documents
    learnt: float  # targets learnt / tokens
    rows: list[DecodedRow]

    @property
    def bins(self) -> tuple[int, int]:
        """The first and the last bin of lengths that any source has documents in."""
        sources = self.sources.values()
        filled = [k for s in sources for k in np.flatnonzero(s.lengths.documents_K).tolist()]
        return min(filled, default=0), max(filled, default=0)


def preview(
    config: DataConfig,
    *,
    split: str = "train",
    batches: int = 8,
    batch_size: int = 16,
    rows: int = 4,
    documents: int = 1000,
) -> Preview:
    """Survey a data config's documents and draw a few batches of it.

    Args:
        config: a validated data config.
        split: train, probe or eval.
        batches: how many batches to draw for the statistics.
        batch_size: rows of each.
        rows: how many rows to decode, spread over the sources.
        documents: of a streamed source, how many to read for lengths and duplicates; a store
            knows those of all.

    Raises:
        ConfigError, DataError, StateError: whatever keeps the config from being read.
    """
    for label, value, least in (
        ("batches", batches, 1), ("rows", rows, 0), ("documents", documents, 1),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"{label} is {value}; the least is {least}")
    tokenizer = TokenizerWrapper.load(
        config.tokenizer, add_bos=config.add_bos, add_eos=config.add_eos
    )
    store = None
    if config.store is not None:
        store = open_prepared(config, tokenizer)
    drawn = _draw(config, tokenizer, split, batches, batch_size, rows)
    sources = {}
    seen: set[int] = set()  # documents of the sources before
    for m, (name, figures) in enumerate(drawn.stats["sources"].items()):
        origin, spec = _origin(config, split, name)
        if store is not None:
            lengths = store.documents(origin, split).lengths_D
            left_out = Counter(store.manifest["skipped"].get(origin, {}))
        else:
            lengths, left_out = _survey(config, tokenizer, origin, spec, split, documents, seen)
            # The greater of the two, as survey and loader read the same records.
            left_out |= Counter(figures["skipped"])
        sources[name] = SourcePreview(
            weight=figures["weight"],
            share=figures["share"],
            rows=figures["rows"],
            tokens=figures["tokens"],
            learnt=_share(drawn.learnt_M[m], drawn.placed_M[m]),
            documents=lengths.size,
            lengths=_lengths(lengths, config.max_length),
            duplicates=left_out.pop("duplicate", 0),
            left_out=dict(left_out),
        )
    return Preview(
        config.name,
        split,
        config.max_length,
        drawn.stats["batches"],
        store is None,
        _prepared(store) if store is not None else {},
        sources,
        drawn.stats["packing_efficiency"],
        _share(drawn.pieces, drawn.rows),
        _share(drawn.learnt_M.sum(), drawn.placed_M.sum()),
        drawn.decoded,
    )


# --- batches ---------------------------------------------------------------------------------


class _Drawn(NamedTuple):
    stats: dict[str, Any]  # of the loader
    learnt_M: npt.NDArray[np.int64]  # targets
    placed_M: npt.NDArray[np.int64]  # tokens
    pieces: int
    rows: int
    decoded: list[DecodedRow]


def _draw(
    config: DataConfig,
    tokenizer: TokenizerWrapper,
    split: str,
    batches: int,
    batch_size: int,
    rows: int,
) -> _Drawn:
    with get_loader(
        config, tokenizer=tokenizer, batch_size=batch_size, split=split, prefetch=0
    ) as loader:
        learnt_M, placed_M = (np.zeros(len(loader.names), np.int64) for _ in range(2))
        pieces = drawn = 0
        seen: Counter[int] = Counter()  # rows of each source kept so far
        kept: list[tuple[int, int, Batch, Origins, int]] = []
        for number, batch in enumerate(itertools.islice(loader, batches)):
            origins = loader.origins
            for b in np.flatnonzero(batch.source_ids_B >= 0).tolist():
                m = int(batch.source_ids_B[b])
                learnt_M[m] += batch.loss_mask_BT[b].sum()
                placed_M[m] += origins.lengths_BS[b].sum()
                pieces += int((origins.lengths_BS[b] > 0).sum())
                drawn += 1
                if seen[m] < rows:
                    kept.append((seen[m], number, batch, origins, b))
                    seen[m] += 1
        # The first row of every source before the second of any.
        kept.sort(key=lambda row: row[:2])
        decoded = [
            row
            for _, _, batch, origins, b in kept[:rows]
            for row in decode_rows(batch, origins, loader.names, tokenizer, [b])
        ]
        return _Drawn(loader.stats(), learnt_M, placed_M, pieces, drawn, decoded)


# --- documents -------------------------------------------------------------------------------


def _origin(config: DataConfig, split: str, name: str) -> tuple[str, SourceConfig]:
    """The source that a name of the loader reads: a probe may be the probe split of one."""
    given = config.probes.get(name, name) if split == "probe" and config.probes else name
    if isinstance(given, str):
        return given, config.sources[given]
    return name, given


def _prepared(store: TokenStore) -> dict[str, dict[str, dict[str, int]]]:
    return {
        name: {
            split: {what: store.total(name, split, what) for what in ("documents", "tokens")}
            for split in SPLITS
        }
        for name in store.manifest["sources"]
    }


def _survey(
    config: DataConfig,
    tokenizer: TokenizerWrapper,
    name: str,
    spec: SourceConfig,
    split: str,
    most: int,
    seen: set[int],
) -> tuple[npt.NDArray[np.int64], Counter[str]]:
    """Lengths of the first documents of a stream; how many are left out, by reason, and how many
    are a ``duplicate`` of one before (which a stream does not leave out)."""
    source = DocumentSource(
        name, spec, split=split, splits=config.splits, shuffle=False, on_error=config.on_error
    )
    encode = make_encoder(spec, config, tokenizer)
    counts: Counter[str] = Counter()
    lengths: list[int] = []
    with closing(iter(source)) as documents:
        wanted = itertools.islice(documents, most)
        while group := list(itertools.islice(wanted, ENCODE_TOGETHER)):
            encoded = encode(group, counts)
            lengths += [document.tokens.size for document in encoded if document is not None]
            for document in group:
                counts["duplicate"] += document.id in seen
                seen.add(document.id)
        counts.update(documents.skipped)
    return np.array(lengths, np.int64), +counts


def _lengths(lengths_D: npt.NDArray[np.int64], row_length: int) -> Lengths:
    bins_D = np.frexp(lengths_D.clip(min=1))[1] - 1  # the exponent: floor(log2), exactly
    if not lengths_D.size:
        return Lengths(bins_D, bins_D, math.nan, math.nan, 0, math.nan)
    return Lengths(
        np.bincount(bins_D),
        np.bincount(bins_D, weights=lengths_D).astype(np.int64),
        float(np.median(lengths_D)),
        float(lengths_D.mean()),
        int(lengths_D.max()),
        float((lengths_D > row_length).mean()),
    )


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else math.nan
