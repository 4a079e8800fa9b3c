"""Estimators that keep the fitted documents' gradients: DataInf and Woodbury's exact inverse.

Shapes: N fitted documents, K queries, P entries of all blocks.

Both invert a damped empirical Fisher matrix, ``lambda I + (1/n) sum_i g_i g_i'``:

- `woodbury` exactly, over all tensors together (Woodbury's identity, ``G`` the N x P gradients)::

      H^-1 v = (1/lambda) (v - G' (n lambda I + G G')^-1 G v)

- `datainf` tensor by tensor, exchanging the mean and the inverse (see `dh_jax.influence.datainf`,
  whose calculator does the same for rows at less memory, as the trainer wants it).

``lambda`` is ``damping`` (0.1) times the mean squared entry of the fitted gradients, which is
the mean eigenvalue of the undamped matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError, DataError
from dh_jax.functions import Params
from dh_jax.influence.estimator import Estimator, gather_gradients, linear
from dh_jax.influence.gradients import Blocks
from dh_jax.influence.objective import Data, Objective, Scope, checked
from dh_jax.influence.per_document import PerDocument, per_document

MAX_BYTES = 1 << 31  # of the fitted documents' gradients


class WoodburyState(NamedTuple):
    """The gradients, and the small matrix's inverse in its own eigenbasis."""

    gradients: Blocks  # (N, *shape)
    damping: jax.Array  # lambda
    vectors_NN: jax.Array  # eigenvectors of G G'
    inverse_N: jax.Array  # 1 / (n lambda + eigenvalue)


def woodbury(
    objective: Objective, scope: Scope, *, damping: float = 0.1, max_bytes: int = MAX_BYTES
) -> Estimator:
    """The exact damped empirical Fisher, for few documents.

    Args:
        objective: any; taps are used where there are some.
        scope: which gradients.
        damping: lambda over the mean squared entry of a gradient.
        max_bytes: the fitted gradients may fill at most this much.

    Raises:
        ConfigError: damping lies outside its range; at fitting, gradients would not fit.
        DataError: at fitting, a gradient is not finite, or none is there.
    """
    _check(damping)
    door = per_document(objective, scope)
    gradients = jax.jit(door.gradients)

    def fit(params: Params, data: Data, key: jax.Array) -> WoodburyState:
        g = fitted_gradients(door, gradients, scope, params, data, key, max_bytes)
        gram_NN = _gram(g)
        n, size = len(gram_NN), sum(x[0].size for x in g.values())
        # The small matrix on the host in float64: it is n x n, and lambda may be tiny beside it.
        values_N, vectors_NN = np.linalg.eigh(np.asarray(gram_NN, np.float64))
        values_N = values_N.clip(min=0)
        level = damping * values_N.sum() / (n * size)
        if level == 0:
            raise DataError("all fitted gradients vanish; there is no curvature to invert")
        inverse_N = 1 / (n * level + values_N)
        dtype = gram_NN.dtype
        return WoodburyState(g, *(jnp.asarray(x, dtype) for x in (level, vectors_NN, inverse_N)))

    @jax.jit
    def solve(state: WoodburyState, v: Blocks) -> Blocks:
        products_KN = sum(
            jnp.einsum("kp,np->kn", _flat(v[p]), _flat(g), precision="highest")
            for p, g in state.gradients.items()
        )
        along_KN = jnp.matmul(products_KN, state.vectors_NN, precision="highest")
        weights_KN = jnp.matmul(along_KN * state.inverse_N, state.vectors_NN.T, precision="highest")
        return {
            p: (v[p] - jnp.tensordot(weights_KN, g, axes=1, precision="highest")) / state.damping
            for p, g in state.gradients.items()
        }

    return linear("woodbury", door, scope, fit, lambda params, state, v, key: solve(state, v))


class DataInfFit(NamedTuple):
    """The gradients, and what the formula needs of each."""

    gradients: Blocks  # (N, *shape)
    damping: Blocks  # lambda_l, scalars
    divisors_N: Blocks  # lambda_l + |g_il|^2


def datainf(
    objective: Objective, scope: Scope, *, damping: float = 0.1, max_bytes: int = MAX_BYTES
) -> Estimator:
    """DataInf (Kwon et al. 2023, arXiv:2310.00902) over documents, for any number of queries.

    A tensor whose fitted gradients all vanish is left out, as LoRA's first factor at its start.

    Args:
        objective: any; taps are used where there are some.
        scope: which gradients.
        damping: lambda of a tensor over the mean squared entry of its gradients.
        max_bytes: the fitted gradients may fill at most this much.

    Raises:
        ConfigError: damping lies outside its range; at fitting, gradients would not fit.
        DataError: at fitting, a gradient is not finite, or none is there.
    """
    _check(damping)
    door = per_document(objective, scope)
    gradients = jax.jit(door.gradients)

    def fit(params: Params, data: Data, key: jax.Array) -> DataInfFit:
        g = fitted_gradients(door, gradients, scope, params, data, key, max_bytes)
        squares_N = {p: jnp.square(_flat(x)).sum(axis=1) for p, x in g.items()}
        level = {p: damping * s.mean() / g[p][0].size for p, s in squares_N.items()}
        return DataInfFit(g, level, {p: level[p] + s for p, s in squares_N.items()})

    @jax.jit
    def solve(state: DataInfFit, v: Blocks) -> Blocks:
        return {p: _swapped(v[p], *(field[p] for field in state)) for p in state.gradients}

    return linear("datainf", door, scope, fit, lambda params, state, v, key: solve(state, v))


def fitted_gradients(
    door: PerDocument,
    gradients: Callable[[Params, Batch, jax.Array], Blocks],
    scope: Scope,
    params: Params,
    data: Data,
    key: jax.Array,
    max_bytes: int,
) -> Blocks:
    """(N, *shape) gradients of all documents, refused before they are computed if too many."""
    documents = sum(
        int(np.asarray(batch.segment_ids_BT).max(axis=1).sum())
        for _, batch, _ in checked(data, scope, key)
    )
    entries = sum(block.size for block in door.blocks(params).values())
    size = documents * entries * np.dtype(scope.dtype).itemsize
    if size > max_bytes:
        raise ConfigError(
            f"gradients of {documents} documents in {entries} parameters take {size:,} bytes, "
            f"above max_bytes {max_bytes:,}; fit on fewer documents, select fewer `parameters`, "
            "or take ekfac or a projection"
        )
    return gather_gradients(gradients, scope, params, data, key)


def _swapped(
    v: jax.Array, gradients: jax.Array, damping: jax.Array, divisors_N: jax.Array
) -> jax.Array:
    """``(1/lambda) (v - (1/n) sum_i g_i (g_i . v) / (lambda + |g_i|^2))`` of one tensor."""
    products_KN = jnp.einsum("kp,np->kn", _flat(v), _flat(gradients), precision="highest")
    weights_KN = products_KN * _inverse(divisors_N) / len(gradients)
    shrunk = v - jnp.tensordot(weights_KN, gradients, axes=1, precision="highest")
    return shrunk * _inverse(damping)


def _gram(gradients: Blocks) -> jax.Array:
    products = [jnp.matmul(_flat(g), _flat(g).T, precision="highest") for g in gradients.values()]
    return sum(products[1:], products[0])


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1)


def _inverse(x: jax.Array) -> jax.Array:
    """``1 / x``, or 0 where x is 0 or has no reciprocal."""
    small = x < jnp.finfo(x.dtype).tiny
    return jnp.where(small, 0, 1 / jnp.where(small, 1, x))


def _check(damping: float) -> None:
    if not (math.isfinite(damping) and damping > 0):
        raise ConfigError(f"damping is {damping}; it must be finite and above 0")
