"""Scores of any number of documents, batch after batch: nothing but the queries stays in memory.

Shapes: K queries, B rows, S documents of a row, N documents of a batch that have a target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch, checksum
from dh_jax.distributed.mesh import to_host
from dh_jax.errors import StateError
from dh_jax.functions import Params
from dh_jax.influence.blame import refuse_scores
from dh_jax.influence.estimator import Estimator, Prepared, State, has_target
from dh_jax.influence.objective import NotFinite, checked, refuse_non_finite


class Scored(NamedTuple):
    """The documents of one batch, in the order of rows and, within a row, of segments."""

    batch: int  # its number
    checksum: str  # of the batch, see `dh_jax.batch.checksum`
    values_KN: np.ndarray  # positive = harmful
    self_N: np.ndarray | None  # self-influence, where it was asked for
    row_N: np.ndarray  # int32
    segment_N: np.ndarray  # int32, from 1
    targets_N: np.ndarray  # int32, valid targets
    source_N: np.ndarray  # int32, as in Batch.source_ids_B


def stream(
    estimator: Estimator,
    params: Params,
    state: State,
    prepared: Prepared,
    documents: Iterable[Batch],
    key: jax.Array,
    *,
    self_influence: bool = False,
    scored: Callable[[int], str | None] = lambda index: None,
) -> Iterator[Scored]:
    """Score batches one by one; each is asked for when the one before has been taken.

    Args:
        estimator: any.
        params: all parameters.
        state: from its ``fit``.
        prepared: queries, see `dh_jax.influence.queries`.
        documents: batches; gone through once.
        key: random key, as the loss may use it.
        self_influence: also how much each document influences itself, see `own_influence`.
        scored: the checksum of a batch that was scored already and is passed over, else None.

    Raises:
        NotFinite: a score or a self-influence is not finite (names batch, row and segment).
        DataError: a row has more segments than the scope allows, or there is no batch.
        StateError: a batch that was scored is another one now.
    """
    for index, batch, batch_key in checked(documents, estimator.scope, key):
        there_BS = has_target(batch, estimator.scope)
        mark = checksum(jax.tree.map(np.asarray, batch._replace(teacher=None)))
        if (before := scored(index)) is not None:
            if before != mark:
                raise StateError(
                    f"batch {index} is another one than was scored (checksum {before}, now "
                    f"{mark}): the data or its order changed; score into another folder"
                )
            continue

        def of_rows(rows: Batch, key: jax.Array = batch_key) -> jax.Array:
            return estimator.score(params, state, prepared, rows, key)

        scores_KBS = of_rows(batch)
        refuse_scores(index, batch, scores_KBS, there_BS, of_rows)
        own_BS = None
        if self_influence:
            own_BS = own_influence(estimator, params, state, batch, batch_key)
            refuse_non_finite(index, "self-influence", own_BS)
        rows, segments = np.nonzero(there_BS)
        yield Scored(
            index,
            mark,
            to_host(scores_KBS)[:, there_BS],
            None if own_BS is None else own_BS[there_BS],
            rows.astype(np.int32),
            segments.astype(np.int32) + 1,
            _targets(batch, rows, segments),
            np.asarray(batch.source_ids_B, np.int32)[rows],
        )


def own_influence(
    estimator: Estimator, params: Params, state: State, batch: Batch, key: jax.Array
) -> np.ndarray:
    """(B, S) ``g' H^-1 g`` of every document, by scoring it for itself; 0 where there is none.

    The sign is that of the literature: large for documents that the model has to learn by heart
    (it is minus the score of a document for itself). One row at a time, since the prepared
    queries of a row are as large as the parameters looked at, once for every document. NaN where
    a document's gradient is not fit to be a query.
    """
    there_BS = has_target(batch, estimator.scope)
    own_BS = np.zeros(there_BS.shape, np.float64)
    for b in np.flatnonzero(there_BS.any(axis=1)):
        row: Batch = jax.tree.map(lambda x, b=b: jnp.asarray(x)[b : b + 1], batch)
        try:
            queries = estimator.queries(params, state, [row], key)
        except NotFinite as error:  # which knows of this row alone
            own_BS[b, error.segment - 1] = np.nan
            continue
        scores_KS = to_host(estimator.score(params, state, queries, row, key))[:, 0]
        own_BS[b, there_BS[b]] = -np.diagonal(scores_KS[:, there_BS[b]])
    return own_BS


def _targets(batch: Batch, rows: np.ndarray, segments: np.ndarray) -> np.ndarray:
    mask_BT, ids_BT = np.asarray(batch.loss_mask_BT), np.asarray(batch.segment_ids_BT)
    counts = [
        int((mask_BT[b] & (ids_BT[b] == s + 1)).sum()) for b, s in zip(rows, segments, strict=True)
    ]
    return np.asarray(counts, np.int32)
