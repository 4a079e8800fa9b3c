"""Mixing: rows of many sources in one low-discrepancy order, with weights that may change.

Which source comes next is decided by arithmetic, not by drawing: each source's *deficit* is
what its weight has earned so far minus what it has been given, and the rule of Tijdeman's
chairman assignment (Discrete Mathematics 32, 1980) keeps every deficit below one row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import grain
import numba
import numpy as np
import numpy.typing as npt

from dh_jax.data.batching import MixedRow, trained_tokens
from dh_jax.data.packing import Row
from dh_jax.errors import ConfigError, StateError

Floats = npt.NDArray[np.float64]
ROWS, TOKENS, TRUNCATED = range(3)  # columns of what a source was given
NOTHING = (-1, 0, 0, 0)  # arguments of `settle_and_choose` when there is no row to book


@numba.njit(cache=True, nogil=True)
def choose_source(deficits_M, weights_M, row):  # type: ignore[no-untyped-def]
    """Index of the source whose row comes next.

    Args:
        deficits_M: [M] float64, earned minus given, in the unit of the weights.
        weights_M: [M] float64, non-negative, summing to 1.
        row: what a full row counts in that unit.

    Returns:
        The index; -1 if every weight is 0.

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
    return best if best >= 0 else fallback  # -1 where every weight is 0


@numba.njit(cache=True, nogil=True)
def settle(deficits_M, weights_M, counts_M3, source, counted, tokens, truncated):  # type: ignore[no-untyped-def]
    """Book one row: every source earns its share of what ``source`` was given."""
    for m in range(weights_M.size):
        deficits_M[m] += weights_M[m] * counted
    deficits_M[source] -= counted
    counts_M3[source, ROWS] += 1
    counts_M3[source, TOKENS] += tokens
    counts_M3[source, TRUNCATED] += truncated


@numba.njit(cache=True, nogil=True)
def settle_and_choose(  # type: ignore[no-untyped-def]
    deficits_M, weights_M, counts_M3, full, source, counted, tokens, truncated
):
    """Book the last row, if there is one (``source`` >= 0), and choose the next source: one call
    from Python instead of two."""
    if source >= 0:
        settle(deficits_M, weights_M, counts_M3, source, counted, tokens, truncated)
    return choose_source(deficits_M, weights_M, full)


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
            ``trained_tokens`` (targets under the loss mask; a row without any counts as 1).
        exhausted: what happens when a source has no further row. ``renormalise``: it leaves the
            mixture, which ends with its last source; ``stop``: the mixture ends. Sources that
            repeat without end never come to this.
    """

    def __init__(
        self,
        sources: Mapping[str, grain.IterDataset[Row]],
        weights: Mapping[str, float],
        *,
        row_length: int,
        unit: str = "tokens",
        exhausted: str = "renormalise",
    ):
        super().__init__(tuple(sources.values()))
        self._names = tuple(sources)
        self._weights = normalised(weights, self._names)
        self._row_length, self._unit, self._exhausted = row_length, unit, exhausted

    def __iter__(self) -> MixedIterator:
        rows = [cast(grain.DatasetIterator[Row], iter(source)) for source in self.parents]
        return MixedIterator(
            rows, self._names, self._weights, self._row_length, self._unit, self._exhausted
        )


class Snapshot(NamedTuple):
    """Where a mixture stands, cheap to take behind every batch; `MixedIterator.describe` turns
    one into JSON."""

    weights_M: Floats
    deficits_M: Floats
    counts_M3: npt.NDArray[np.int64]  # rows, tokens and truncated tokens given
    sources: tuple[dict[str, Any], ...]  # states of the sources' own iterators


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
        exhausted: str,
    ):
        super().__init__(sources)
        self.names = tuple(names)
        self._unit, self._exhausted = unit, exhausted
        self._full = 1.0 if unit == "rows" else float(row_length)
        self._weights = weights_M.copy()
        self._deficits = np.zeros(len(names), np.float64)
        self._counts = np.zeros((len(names), 3), np.int64)

    @property
    def weights(self) -> dict[str, float]:
        """Weights in force, by source; they sum to 1."""
        return dict(zip(self.names, self._weights.tolist(), strict=True))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the mixture from the next row on; weights are scaled to sum to 1."""
        self._weights[:] = normalised(weights, self.names)

    def __next__(self) -> MixedRow:
        self._assert_not_closed()
        rows = self.draw(1)
        if not rows:
            raise StopIteration
        return rows[0]

    def draw(self, count: int) -> list[MixedRow]:
        """The next ``count`` rows, fewer only at the end of the mixture."""
        deficits, weights, counts = self._deficits, self._weights, self._counts
        rows: list[MixedRow] = []
        last = NOTHING  # the row not yet booked
        while len(rows) < count:
            source = settle_and_choose(deficits, weights, counts, self._full, *last)
            last = NOTHING
            if source < 0:
                break
            row = next(self._parents[source], None)
            if row is None:
                self._run_dry(source)
                continue
            counted = row.tokens
            if self._unit != "tokens":
                # At least 1: rows without a target would be free, and never end.
                counted = 1 if self._unit == "rows" else max(1, trained_tokens(row))
            last = source, counted, row.tokens, row.truncated
            rows.append(MixedRow(source, row))
        if last is not NOTHING:
            settle(deficits, weights, counts, *last)
        return rows

    def _run_dry(self, source: int) -> None:
        """Take a source without further rows out of the mixture, or end it."""
        self._weights[source] = 0.0
        total = self._weights.sum()
        if self._exhausted == "stop" or total <= 0:
            self._weights[:] = 0.0
        else:  # the others share what it would have had
            self._weights /= total

    # --- state ---

    def snapshot(self) -> Snapshot:
        """Where the mixture stands."""
        return Snapshot(
            self._weights.copy(),
            self._deficits.copy(),
            self._counts.copy(),
            tuple([source.get_state() for source in self._parents]),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go back (or on) to where ``snapshot`` was taken."""
        self._weights[:] = snapshot.weights_M
        self._deficits[:] = snapshot.deficits_M
        self._counts[:] = snapshot.counts_M3
        for source, state in zip(self._parents, snapshot.sources, strict=True):
            source.set_state(state)

    def describe(self, snapshot: Snapshot) -> dict[str, Any]:
        """A snapshot as JSON, source by source."""
        return {
            name: {
                "weight": weight,
                "deficit": deficit,
                "rows": counts[ROWS],
                "tokens": counts[TOKENS],
                "truncated": counts[TRUNCATED],
                "source": state,
            }
            for name, weight, deficit, counts, state in zip(
                self.names,
                snapshot.weights_M.tolist(),
                snapshot.deficits_M.tolist(),
                snapshot.counts_M3.tolist(),
                snapshot.sources,
                strict=True,
            )
        }

    def get_state(self) -> dict[str, Any]:
        """JSON-able state behind the last row, source by source."""
        return self.describe(self.snapshot())

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            StateError: it is the state of other sources.
        """
        if set(state) != set(self.names):
            raise StateError(
                f"the state is of sources {', '.join(state)}; this mixture has "
                f"{', '.join(self.names)}; resume with the sources it was saved with"
            )
        parts = [state[name] for name in self.names]
        counts = [[part["rows"], part["tokens"], part["truncated"]] for part in parts]
        self.restore(
            Snapshot(
                np.array([part["weight"] for part in parts], np.float64),
                np.array([part["deficit"] for part in parts], np.float64),
                np.array(counts, np.int64),
                tuple(part["source"] for part in parts),
            )
        )
