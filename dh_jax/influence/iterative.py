"""Estimators by products with the curvature alone: conjugate gradients, Lanczos, LiSSA.

Shapes: K queries, P entries of all blocks.

They solve ``(H + lambda I) q = v`` for the queries' gradients, H the Gauss-Newton matrix of the
fitted documents unless said otherwise. ``lambda`` is ``damping`` (0.1) times the mean eigenvalue
of H, that is its trace over P: from the preconditioner's factors where there is one, else by
Hutchinson's estimate from 16 sign vectors. Their states keep the fitted batches, which are needed
again at every query.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError, DataError
from dh_jax.functions import Params
from dh_jax.influence.estimator import Estimator, linear
from dh_jax.influence.gradients import Blocks
from dh_jax.influence.kronecker import Factors, preconditioned
from dh_jax.influence.krylov import block_krylov, conjugate_gradients, lanczos, ritz
from dh_jax.influence.objective import Data, Objective, Scope
from dh_jax.influence.per_document import PerDocument, per_document
from dh_jax.influence.products import BatchProduct, Curvature, accumulated, batch_product
from dh_jax.influence.taps import bias_paths, exact_pattern

PROBES = 16  # sign vectors of Hutchinson's estimate
MARGIN = 1.1  # Lanczos approaches the largest eigenvalue from below


class Fitted(NamedTuple):
    """What solving needs."""

    batches: tuple[Batch, ...]  # the fitted rows
    shift: jax.Array  # lambda
    factors: Factors | None  # the preconditioner's


def conjugate_gradient(
    objective: Objective,
    scope: Scope,
    *,
    damping: float = 0.1,
    steps: int = 20,
    tolerance: float = 1e-3,
    curvature: Curvature = "gauss_newton",
    preconditioner: Estimator | None = None,
    block: bool = True,
) -> Estimator:
    """Exact influence of a convex approximation, as far as ``steps`` products go.

    Args:
        objective: with ``logits`` for the Gauss-Newton matrix; taps are used where there are some.
        scope: which gradients.
        damping: lambda over the mean eigenvalue.
        steps: products a query block; each goes through all fitted batches.
        tolerance: of the relative residual, at which solving stops.
        curvature: see `products`; the Hessian is not positive, and meets no promise here.
        preconditioner: an `ekfac` estimator of the same objective and scope; a handful of steps
            then does what takes dozens.
        block: one Krylov space for all queries (`krylov.block_krylov`) instead of one each.

    Raises:
        ConfigError: a number lies outside its range, or the objective lacks what is needed.
    """
    _check(damping, steps)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(f"tolerance is {tolerance}; it must be finite and at least 0")
    door, product, scope = _pieces(objective, scope, curvature)
    fit = _fit(door, product, scope, damping, preconditioner)
    biases = bias_paths(objective, scope) if preconditioner else {}

    def solve(params: Params, state: Fitted, v: Blocks, key: jax.Array) -> Blocks:
        apply = accumulated(product, scope, params, state.batches, key)
        shift = float(state.shift)

        def shifted(x: Blocks) -> Blocks:
            return {path: y + shift * x[path] for path, y in apply(x).items()}

        def inverse(r: Blocks) -> Blocks:
            if state.factors is None:
                return r
            return _preconditioned(state.factors, r, state.shift, tuple(biases.items()))

        if block:
            return block_krylov(apply, v, inverse, shift, steps, tolerance).x
        return conjugate_gradients(shifted, v, inverse, steps, tolerance).x

    return linear("conjugate_gradient", door, scope, fit, solve)


class LowRank(NamedTuple):
    """The leading part of the curvature's spectrum."""

    vectors: Blocks  # (N, *shape), orthonormal
    values_N: jax.Array
    shift: jax.Array  # lambda


def low_rank(
    objective: Objective,
    scope: Scope,
    *,
    rank: int = 32,
    damping: float = 0.1,
    curvature: Curvature = "gauss_newton",
) -> Estimator:
    """Influence by the leading eigenvectors, found once for all queries (Schioppa et al. 2022,
    arXiv:2112.03052); the rest of the space has curvature lambda alone.

    Args:
        objective: with ``logits`` for the Gauss-Newton matrix.
        scope: which gradients.
        rank: Lanczos steps from one random vector, and so vectors kept.
        damping: lambda over the mean eigenvalue.
        curvature: see `products`.

    Raises:
        ConfigError: a number lies outside its range, or the objective lacks what is needed.
    """
    _check(damping, rank)
    door, product, scope = _pieces(objective, scope, curvature)
    fit_shift = _fit(door, product, scope, damping, None)

    def fit(params: Params, data: Data, key: jax.Array) -> LowRank:
        fitted = fit_shift(params, data, key)
        apply = accumulated(product, scope, params, fitted.batches, key)
        space = lanczos(apply, _signs(door.blocks(params), 1, scope, key), rank)
        values_N, turns_NN = ritz(space)
        dtype = jnp.dtype(scope.dtype)
        turned = jnp.asarray(turns_NN.T, dtype)
        vectors = {
            p: jnp.tensordot(turned, q[: space.filled], axes=1) for p, q in space.basis.items()
        }
        return LowRank(vectors, jnp.asarray(values_N, dtype), fitted.shift)

    @jax.jit
    def solve(state: LowRank, v: Blocks) -> Blocks:
        each = [
            jnp.einsum("kp,np->kn", _flat(x), _flat(state.vectors[p]), precision="highest")
            for p, x in v.items()
        ]
        # 1 / (value + shift) inside, 1 / shift outside
        change_N = 1 / (state.values_N + state.shift) - 1 / state.shift
        weights_KN = sum(each[1:], each[0]) * change_N
        return {
            p: x / state.shift
            + jnp.tensordot(weights_KN, state.vectors[p], axes=1, precision="highest")
            for p, x in v.items()
        }

    return linear("low_rank", door, scope, fit, lambda params, state, v, key: solve(state, v))


class LissaState(NamedTuple):
    """What the series needs."""

    batches: tuple[Batch, ...]
    shift: jax.Array  # lambda
    scale: jax.Array  # s


def lissa(
    objective: Objective,
    scope: Scope,
    *,
    damping: float = 0.1,
    steps: int = 100,
    scale: float | None = None,
    curvature: Curvature = "gauss_newton",
) -> Estimator:
    """Neumann's series, ``r <- v + (I - (H + lambda I) / s) r``, ending in ``r / s``.

    Agarwal et al. 2017 (arXiv:1602.03943), Koh & Liang 2017 (arXiv:1703.04730). It converges only
    for ``s`` above the largest eigenvalue of ``H + lambda I``, which Lanczos measures at fitting.
    Every step goes through all fitted batches: with one batch a step the series' noise outweighs
    what it saves, and `conjugate_gradient` needs far fewer steps than either.

    Args:
        objective: with ``logits`` for the Gauss-Newton matrix.
        scope: which gradients.
        damping: lambda over the mean eigenvalue.
        steps: terms of the series.
        scale: s; None takes 1.1 times the measured eigenvalue.
        curvature: see `products`.

    Raises:
        ConfigError: a number lies outside its range; at fitting, ``scale`` is too small.
    """
    _check(damping, steps)
    door, product, scope = _pieces(objective, scope, curvature)
    fit_shift = _fit(door, product, scope, damping, None)

    def fit(params: Params, data: Data, key: jax.Array) -> LissaState:
        batches, shift, _ = fit_shift(params, data, key)
        apply = accumulated(product, scope, params, batches, key)
        space = lanczos(apply, _signs(door.blocks(params), 1, scope, key), 12)
        largest = float(ritz(space)[0][-1]) + float(shift)
        if scale is not None and scale <= largest:
            raise ConfigError(
                f"lissa scale is {scale}, not above the largest eigenvalue {largest:.3g}, so the "
                f"series would diverge; take {MARGIN * largest:.3g} or more, or leave it out"
            )
        chosen = MARGIN * largest if scale is None else scale
        return LissaState(batches, shift, jnp.asarray(chosen, scope.dtype))

    def solve(params: Params, state: LissaState, v: Blocks, key: jax.Array) -> Blocks:
        apply = accumulated(product, scope, params, state.batches, key)
        r = v
        for _ in range(steps):
            r = _series(v, r, apply(r), state.shift, state.scale)
        return {p: x / state.scale for p, x in r.items()}

    return linear("lissa", door, scope, fit, solve)


@jax.jit
def _series(v: Blocks, r: Blocks, moved: Blocks, shift: jax.Array, scale: jax.Array) -> Blocks:
    return {p: v[p] + x - (moved[p] + shift * x) / scale for p, x in r.items()}


# --- what they share -------------------------------------------------------------------------


def _pieces(
    objective: Objective, scope: Scope, curvature: Curvature
) -> tuple[PerDocument, BatchProduct, Scope]:
    """The door, the product over the same tensors, and the scope of both."""
    door = per_document(objective, scope)
    if objective.tapped is not None:  # curvature of what is tapped, and of nothing else
        scope = scope._replace(parameters=exact_pattern(objective, scope))
    return door, batch_product(objective, scope, curvature), scope


def _fit(
    door: PerDocument,
    product: BatchProduct,
    scope: Scope,
    damping: float,
    preconditioner: Estimator | None,
) -> Callable[[Params, Data, jax.Array], Fitted]:
    def fit(params: Params, data: Data, key: jax.Array) -> Fitted:
        batches = tuple(data)
        blocks = door.blocks(params)
        size = sum(block.size for block in blocks.values())
        factors: Factors | None = None
        if preconditioner is not None:
            factors = preconditioner.fit(params, batches, key)
            trace = sum(float(jnp.sum(factor[-1])) for factor in factors.values())
        else:
            signs = _signs(blocks, PROBES, scope, key)
            moved = accumulated(product, scope, params, batches, key)(signs)
            trace = sum(float(jnp.vdot(x, moved[p])) for p, x in signs.items()) / PROBES
        if not (math.isfinite(trace) and trace > 0):
            raise DataError(
                f"the curvature's trace is {trace}; it must be finite and above 0: the documents "
                "have nothing to learn, or their losses are not finite"
            )
        return Fitted(batches, jnp.asarray(damping * trace / size, scope.dtype), factors)

    return fit


@partial(jax.jit, static_argnums=3)
def _preconditioned(
    factors: Factors, r: Blocks, shift: jax.Array, biases: tuple[tuple[str, str], ...]
) -> Blocks:
    return preconditioned(factors, r, dict(biases), shift=shift)


def _signs(blocks: Blocks, count: int, scope: Scope, key: jax.Array) -> Blocks:
    keys = jax.random.split(key, len(blocks))
    return {
        path: jax.random.rademacher(k, (count, *block.shape), scope.dtype)
        for (path, block), k in zip(blocks.items(), keys, strict=True)
    }


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1)


def _check(damping: float, steps: int) -> None:
    if not (math.isfinite(damping) and damping > 0):
        raise ConfigError(f"damping is {damping}; it must be finite and above 0")
    if steps < 1:
        raise ConfigError(f"steps (or rank) is {steps}; the least is 1")
