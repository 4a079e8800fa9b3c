"""What is measured: a loss with what else is known of the model, and which gradients are meant.

Shapes: B rows, T tokens, S segments ("documents") of a row, V outputs.

One sign everywhere in this room: **positive = harmful**. The score of a document for a query is
the first-order change of the query's loss when the document is trained on (more), so helpful
documents have negative scores; reports turn the sign for readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError, DataError
from dh_jax.functions import (
    LogitsFn,
    LossFn,
    Params,
    TappedLayer,
    TappedLossFn,
    cross_entropy,
)

Data = Iterable[Batch]  # may be gone through more than once: a list, or an object with __iter__
LogitsLoss = Callable[[jax.Array, Batch], jax.Array]  # (logits_BTV, batch) -> loss_BT
Taps = dict[str, jax.Array]


def next_token_loss(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy of the targets, (B, T) nats."""
    return cross_entropy(logits_BTV, batch.targets_BT)


class Objective(NamedTuple):
    """A loss, and what else of the model an estimator may ask for.

    Attributes:
        loss: the loss that was trained on; enough for everything that takes plain gradients.
        logits: the model before its loss; Gauss-Newton products and sampled labels need it.
        logits_loss: convex in the logits, so that ``loss = logits_loss(logits)`` at valid targets.
        tapped: the same loss through taps; EK-FAC needs it, others are cheaper by it.
        layers: the tapped operations by name.
        zero_taps: ``(params, batch) -> taps``, zeros of the right shapes by name.
    """

    loss: LossFn
    logits: LogitsFn | None = None
    logits_loss: LogitsLoss = next_token_loss
    tapped: TappedLossFn | None = None
    layers: Mapping[str, TappedLayer] | None = None
    zero_taps: Callable[[Params, Batch], Taps] | None = None


class Scope(NamedTuple):
    """Which gradients are meant; constants of a compiled program.

    Attributes:
        parameters: regular expression searched for in parameter paths.
        max_segments: S; rows with more segments are refused. 1 = a row is a document.
        reduction: a document's loss is the ``sum`` of its targets' losses (what training on it
            adds, so long documents weigh more) or their ``mean``.
        chunk: rows worked on at once; memory follows it. On a mesh a multiple of its devices.
        dtype: of statistics; float32, or float64 (which needs ``jax_enable_x64``).
    """

    parameters: str = ".*"
    max_segments: int = 1
    reduction: Literal["sum", "mean"] = "sum"
    chunk: int = 8
    dtype: str = "float32"


def check_scope(scope: Scope) -> Scope:
    """The scope itself, where it makes sense.

    Raises:
        ConfigError: a number lies outside its range, or statistics would be too coarse.
    """
    for name in ("max_segments", "chunk"):
        if getattr(scope, name) < 1:
            raise ConfigError(f"influence scope: {name} is {getattr(scope, name)}; the least is 1")
    if scope.reduction not in ("sum", "mean"):
        raise ConfigError(f"influence scope: reduction {scope.reduction!r}; take 'sum' or 'mean'")
    if scope.dtype not in ("float32", "float64"):
        raise ConfigError(
            f"influence scope: statistics in {scope.dtype} drown in rounding (8 bits of a sum "
            "of squares); take float32 or float64, whatever the model's dtype"
        )
    if scope.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError("influence scope: dtype float64 needs jax.config jax_enable_x64")
    return scope


# --- going through data ----------------------------------------------------------------------


def checked(data: Data, scope: Scope, key: jax.Array) -> Iterator[tuple[int, Batch, jax.Array]]:
    """Number, batch and key of every batch; the keys are the same every time.

    Raises:
        DataError: a row has more segments than the scope allows, or there is no batch at all.
    """
    index = -1
    for index, batch in enumerate(data):
        most = int(np.max(np.asarray(batch.segment_ids_BT)))
        if most > scope.max_segments:
            raise DataError(
                f"batch {index}: a row has {most} segments, above max_segments "
                f"{scope.max_segments}; raise it to {most}"
            )
        yield index, batch, jax.random.fold_in(key, index)
    if index < 0:
        raise DataError(
            "no batch to measure; the data may be an iterator that was used up: give a list, or "
            "an object that can be gone through again"
        )


class NotFinite(DataError):
    """A loss, gradient or score is NaN or infinite; says where, for who knows the documents."""

    def __init__(self, text: str, index: int, row: int, segment: int):
        super().__init__(text)
        self.index, self.row, self.segment = index, row, segment  # segment counts from 1


def refuse_non_finite(index: int, what: str, values_BS: jax.Array | np.ndarray) -> None:
    """Raise where a document's value is NaN or infinite, naming batch, row and segment.

    Raises:
        NotFinite: with the first such document and how many there are.
    """
    bad_BS = ~np.isfinite(np.asarray(values_BS))
    if bad_BS.any():
        row, segment = (int(i) for i in np.argwhere(bad_BS)[0])
        raise NotFinite(
            f"batch {index}, row {row}, document (segment) {segment + 1}: {what} is not finite "
            f"({int(bad_BS.sum())} such in the batch); look at its tokens, or at the parameters",
            index,
            row,
            segment + 1,
        )
