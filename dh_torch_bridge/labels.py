"""Labels as torch's losses take them, int64 with -100, in one pass over a batch's targets."""

from __future__ import annotations

import numba
import numpy as np

IGNORED = -100  # the label that torch's cross_entropy ignores by default


@numba.njit(cache=True, nogil=True)
def shifted_labels(targets_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """The target of each position, int64 ``[B, T]``; -100 where nothing is learnt."""
    shifted_BT = np.empty(targets_BT.shape, np.int64)
    for b in range(targets_BT.shape[0]):
        for t in range(targets_BT.shape[1]):
            shifted_BT[b, t] = targets_BT[b, t] if mask_BT[b, t] else IGNORED
    return shifted_BT


@numba.njit(cache=True, nogil=True)
def plain_labels(shifted_BT: np.ndarray, positions_BT: np.ndarray) -> np.ndarray:
    """The same one place to the right, int64 ``[B, T]``; -100 where a document begins: a split
    document's last target would otherwise land on the next one's first token."""
    labels_BT = np.empty_like(shifted_BT)
    labels_BT[:, 0] = IGNORED
    for b in range(shifted_BT.shape[0]):
        for t in range(1, shifted_BT.shape[1]):
            labels_BT[b, t] = shifted_BT[b, t - 1] if positions_BT[b, t] else IGNORED
    return labels_BT
