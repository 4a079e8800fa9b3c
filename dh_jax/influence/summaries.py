"""What is kept of many scores: the extreme documents of every query, and sums by group.

Shapes: K queries, N documents of a part, M groups, t documents at an end.

Both take the scores part by part and hold only their result.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


class Ends:
    """The documents of lowest (most helpful) and highest (most harmful) score of every query.

    Documents are numbered in the order in which they are added; of equal scores the earlier
    document comes first at either end.

    Args:
        queries: K.
        top: t, documents kept at each end.
    """

    def __init__(self, queries: int, top: int):
        self._top, self._seen = top, 0
        empty = np.empty((queries, 0)), np.empty((queries, 0), np.int64)
        self._low, self._high = empty, empty

    def add(self, scores_KN: Floats) -> None:
        count = scores_KN.shape[1]
        numbers_KN = np.broadcast_to(self._seen + np.arange(count), scores_KN.shape)
        self._low = self._best(self._low, scores_KN, numbers_KN)
        self._high = self._best(self._high, -scores_KN, numbers_KN)
        self._seen += count

    def _best(
        self, old: tuple[np.ndarray, np.ndarray], more: np.ndarray, numbers: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        values = np.concatenate([old[0], more], axis=1)
        documents = np.concatenate([old[1], numbers], axis=1)
        # What is kept is sorted and older, so a stable order is all that equal scores need.
        order = np.argsort(values, axis=1, kind="stable")[:, : self._top]
        return tuple(np.take_along_axis(x, order, axis=1) for x in (values, documents))  # type: ignore[return-value]

    @property
    def helpful_Kt(self) -> np.ndarray:
        """Numbers of documents, the lowest score first."""
        return self._low[1]

    @property
    def harmful_Kt(self) -> np.ndarray:
        """Numbers of documents, the highest score first."""
        return self._high[1]


class GroupStatistics(NamedTuple):
    """Scores of each group, in float64."""

    count_M: np.ndarray
    sum_KM: np.ndarray
    mean_KM: np.ndarray  # NaN for a group without documents
    deviation_KM: np.ndarray  # standard deviation of a document (n - 1); NaN under two

    @property
    def standard_error_KM(self) -> np.ndarray:
        """Of the mean."""
        return self.deviation_KM / np.sqrt(np.maximum(self.count_M, 1))


class Groups:
    """Count, sum, mean and deviation of scores by group (by source, say).

    Moments are merged about their means (Chan et al. 1983), since raw squares would drown a small
    deviation.

    Args:
        queries: K.
        groups: M.
    """

    def __init__(self, queries: int, groups: int):
        self._count_M = np.zeros(groups)
        self._mean_KM, self._moment_KM = np.zeros((2, queries, groups))

    def add(self, scores_KN: Floats, group_N: npt.NDArray[np.integer]) -> None:
        for m in np.unique(group_N):
            part = scores_KN[:, group_N == m].astype(np.float64)
            mean_K = part.mean(axis=1)
            moment_K = np.square(part - mean_K[:, None]).sum(axis=1)
            old, new = self._count_M[m], part.shape[1]
            step_K = mean_K - self._mean_KM[:, m]
            self._moment_KM[:, m] += moment_K + step_K**2 * old * new / (old + new)
            self._mean_KM[:, m] += step_K * new / (old + new)
            self._count_M[m] += new

    def result(self) -> GroupStatistics:
        n_M = self._count_M
        mean_KM = np.where(n_M > 0, self._mean_KM, np.nan)
        variance_KM = self._moment_KM / np.where(n_M > 1, n_M - 1, np.nan)
        return GroupStatistics(
            n_M.astype(np.int64), self._mean_KM * n_M, mean_KM, np.sqrt(variance_KM)
        )
