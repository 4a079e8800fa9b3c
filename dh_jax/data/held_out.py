"""What a streamed source leaves to the held-out sets, so that train, probe and eval are disjoint.

A store is decided over all documents at once (`preparing.deduplicate`). A stream sees one source,
so whoever opens it says what the others hold: the sets that are held out whole are read once, and
a source that is all training gives way to sources that are split by content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from dh_jax.config import DataConfig, SourceConfig
from dh_jax.data.prepare import text_sources
from dh_jax.data.sources import HELD_OUT, DocumentSource


def held_elsewhere(
    config: DataConfig, split: str, names: Collection[str]
) -> dict[str, frozenset[int]]:
    """For each named source of text, ids of documents that belong to another split because a set
    that is held out whole has them. As in a store, the first such set keeps a document.

    Args:
        config: with all sources and probes.
        split: which the named sources are read for.
        names: of sources.
    """
    found: dict[str, frozenset[int]] = {}
    held: frozenset[int] = frozenset()
    sources = text_sources(config)  # sets held out whole come first
    for name, spec in sources.items():
        if name in names:
            found[name] = held
        if found.keys() >= sources.keys() & set(names):
            break
        if spec.split in HELD_OUT and spec.split != split:
            held |= _ids(name, spec, config)
    return found


def _ids(name: str, spec: SourceConfig, config: DataConfig) -> frozenset[int]:
    # Without its limit: which documents come under it depends on hosts and shuffling.
    whole = dataclasses.replace(spec, max_documents=None)
    documents = DocumentSource(
        name,
        whole,
        split=spec.split,
        splits=config.splits,
        shuffle=False,
        on_error=config.on_error,
    )
    return frozenset(document.id for document in documents)


def gives_way(config: DataConfig, spec: SourceConfig) -> bool:
    """Whether a source that is all training stands beside one split by content. What that one
    would hold out must then not be trained on from here, and whether it has a text is not known
    without reading all of it."""
    others = text_sources(config).values()
    return spec.split == "train" and any(other.split == "hash" for other in others)
