"""Near-duplicates: MinHash signatures, banded into candidates, joined into clusters.

Signatures (Broder 1997) are rensa's, made where the text is read. Candidates share all numbers
of a band (Leskovec, Rajaraman and Ullman, *Mining of Massive Datasets*, section 3.4) and count
if their signatures agree in ``threshold`` of all places. Clusters are connected components, so
they do not depend on the order of documents or of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dh_jax.config import NearDuplicateConfig
from dh_jax.data.preparing.ngrams import BASE, hash_ngrams, hash_words, words_of
from dh_jax.errors import ConfigError
from dh_jax.extras import install_command

SEED = 1
RECALL = 0.95  # of pairs exactly at the threshold
COMPARED = 2**16  # pairs of signatures compared at once

Signatures = npt.NDArray[np.uint32]


def signatures(texts: Sequence[str], config: NearDuplicateConfig) -> Signatures:
    """[D, P] MinHash signatures of the sets of word n-grams of D texts.

    A text of fewer than n words is its own only n-gram, and one without any word is compared
    letter by letter, so two such texts are near-duplicates only if they are equal.
    """
    rensa = _rensa()
    grams = [_grams(text, config.ngram) for text in texts]
    offsets = np.cumsum([0, *(g.size for g in grams)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(grams) if grams else np.zeros(0, np.uint64),
        offsets,
        config.permutations,
        SEED,
    )
    rows = np.array(matrix.to_rows(), np.uint32)
    return rows.reshape(len(texts), config.permutations)


def _grams(text: str, n: int) -> npt.NDArray[np.uint64]:
    words = words_of(text) or [text]
    return hash_ngrams(hash_words(words), min(n, len(words)))


def bands_of(config: NearDuplicateConfig) -> tuple[int, int]:
    """(bands, rows a band): the longest bands, hence the fewest idle candidates, that still find
    a pair at the threshold t with probability 1 - (1 - t**rows)**bands of at least `RECALL`."""
    for rows in range(config.permutations, 1, -1):
        bands = config.permutations // rows
        if 1 - (1 - config.threshold**rows) ** bands >= RECALL:
            return bands, rows
    return config.permutations, 1


def clusters(
    blocks: Sequence[Signatures], kept_D: npt.NDArray[np.bool_], config: NearDuplicateConfig
) -> npt.NDArray[np.int64]:
    """Which documents are near-duplicates of one another.

    Args:
        blocks: signatures ``[d, P]`` of consecutive documents, D in all; may be memory maps.
            A band's hashes, 8 bytes a document, are in memory; the signatures need not be.
        kept_D: documents to consider; the others stay alone.
        config: threshold and size of the signatures.

    Returns:
        [D] the number of each document's cluster; which number it is means nothing.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = kept_D.size
    edges: list[npt.NDArray[np.int64]] = []
    bands, rows = bands_of(config)
    documents = np.flatnonzero(kept_D)
    for band in range(bands):
        columns = slice(band * rows, (band + 1) * rows)
        keys = np.concatenate([_fold(block[:, columns]) for block in blocks])[kept_D]
        edges += _edges(documents, keys, blocks, config.threshold)
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *edges])
    graph = coo_array((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), (count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _fold(columns: Signatures) -> npt.NDArray[np.uint64]:
    """[D] one 64-bit hash for each document's numbers in a band."""
    keys = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        keys = keys * BASE + column
    return keys


def _edges(
    documents: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint64],
    blocks: Sequence[Signatures],
    threshold: float,
) -> list[npt.NDArray[np.int64]]:
    """Pairs [E, 2] with equal keys and like signatures: each document of a bucket with the one
    before it and with the bucket's first. All pairs would be quadratic, and the other bands
    give every document more chances."""
    order = np.argsort(keys, kind="stable")
    equal = keys[order][1:] == keys[order][:-1]
    places = np.arange(keys.size)
    first = np.maximum.accumulate(np.where(np.concatenate([[True], ~equal]), places, 0))
    later = np.flatnonzero(equal) + 1
    left = np.concatenate([later, later])
    right = np.concatenate([later - 1, first[later]])
    pairs = np.stack([documents[order[left]], documents[order[right]]], axis=1)
    pairs = np.unique(pairs, axis=0)
    starts = np.cumsum([0, *(len(block) for block in blocks)])
    alike = []
    for at in range(0, len(pairs), COMPARED):
        some = pairs[at : at + COMPARED]
        same = _take(blocks, starts, some[:, 0]) == _take(blocks, starts, some[:, 1])
        alike.append(some[same.mean(axis=1) >= threshold])
    return alike


def _take(
    blocks: Sequence[Signatures], starts: npt.NDArray[np.int64], documents: npt.NDArray[np.int64]
) -> Signatures:
    """Signatures of some documents, whichever blocks they lie in."""
    taken = np.empty((documents.size, blocks[0].shape[1]), np.uint32)
    owner = np.searchsorted(starts, documents, side="right") - 1
    for block in np.unique(owner):
        here = owner == block
        taken[here] = blocks[block][documents[here] - starts[block]]
    return taken


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise ConfigError(
            f"near-duplicates need the package rensa; {install_command('dedup')}, or set "
            "data.prepare.near_duplicates.action=ignore"
        ) from error
    return rensa
