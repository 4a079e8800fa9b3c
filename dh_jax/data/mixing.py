"""Mixing: rows of many sources in one low-discrepancy order, with weights that may change.

Which source comes next is decided by arithmetic, not by drawing: each source's *deficit* is
what its weight has earned so far minus what it has been given, and the rule of Tijdeman's
chairman assignment (Discrete Mathematics 32, 1980) keeps every deficit below one row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import grain
import numba
import numpy as np
import numpy.typing as npt

from dh_jax.data.batching import MixedRow, trained_tokens
from dh_jax.data.packing import Row
from dh_jax.errors import ConfigError, StateError

Floats = npt.NDArray[np.float64]


@numba.njit(cache=True)
def choose_source(deficits_M, weights_M, row):  # type: ignore[no-untyped-def]
    """Index of the source whose row comes next.

    Args:
        deficits_M: [M] float64, earned minus given, in the unit of the weights.
        weights_M: [M] float64, non-negative, summing to 1.
        row: what a full row counts in that unit.

    Among sources that would have earned enough of a row by the end of this one, the one that
    would be the first to fall a whole row behind (Tijdeman 1980, section 2).
    """
    active = 0
    for weight in weights_M:
        active += weight > 0
    enough = row / (2 * active - 2) if active > 1 else 0.0
    best, best_deadline = -1, np.inf
    fallback, most = -1, -np.inf
    for m in range(weights_M.size):
        if weights_M[m] <= 0:
            continue
        earned = deficits_M[m] + weights_M[m] * row
        if earned > most:
            fallback, most = m, earned
        deadline = (row - enough - deficits_M[m]) / weights_M[m]
        if earned >= enough and deadline < best_deadline:
            best, best_deadline = m, deadline
    return best if best >= 0 else fallback


def normalised(weights: Mapping[str, float], names: Sequence[str]) -> Floats:
    """Weights in the order of ``names``, checked and scaled to sum to 1.

    Raises:
        ConfigError: a weight is negative, not finite or of an unknown source, or all are 0.
    """
    unknown = [n for n in weights if n not in names]
    if unknown:
        raise ConfigError(f"weight for unknown source {unknown[0]!r}; sources: {', '.join(names)}")
    missing = [n for n in names if n not in weights]
    if missing:
        raise ConfigError(f"no weight for source {missing[0]!r}; give 0 to leave it out")
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"weight of source {name!r} is {weight}; it must be finite and >= 0")
    values = np.array([weights[n] for n in names], np.float64)
    total = values.sum()
    if total <= 0:
        raise ConfigError("all weights are 0; at least one source needs a positive weight")
    return values if abs(total - 1.0) < 1e-12 else values / total


class MixedDataset(grain.IterDataset[MixedRow]):
    """Rows of several sources, each row from one source, in the shares the weights ask for.

    Args:
        sources: name -> row data set (`PackedDataset`), in a fixed order; ``MixedRow.source``
            is the index in it.
        weights: name -> share; scaled to sum to 1.
        row_length: T.
        unit: what a share counts: ``tokens`` (as placed in rows), ``rows``, or
            ``trained_tokens`` (targets under the loss mask).

    A source without further rows leaves the mixture, which ends with its last source; sources
    that repeat never do.
    """

    def __init__(
        self,
        sources: Mapping[str, grain.IterDataset[Row]],
        weights: Mapping[str, float],
        *,
        row_length: int,
        unit: str = "tokens",
    ):
        super().__init__(tuple(sources.values()))
        self._names = tuple(sources)
        self._weights = normalised(weights, self._names)
        self._row_length, self._unit = row_length, unit

    def __iter__(self) -> MixedIterator:
        rows = [cast(grain.DatasetIterator[Row], iter(source)) for source in self.parents]
        return MixedIterator(rows, self._names, self._weights, self._row_length, self._unit)


class MixedIterator(grain.DatasetIterator[MixedRow]):
    """Iterates mixed rows; ``set_weights`` holds from the next row on.

    The state is a few numbers a source: weight, deficit, rows and tokens given, and the state
    of the source's own iterator.
    """

    def __init__(
        self,
        sources: Sequence[grain.DatasetIterator[Row]],
        names: Sequence[str],
        weights_M: Floats,
        row_length: int,
        unit: str,
    ):
        super().__init__(sources)
        self.names = tuple(names)
        self._unit = unit
        self._full = 1.0 if unit == "rows" else float(row_length)
        self._weights = weights_M.copy()
        self._deficits = np.zeros(len(names), np.float64)
        self.rows = np.zeros(len(names), np.int64)
        self.tokens = np.zeros(len(names), np.int64)
        self.truncated = np.zeros(len(names), np.int64)

    @property
    def weights(self) -> dict[str, float]:
        return dict(zip(self.names, self._weights.tolist(), strict=True))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        self._weights = normalised(weights, self.names)

    def __next__(self) -> MixedRow:
        self._assert_not_closed()
        source, row = self._draw()
        tokens = row.tokens
        counted = {"tokens": tokens, "rows": 1}.get(self._unit)
        if counted is None:
            counted = trained_tokens(row)
        self._deficits += self._weights * counted
        self._deficits[source] -= counted
        self.rows[source] += 1
        self.tokens[source] += tokens
        self.truncated[source] += row.truncated
        return MixedRow(source, row)

    def _draw(self) -> tuple[int, Row]:
        while self._weights.any():
            source = int(choose_source(self._deficits, self._weights, self._full))
            row = next(self._parents[source], None)
            if row is not None:
                return source, row
            self._weights[source] = 0.0  # exhausted: the others share what it would have had
            self._weights /= self._weights.sum() or 1.0
        raise StopIteration

    def skipped(self, name: str) -> dict[str, int]:
        """Documents that a streamed source left out so far, by reason; empty for a store."""
        windows = self._parents[self.names.index(name)]._parent
        return dict(getattr(windows, "skipped", {}))

    def get_state(self) -> dict[str, Any]:
        return {
            name: {
                "weight": float(self._weights[m]),
                "deficit": float(self._deficits[m]),
                "rows": int(self.rows[m]),
                "tokens": int(self.tokens[m]),
                "truncated": int(self.truncated[m]),
                "source": self._parents[m].get_state(),
            }
            for m, name in enumerate(self.names)
        }

    def set_state(self, state: dict[str, Any]) -> None:
        if set(state) != set(self.names):
            raise StateError(
                f"the state is of sources {', '.join(state)}; this mixture has "
                f"{', '.join(self.names)}; resume with the sources it was saved with"
            )
        for m, name in enumerate(self.names):
            part = state[name]
            self._weights[m] = part["weight"]
            self._deficits[m] = part["deficit"]
            self.rows[m], self.tokens[m] = part["rows"], part["tokens"]
            self.truncated[m] = part["truncated"]
            self._parents[m].set_state(part["source"])
