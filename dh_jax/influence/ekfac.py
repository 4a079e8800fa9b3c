"""K-FAC and EK-FAC: curvature by Kronecker factors of every tapped layer.

For a kernel with activations ``a`` and cotangents ``d`` (Martens & Grosse 2015, arXiv:1503.05671;
George et al. 2018, arXiv:1806.03884; influence by Grosse et al. 2023, arXiv:2308.03296)::

    A = E[a a'] = Q_A diag Q_A',   D = E[d d'] = Q_D diag Q_D'          first pass
    Lambda = (1/n) sum_d (Q_A' G_d Q_D)^2                               second pass
    H^-1 V = Q_A [(Q_A' V Q_D) / (Lambda + lambda)] Q_D'

with ``G_d`` the gradient of document d (summed over its tokens and the tensor's uses); K-FAC
takes the eigenvalues' outer product for Lambda. A runs over tokens, D is summed by document. A
bias is its kernel's last row, whose activation is 1. ``lambda`` is ``damping`` times the mean of
Lambda, tensor by tensor: 0.1 by default, never tuned on the answer. A table's activations are
one-hot, so their covariance is diagonal and its basis the ids themselves: no V x V matrix
exists. Scales, and biases that stand alone, have a diagonal.

Labels are drawn from the model, which makes it the exact Fisher in expectation, and both passes
see the same draws.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError, DataError
from dh_jax.functions import Params
from dh_jax.influence.chunks import chunks_and_keys, from_chunks, in_chunks
from dh_jax.influence.documents import spread, target_counts
from dh_jax.influence.estimator import Estimator, linear
from dh_jax.influence.fisher import Labels, label_source
from dh_jax.influence.gradients import Blocks
from dh_jax.influence.kronecker import (
    Covariance,
    Factors,
    correction,
    covariance,
    factor_of,
    preconditioned,
)
from dh_jax.influence.objective import (
    Data,
    Objective,
    Scope,
    check_scope,
    checked,
    refuse_non_finite,
)
from dh_jax.influence.per_document import tapped
from dh_jax.influence.taps import bias_paths, capture, tapped_paths

Sums = dict[str, Any]  # by path


def ekfac(
    objective: Objective,
    scope: Scope,
    *,
    damping: float = 0.1,
    labels: Labels = "sampled",
    samples: int = 1,
    strategy: Literal["ekfac", "kfac"] = "ekfac",
) -> Estimator:
    """EK-FAC (or K-FAC) influence by taps; its state is `kronecker.Factors`.

    Args:
        objective: with taps, and with ``logits`` unless labels are true.
        scope: which tensors, and what a document's loss is.
        damping: lambda of a tensor over the mean of its Lambda.
        labels: see `fisher.label_source`.
        samples: draws a target, of sampled labels.
        strategy: ``kfac`` leaves out the second pass.

    Raises:
        ConfigError: a number lies outside its range, or the objective lacks what is needed.
        DataError: (of its ``fit``) no document has a target to learn.
    """
    if not (math.isfinite(damping) and damping > 0):
        raise ConfigError(f"ekfac damping is {damping}; it must be finite and above 0")
    if strategy not in ("ekfac", "kfac"):
        raise ConfigError(f"ekfac strategy {strategy!r}; take 'ekfac' or 'kfac'")
    door = tapped(objective, check_scope(scope))
    draw = label_source(objective, scope, labels, samples)
    first_pass, second_pass = passes(objective, scope, door.blocks)
    biases = bias_paths(objective, scope)
    uses = Counter(layer.weight for layer in tapped_paths(objective, scope).values())

    def fit(params: Params, data: Data, key: jax.Array) -> Factors:
        drawn: list[list[tuple[np.ndarray, np.ndarray]]] = []
        sums: Sums = {}
        counts = np.zeros(2)
        for index, batch, batch_key in checked(data, scope, key):
            drawn.append(draw(params, batch, batch_key))
            for labelled in drawn[-1]:
                more, here, health_BS = first_pass(params, batch, *labelled, batch_key)
                refuse_non_finite(index, "loss or gradient", health_BS)
                sums = _add(sums, more) if sums else more
                counts += np.asarray(here) / (1, len(drawn[-1]))  # inputs are summed every time
        tokens, documents = map(float, counts)
        if not documents:
            raise DataError("no document has a target to learn; there is no curvature to fit")
        factors = {
            path: factor_of(total, tokens * uses[path], documents) for path, total in sums.items()
        }
        if strategy == "kfac":
            return factors
        squares: Sums = {}
        for (_, batch, batch_key), labellings in zip(checked(data, scope, key), drawn, strict=True):
            for labelled in labellings:
                more = second_pass(params, factors, batch, *labelled, batch_key)
                squares = _add(squares, more) if squares else more
        return {
            path: factor._replace(**{factor._fields[-1]: squares[path] / documents})
            for path, factor in factors.items()
        }

    @jax.jit
    def solve(factors: Factors, v: Blocks) -> Blocks:
        return preconditioned(factors, v, biases, damping)

    def precondition(params: Params, state: Factors, v: Blocks, key: jax.Array) -> Blocks:
        return solve(state, v)

    return linear(strategy, door, scope, fit, precondition)


@jax.jit
def _add(total: Sums, more: Sums) -> Sums:
    return jax.tree.map(jnp.add, total, more)


def passes(
    objective: Objective, scope: Scope, blocks_of: Callable[[Params], Blocks]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled sums of one batch with given labels, a chunk of rows at a time."""
    S = scope.max_segments

    def chunked(
        of_chunk: Callable[[Batch, jax.Array, jax.Array], tuple[Sums, jax.Array]],
        batch: Batch,
        targets_BT: jax.Array,
        weights_BT: jax.Array,
        key: jax.Array,
    ) -> tuple[Sums, jax.Array]:
        """Sums over the chunks, and what there is for every row."""
        labelled = batch._replace(targets_BT=targets_BT)
        rows = batch.tokens_BT.shape[0]
        chunks, keys_N = chunks_and_keys(labelled, scope.chunk, key)
        weights_NCT = in_chunks(weights_BT, scope.chunk)

        def visit(total: Sums, xs: tuple[Batch, jax.Array, jax.Array]) -> tuple[Sums, jax.Array]:
            more, of_rows = of_chunk(*xs)
            return jax.tree.map(jnp.add, total, more), of_rows

        xs = (chunks, weights_NCT, keys_N)
        shapes = jax.eval_shape(lambda xs: of_chunk(*jax.tree.map(lambda x: x[0], xs))[0], xs)
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        sums, of_rows = jax.lax.scan(visit, start, xs)
        return sums, from_chunks(of_rows, rows)

    @jax.jit
    def first_pass(
        params: Params, batch: Batch, targets_BT: jax.Array, weights_BT: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Covariance], jax.Array, jax.Array]:
        shapes = {path: block.shape for path, block in blocks_of(params).items()}

        def of_chunk(
            rows: Batch, weights_CT: jax.Array, chunk_key: jax.Array
        ) -> tuple[Sums, jax.Array]:
            seen = capture(
                objective, scope, params, rows, chunk_key, join_bias=True, label_weights=weights_CT
            )
            learnt_CS = (target_counts(rows, S) > 0).astype(scope.dtype)
            mask_CT = spread(learnt_CS, rows)
            sums = {
                path: covariance(part, mask_CT, rows, S, shapes[path])
                for path, part in seen.parts.items()
            }
            return sums | {"": jnp.stack([mask_CT.sum(), learnt_CS.sum()])}, seen.health_BS

        sums, health_BS = chunked(of_chunk, batch, targets_BT, weights_BT, key)
        return sums, sums.pop(""), health_BS

    @jax.jit
    def second_pass(
        params: Params,
        factors: Factors,
        batch: Batch,
        targets_BT: jax.Array,
        weights_BT: jax.Array,
        key: jax.Array,
    ) -> Sums:
        def of_chunk(
            rows: Batch, weights_CT: jax.Array, chunk_key: jax.Array
        ) -> tuple[Sums, jax.Array]:
            seen = capture(
                objective, scope, params, rows, chunk_key, join_bias=True, label_weights=weights_CT
            )
            squares = {
                path: correction(part, factors[path], rows, S) for path, part in seen.parts.items()
            }
            return squares, seen.health_BS

        return chunked(of_chunk, batch, targets_BT, weights_BT, key)[0]

    return first_pass, second_pass
