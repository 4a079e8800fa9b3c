"""Which documents stay, and in which split: decided over all of them at once.

Everything here is a pure function of arrays in the order of sources and lots, so it does not
matter who mapped what. Sets that are held out whole come first in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dh_jax.config import SPLITS, SplitConfig

Codes = npt.NDArray[np.int8]

HASH = len(SPLITS)  # the role of a source whose documents are split by content
STAYS = 0
REASONS = ("", "duplicate", "held_out", "near_duplicate", "contaminated")  # why one is left out


class Verdict(NamedTuple):
    """What becomes of D documents."""

    splits_D: Codes  # index into SPLITS
    reasons_D: Codes  # index into REASONS; STAYS: it stays


def role_code(role: str) -> int:
    """A source's ``split`` as a number: an index into SPLITS, or HASH."""
    return SPLITS.index(role) if role in SPLITS else HASH


def splits_of(ids_D: npt.NDArray[np.uint64], roles_D: Codes, splits: SplitConfig) -> Codes:
    """`sources.split_of` for many documents: [D] indices into SPLITS."""
    places = (ids_D >> np.uint64(11)).astype(np.float64) * 2.0**-53
    by_hash = np.full(ids_D.size, SPLITS.index("train"), np.int8)
    by_hash[places >= 1.0 - splits.eval] = SPLITS.index("eval")
    by_hash[places < splits.probe] = SPLITS.index("probe")
    return np.where(roles_D == HASH, by_hash, roles_D).astype(np.int8)


def drop_exact(
    ids_D: npt.NDArray[np.uint64], roles_D: Codes, splits: SplitConfig
) -> tuple[Verdict, npt.NDArray[np.int64]]:
    """Keep the first of equal documents.

    Returns:
        The verdict, and [D] the first document equal to each. A later one is a ``duplicate`` if
        both belong to the same split; ``held_out`` if not, which is an overlap between sets.
    """
    splits_D = splits_of(ids_D, roles_D, splits)
    _, first, inverse = np.unique(ids_D, return_index=True, return_inverse=True)
    first_D = first[inverse].astype(np.int64)
    reasons_D = np.zeros(ids_D.size, np.int8)
    later = first_D != np.arange(ids_D.size)
    same = splits_D[first_D] == splits_D
    reasons_D[later & same] = REASONS.index("duplicate")
    reasons_D[later & ~same] = REASONS.index("held_out")
    return Verdict(splits_D, reasons_D), first_D


def drop_near(
    verdict: Verdict,
    ids_D: npt.NDArray[np.uint64],
    roles_D: Codes,
    clusters_D: npt.NDArray[np.int64],
    splits: SplitConfig,
    action: str,
) -> Verdict:
    """Let no cluster of near-duplicates lie in training and in a held-out set.

    Documents of sets that are held out whole always stay: thinning them would change what is
    measured. What else is in a cluster with one of them is left out. In other clusters

    - ``drop`` keeps the first document, in the split of its own content;
    - ``together`` keeps all: in training if one comes from a source that is all training, else
      where the smallest id of the cluster belongs, for that does not depend on any order.

    Args:
        verdict: of `drop_exact`; documents it left out stay left out.
        ids_D: content hashes.
        roles_D: see `role_code`.
        clusters_D: see `near_duplicates.clusters`.
        splits: fractions held out.
        action: ``drop`` or ``together``.
    """
    splits_D, reasons_D = verdict.splits_D.copy(), verdict.reasons_D.copy()
    stays = np.flatnonzero(reasons_D == STAYS)
    order = stays[np.argsort(clusters_D[stays], kind="stable")]
    clusters = clusters_D[order]
    train = SPLITS.index("train")
    for members in _groups(order, clusters):
        roles = roles_D[members]
        fixed = (roles != HASH) & (roles != train)  # of a set held out whole
        if fixed.any():
            reasons_D[members[~fixed]] = REASONS.index("near_duplicate")
        elif action == "drop":
            reasons_D[members[1:]] = REASONS.index("near_duplicate")
        elif (roles == train).any():
            splits_D[members] = train
        else:
            key = ids_D[members].min()
            hashed = np.array([HASH], np.int8)
            splits_D[members] = splits_of(np.array([key], np.uint64), hashed, splits)[0]
    return Verdict(splits_D, reasons_D)


def _groups(
    order: npt.NDArray[np.int64], clusters: npt.NDArray[np.int64]
) -> Sequence[npt.NDArray[np.int64]]:
    """Members of every cluster of two or more; each in the order of documents."""
    borders = np.flatnonzero(np.diff(clusters)) + 1
    return [group for group in np.split(order, borders) if group.size > 1]
