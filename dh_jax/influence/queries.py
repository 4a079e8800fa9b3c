"""Queries at scale: prepared in blocks, or as the mean of a group, so that memory is bounded.

Shapes: K queries, B rows, S documents of a row, P groups of queries.

`Estimator.queries` holds a gradient of every query at once. `prepare` goes through the data one
batch after another and joins what each gives along K. `prepare_means` makes one query of a whole
group, as "everything in this probe": the gradient of its mean loss, or where an estimator has no
gradients in the parameters' space, the mean of its prepared queries. Since scores are linear in
prepared queries, the latter is the mean of the queries' scores; so is the former for every
estimator but the cosine, which compares with the mean gradient instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch
from dh_jax.errors import DataError
from dh_jax.functions import Params
from dh_jax.influence.estimator import Estimator, Prepared, State, has_target
from dh_jax.influence.gradients import Blocks
from dh_jax.influence.objective import Data, Scope, checked, refuse_non_finite
from dh_jax.influence.per_document import PerDocument


def prepare(
    estimator: Estimator, params: Params, state: State, queries: Data, key: jax.Array
) -> Prepared:
    """`Estimator.queries`, a batch at a time: never more than one batch's gradients at once.

    Block solvers (`conjugate_gradient` with ``block``) see the queries of one batch together, so
    for them the size of a batch is part of the method; all others give the same either way.

    Returns:
        Prepared queries of all documents with a target, K first.
    """
    blocks = [
        estimator.queries(params, state, [batch], key)  # one key: solvers draw labels by it
        for _, batch, _ in checked(queries, estimator.scope, key)
    ]
    return join(blocks)


def prepare_means(
    estimator: Estimator, params: Params, state: State, groups: Sequence[Data], key: jax.Array
) -> Prepared:
    """One query a group, K = P: all of its documents count alike.

    Raises:
        DataError: a group has no document with a target, or a gradient is not finite.
    """
    if estimator.door is not None and estimator.finish is not None:
        means = mean_gradients(estimator.door, estimator.scope, params, groups, key)
        return estimator.finish(params, state, means, key)
    prepared = (prepare(estimator, params, state, group, key) for group in groups)
    return join([jax.tree.map(lambda x: x.mean(axis=0, keepdims=True), p) for p in prepared])


def mean_gradients(
    door: PerDocument, scope: Scope, params: Params, groups: Sequence[Data], key: jax.Array
) -> Blocks:
    """(P, *shape) the mean gradient of each group's documents: one sum at a time in memory.

    Raises:
        DataError: a group has no document with a target, or a gradient is not finite.
    """

    @jax.jit
    def total(params: Params, batch: Batch, there_BS: jax.Array, key: jax.Array) -> Blocks:
        weights = dict.fromkeys(door.blocks(params), there_BS[None])
        return door.combine(params, weights, batch, key)

    health = jax.jit(door.health)  # compiled only where something is wrong

    def mean(data: Data) -> Blocks:
        summed: Blocks = {}
        documents = 0
        for index, batch, batch_key in checked(data, scope, key):
            there_BS = has_target(batch, scope)
            documents += int(there_BS.sum())
            more = total(params, batch, jnp.asarray(there_BS, scope.dtype), batch_key)
            if not all(bool(jnp.isfinite(x).all()) for x in more.values()):
                refuse_non_finite(index, "gradient", health(params, batch, batch_key))
                raise DataError(f"batch {index}: the sum of its gradients is not finite")
            summed = _add(summed, more) if summed else more
        if not documents:
            raise DataError("its group has no document with a target to learn")
        return {path: x / documents for path, x in summed.items()}

    found = []
    for number, group in enumerate(groups, 1):
        try:
            found.append(mean(group))
        except DataError as error:
            raise DataError(f"query {number} of {len(groups)}: {error}") from error
    return join(found)


@jax.jit
def _add(total: Blocks, more: Blocks) -> Blocks:
    return jax.tree.map(jnp.add, total, more)


def join(blocks: Sequence[Prepared]) -> Prepared:
    """Prepared queries of several blocks as one, along K."""
    if len(blocks) == 1:
        return blocks[0]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *blocks)
