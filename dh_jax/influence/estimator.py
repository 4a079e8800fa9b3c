"""What every estimator of influence is: three functions, in optax's manner.

Shapes: K queries, B rows, S documents of a row, N documents of all batches.

An estimator is made once from an objective and a scope, which compiles its functions once::

    estimator = ekfac(objective, scope)
    state = estimator.fit(params, training_rows, key)            # a pytree of arrays
    prepared = estimator.queries(params, state, probe_rows, key)  # a pytree, K first everywhere
    scores_KBS = estimator.score(params, state, prepared, batch, key)  # one batch of documents

Scores are positive where a document is harmful (see `objective`), and 0 where there is no
document or it has no target. `score` here is the loop over batches; what scores at scale, from
disk or in parts, calls the three functions itself: nothing but ``params`` and ``state`` is kept
between calls, prepared queries may be cut and joined along K, and batches scored in any order.
Those of a *linear* estimator (all but cosine and Newton) may also be added and averaged along K.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch
from dh_jax.functions import Params
from dh_jax.influence.blame import refuse_scores
from dh_jax.influence.documents import target_counts
from dh_jax.influence.gradients import Blocks
from dh_jax.influence.objective import Data, Scope, checked, refuse_non_finite
from dh_jax.influence.per_document import PerDocument

State = Any  # a pytree of arrays, whatever the estimator keeps
Prepared = Any  # a pytree of arrays whose first axis is K

ENOUGH = 0.9  # of the parameters; below it a user is told


class CoverageWarning(UserWarning):
    """Influence is measured on too small a part of the parameters."""


class Estimator(NamedTuple):
    """See the head of this file. ``score`` is compiled; ``fit`` and ``queries`` loop over data.

    Where scores are inner products of gradients, ``door`` says whose, ``finish`` makes prepared
    queries of the queries' gradients (or of means of them), and ``by_token`` says what each
    target of a document adds to its score.
    """

    name: str
    scope: Scope
    fit: Callable[[Params, Data, jax.Array], State]
    queries: Callable[[Params, State, Data, jax.Array], Prepared]
    score: Callable[[Params, State, Prepared, Batch, jax.Array], jax.Array]  # (K, B, S)
    coverage: Callable[[Params], float]
    door: PerDocument | None = None
    finish: Callable[[Params, State, Blocks, jax.Array], Prepared] | None = None
    by_token: Callable[[Params, Prepared, Batch, jax.Array], jax.Array] | None = None  # (K, B, T)


class Scores(NamedTuple):
    """Scores of all documents that have a target, on the host, and where each one lies."""

    values_KN: np.ndarray  # float32 or float64; positive = harmful
    batch_N: np.ndarray  # int, number of the batch
    row_N: np.ndarray  # int
    segment_N: np.ndarray  # int, from 1, as in Batch.segment_ids_BT


def score(
    estimator: Estimator,
    params: Params,
    state: State,
    queries: Data,
    documents: Data,
    key: jax.Array,
) -> Scores:
    """Influence of every document of ``documents`` on every document of ``queries``.

    Raises:
        DataError: a query or a score is not finite (names batch, row and segment), or a row has
            more segments than the scope allows.
    """
    prepared = estimator.queries(params, state, queries, key)
    values, places = [], []
    for index, batch, batch_key in checked(documents, estimator.scope, key):

        def of_rows(rows: Batch, key: jax.Array = batch_key) -> jax.Array:
            return estimator.score(params, state, prepared, rows, key)

        scores_KBS = of_rows(batch)
        there_BS = has_target(batch, estimator.scope)
        refuse_scores(index, batch, scores_KBS, there_BS, of_rows)
        values.append(np.asarray(scores_KBS)[:, there_BS])
        rows, segments = np.nonzero(there_BS)
        places.append(np.stack([np.full_like(rows, index), rows, segments + 1]))
    return Scores(np.concatenate(values, axis=1), *np.concatenate(places, axis=1))


def has_target(batch: Batch, scope: Scope) -> np.ndarray:
    """(B, S) bool: documents with something to learn, in whose order results are flattened."""
    return np.asarray(target_counts(jax.tree.map(jnp.asarray, batch), scope.max_segments)) > 0


def gather_gradients(
    gradients: Callable[[Params, Batch, jax.Array], Blocks],
    scope: Scope,
    params: Params,
    data: Data,
    key: jax.Array,
) -> Blocks:
    """``(N, *shape)`` gradients of all documents with a target, for few of them.

    Args:
        gradients: `PerDocument.gradients`, compiled.
        scope: of the door.
        params: all parameters.
        data: batches of documents.
        key: random key, as the loss may use it.

    Raises:
        DataError: a gradient is not finite (names batch, row and segment).
    """
    found: list[Blocks] = []
    for index, batch, batch_key in checked(data, scope, key):
        each = gradients(params, batch, batch_key)
        squares = (jnp.square(g).sum(axis=range(2, g.ndim)) for g in each.values())
        size_BS = sum(squares, jnp.zeros(()))
        refuse_non_finite(index, "gradient", size_BS)
        there_BS = has_target(batch, scope)
        found.append({path: g[there_BS] for path, g in each.items()})
    return {path: jnp.concatenate([g[path] for g in found]) for path in found[0]}


def linear(
    name: str,
    door: PerDocument,
    scope: Scope,
    fit: Callable[[Params, Data, jax.Array], State],
    precondition: Callable[[Params, State, Blocks, jax.Array], Blocks],
) -> Estimator:
    """An estimator whose score is ``-<precondition(v), g_d>``, as most are."""

    gradients = jax.jit(door.gradients)

    def fit_told(params: Params, data: Data, key: jax.Array) -> State:
        warn_of_coverage(door.coverage(params))
        return fit(params, data, key)

    def queries(params: Params, state: State, data: Data, key: jax.Array) -> Blocks:
        return precondition(
            params, state, gather_gradients(gradients, scope, params, data, key), key
        )

    @jax.jit
    def products(params: Params, prepared: Blocks, batch: Batch, key: jax.Array) -> jax.Array:
        return -jnp.moveaxis(door.products(params, prepared, batch, key), -1, 0)

    def score_batch(
        params: Params, state: State, prepared: Blocks, batch: Batch, key: jax.Array
    ) -> jax.Array:
        del state  # its work is done
        return products(params, prepared, batch, key)

    @jax.jit
    def by_token(params: Params, prepared: Blocks, batch: Batch, key: jax.Array) -> jax.Array:
        return -jnp.moveaxis(door.by_token(params, prepared, batch, key), -1, 0)

    return Estimator(
        name, scope, fit_told, queries, score_batch, door.coverage, door, precondition, by_token
    )


def warn_of_coverage(share: float) -> None:
    """Say so where less than nine tenths of the parameters are looked at."""
    if share < ENOUGH:
        warnings.warn(
            f"influence is measured on {share:.0%} of the parameters, under {ENOUGH:.0%}: scores "
            "say nothing of the others (behind taps, a tied embedding is one of them); "
            "`parameters` (of a config: `estimator.parameters`) chooses what is measured",
            CoverageWarning,
            stacklevel=3,
        )
