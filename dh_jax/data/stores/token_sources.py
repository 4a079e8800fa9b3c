"""Token stores of other trainers, read in place through memory maps: Megatron's and MosaicML's.

A document's id is a hash. By default it is that of its *position* (the store's fingerprint and
the document's index), for which no token is read: opening costs the index alone. Such ids do not
show that two documents are equal, so copies may fall into different splits. ``ids: content``
hashes the tokens instead, which reads the whole store once at opening.
"""

from __future__ import annotations

import numpy as np

from dh_jax.config import SPLITS, MdsSource, MegatronSource, SourceConfig, SplitConfig
from dh_jax.data.store import StoredDocuments
from dh_jax.data.stores.mds import read_mds
from dh_jax.data.stores.megatron import read_megatron
from dh_jax.data.stores.token_index import TokenIndex, content_ids, position_ids
from dh_jax.errors import ConfigError, DataError


def open_token_source(
    spec: SourceConfig, split: str | None, splits: SplitConfig
) -> StoredDocuments:
    """The documents of one split of a token store, ready for random access.

    Documents are split by their ids as texts are (`sources.split_of`). ``max_documents`` keeps
    the store's first ones, before splitting. Empty documents are left out.

    Args:
        spec: a `MegatronSource` or `MdsSource`.
        split: ``train``, ``probe`` or ``eval``; None for all documents.
        splits: fractions held out.

    Raises:
        ConfigError: the source is of another kind, or all of it is another split.
        DataError: a file is missing or damaged, or the split has no document.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    if split is not None and spec.split not in ("hash", split):
        raise ConfigError(
            f"token store is all {spec.split} (split: {spec.split}), so it has no {split} "
            "documents; set split: hash, or take another source"
        )
    if isinstance(spec, MegatronSource):
        index, ids = read_megatron(spec.path), spec.ids
    elif isinstance(spec, MdsSource):
        index, ids = read_mds(spec.path, spec.column, spec.dtype, spec.cache), spec.ids
    else:
        raise ConfigError(f"kind {spec.kind!r} holds no tokens; kinds that do: megatron, mds")
    return _chosen(index, ids, spec, split, splits)


def _chosen(
    index: TokenIndex, ids: str, spec: SourceConfig, split: str | None, splits: SplitConfig
) -> StoredDocuments:
    ids_D = (
        content_ids(index)
        if ids == "content"
        else position_ids(index.fingerprint, index.lengths_D.size)
    )
    keep_D = index.lengths_D > 0
    keep_D[spec.max_documents :] &= spec.max_documents is None
    if split is not None and spec.split == "hash":
        place_D = (ids_D >> np.uint64(11)).astype(np.float64) * 2.0**-53
        probe_D, eval_D = place_D < splits.probe, place_D >= 1.0 - splits.eval
        keep_D &= {"probe": probe_D, "eval": eval_D & ~probe_D, "train": ~(probe_D | eval_D)}[split]
    if not keep_D.any():
        raise DataError(
            f"the token store has no {split or 'usable'} document among {keep_D.size}; "
            f"raise splits.{split}, or give it more documents"
        )
    return StoredDocuments(
        index.shards,
        index.shards_D[keep_D],
        index.starts_D[keep_D],
        index.lengths_D[keep_D],
        ids_D[keep_D],
        fingerprint=f"{index.fingerprint:016x}",
    )
