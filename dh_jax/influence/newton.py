"""Leave-one-out by one Newton step, for small models: the document's own curvature taken off.

Shapes: K queries, B rows, T tokens, S documents of a row, V outputs, P entries of all blocks.

At the minimum of ``sum_i l_i + (n ridge / 2) |theta|^2``, leaving out document d moves the
parameters, to second order, by ``(H - h_d)^-1 g_d`` (Rad & Maleki 2020, arXiv:1801.10243), H
the Hessian of the sum with d. Influence functions take H alone, which is too timid for documents
that weigh much. With logits' Jacobian J and the loss's Hessian M in the logits, ``h_d = J' M J``
and Woodbury's identity needs a T V x T V system only::

    (H - J' M J)^-1 = H^-1 + H^-1 J' (I - M J H^-1 J')^-1 M J H^-1

H is the Gauss-Newton matrix, which is the Hessian wherever logits are linear in the parameters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError, DataError
from dh_jax.functions import Params
from dh_jax.influence.documents import target_weights
from dh_jax.influence.estimator import (
    Estimator,
    gather_gradients,
    has_target,
    warn_of_coverage,
)
from dh_jax.influence.gradients import select
from dh_jax.influence.objective import Data, Objective, Scope, checked
from dh_jax.influence.per_document import plain
from dh_jax.influence.products import accumulated, batch_product

MOST = 8192  # parameters whose dense curvature is still reasonable
COLUMNS = 128  # of the curvature, found at a time


class Inverse(NamedTuple):
    """Of the curvature summed over all fitted documents."""

    inverse_PP: jax.Array


def newton_step(objective: Objective, scope: Scope, *, ridge: float = 0.0) -> Estimator:
    """One Newton step towards the model without the document, for models of few parameters.

    Unlike other estimators' scores, these are in nats of the query's loss, for one document. The
    documents that are scored must be among the fitted ones.

    Args:
        objective: with ``logits``.
        scope: which gradients.
        ridge: of the objective that was minimised, for a mean document (see above); part of the
            model, not a damping.

    Raises:
        ConfigError: the objective has no ``logits``, ``ridge`` is negative; at fitting, there
            are more parameters than `MOST`.
    """
    logits = objective.logits
    if logits is None:
        raise ConfigError("newton_step needs Objective.logits, the model's LogitsFn")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ConfigError(f"newton_step ridge is {ridge}; it must be finite and at least 0")
    door = plain(objective, scope)
    gradients = jax.jit(door.gradients)
    product = batch_product(objective, scope, "gauss_newton")
    S = scope.max_segments

    def fit(params: Params, data: Data, key: jax.Array) -> Inverse:
        warn_of_coverage(door.coverage(params))
        flat_P, unravel = ravel_pytree(select(params, scope.parameters).blocks)
        size = flat_P.size
        if size > MOST:
            raise ConfigError(
                f"newton_step inverts a dense matrix of {size:,} parameters, above {MOST:,}; "
                "select fewer, or take conjugate_gradient"
            )
        batches = list(data)
        documents = sum(int(has_target(b, scope).sum()) for _, b, _ in checked(batches, scope, key))
        apply = accumulated(product, scope, params, batches, key)
        eye_PP = jnp.eye(size, dtype=scope.dtype)
        columns = [
            jax.vmap(lambda v: ravel_pytree(v)[0])(
                apply(jax.vmap(unravel)(eye_PP[i : i + COLUMNS]))
            )
            for i in range(0, size, COLUMNS)
        ]
        matrix = documents * np.concatenate(columns).astype(np.float64)
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        # The curvature has no negative values but by rounding; the ridge is known exactly.
        noise = values[-1] * size * np.finfo(scope.dtype).eps
        values = values.clip(min=0) + documents * ridge
        if not values[-1] > 0:
            raise DataError(f"the largest curvature is {values[-1]}; there is nothing to invert")
        # Without a ridge, directions that no logit depends on can only be told by their noise.
        # They have no gradient either, and are left alone. A ridge makes every direction sound,
        # and a cut would take weak ones, that do have a gradient, along with those.
        enough = values > (0 if ridge else noise)
        inverse = (vectors[:, enough] / values[enough]) @ vectors[:, enough].T
        return Inverse(jnp.asarray(inverse, scope.dtype))

    def queries(params: Params, state: Inverse, data: Data, key: jax.Array) -> jax.Array:
        """(K, P) plain gradients: the step depends on the document."""
        v = gather_gradients(gradients, scope, params, data, key)
        return jax.vmap(lambda x: ravel_pytree(x)[0])(v)

    @jax.jit
    def score(
        params: Params, state: Inverse, prepared: jax.Array, batch: Batch, key: jax.Array
    ) -> jax.Array:
        selection = select(params, scope.parameters)
        flat_P, unravel = ravel_pytree(selection.blocks)
        weights_BT = target_weights(batch, S, scope.reduction, flat_P.dtype)
        g_BSP = jax.vmap(jax.vmap(lambda g: ravel_pytree(g)[0]))(door.gradients(params, batch, key))

        def of_row(args: tuple[Batch, jax.Array, jax.Array]) -> jax.Array:
            row, weights_T, g_SP = args
            one = jax.tree.map(lambda x: x[None], row)

            def outputs(flat_P: jax.Array) -> jax.Array:
                return logits(selection.merge(unravel(flat_P)), one)[0]

            z_TV = outputs(flat_P)
            T, V = z_TV.shape
            J = jax.jacrev(outputs)(flat_P).reshape(T * V, -1)

            def losses(z_TV: jax.Array) -> jax.Array:
                return objective.logits_loss(z_TV[None], one)[0]

            def bend(t: jax.Array) -> jax.Array:  # a token's loss depends on its logits alone
                return jax.hessian(lambda z_V: losses(z_TV.at[t].set(z_V))[t])(z_TV[t])

            M_TVV = jax.vmap(bend)(jnp.arange(T)) * weights_T[:, None, None]
            JA = jnp.matmul(J, state.inverse_PP, precision="highest")  # J H^-1
            W = jnp.matmul(JA, J.T, precision="highest")

            def step(s: jax.Array, g_P: jax.Array) -> jax.Array:
                own_T = row.segment_ids_BT == s + 1
                M = jax.scipy.linalg.block_diag(*(M_TVV * own_T[:, None, None]))
                a_P = state.inverse_PP @ g_P
                inner = jnp.eye(T * V, dtype=W.dtype) - M @ W
                return a_P + JA.T @ jnp.linalg.solve(inner, M @ (J @ a_P))

            moved_SP = jax.vmap(step)(jnp.arange(S), g_SP)
            return -jnp.einsum("kp,sp->ks", prepared, moved_SP, precision="highest")

        scores_BKS = jax.lax.map(of_row, (batch, weights_BT, g_BSP))
        return scores_BKS.swapaxes(0, 1)

    return Estimator("newton_step", scope, fit, queries, score, door.coverage)
