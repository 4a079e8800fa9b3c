"""Solving with curvature known only by its products: conjugate gradients, Krylov spaces, Lanczos.

Shapes: K right-hand sides, N vectors of a basis; vectors are stacked blocks ``(K, *shape)``.

Everything here is written so that going on past convergence changes nothing: quotients whose
denominators have become rounding errors are replaced by 0, and directions that add nothing to a
basis are dropped, so that no NaN can arise from solving too well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.influence.gradients import Blocks

Map = Callable[[Blocks], Blocks]  # linear, of K stacked vectors


ROUNDING = 1000  # times the type's epsilon: a unit vector less than this new is not new


class Solution(NamedTuple):
    """An approximate solution of ``A x = b`` for K right-hand sides."""

    x: Blocks
    residual_K: np.ndarray  # |b - A x| / |b|; 0 where b is
    steps: int  # products with A


class Space(NamedTuple):
    """An orthonormal basis and what the matrix makes of it."""

    basis: Blocks  # (N, *shape)
    images: Blocks  # (N, *shape), the matrix times each


# --- conjugate gradients ---------------------------------------------------------------------


def conjugate_gradients(
    apply: Map, b: Blocks, precondition: Map, steps: int, tolerance: float
) -> Solution:
    """K independent preconditioned conjugate gradients that share their products.

    Hestenes & Stiefel 1952. Four vectors a side are kept. A side that has converged, or whose
    direction shows no positive curvature, stands still while the others go on.

    Args:
        apply: A, symmetric and positive semidefinite.
        b: right-hand sides.
        precondition: an approximate inverse of A, symmetric and positive definite.
        steps: at most so many products.
        tolerance: of the relative residual at which a side has converged.
    """
    size_K = _inner_each(b, b)
    x, r = jax.tree.map(jnp.zeros_like, b), b
    z = precondition(r)
    p, rho_K = z, _inner_each(r, z)
    done = 0
    # Below epsilon the recurrence's residual has parted from the true one: going on would follow
    # rounding errors, which grow again after a while (seen: 10^-19 up to 3 in 200 steps).
    floor_K = max(tolerance, float(jnp.finfo(_dtype(b)).eps)) ** 2 * size_K
    going_K = size_K > 0
    while done < steps and bool(going_K.any()):
        q = apply(p)
        done += 1
        alpha_K = jnp.where(going_K, _quotient(rho_K, _inner_each(p, q)), 0)
        x, r = _add(x, alpha_K, p), _add(r, -alpha_K, q)
        z = precondition(r)
        new_K = _inner_each(r, z)
        p, rho_K = _add(z, _quotient(new_K, rho_K), p), new_K
        going_K = going_K & (_inner_each(r, r) > floor_K)
    return Solution(x, _relative(r, size_K), done)


# --- one space for all right-hand sides ------------------------------------------------------


def block_krylov(
    apply: Map, b: Blocks, precondition: Map, shift: float, steps: int, tolerance: float
) -> Solution:
    """Block conjugate gradients: the best solution in the space that all sides span together.

    O'Leary 1980, with full orthogonalisation instead of recurrences: each step adds the
    preconditioned residuals to an orthonormal basis Q and solves ``(Q'AQ + shift) y = Q'b``. K
    sides learn from each other's products, so few steps are needed; the price is 2 K vectors of
    memory a step.

    Args:
        apply: A, symmetric and positive semidefinite.
        b: right-hand sides.
        precondition: an approximate inverse of ``A + shift I``, symmetric, positive definite.
        shift: at least 0.
        steps: at most so many products of K vectors each.
        tolerance: of the relative residual at which all sides have converged.
    """
    size_K = _inner_each(b, b)
    x, r = jax.tree.map(jnp.zeros_like, b), b
    space: Space | None = None
    done = 0
    while done < steps and (_relative(r, size_K) > tolerance).any():
        longer = extend(space, precondition(r), apply)
        if longer is None:  # the residuals are rounding errors of what is there already
            break
        space, done = longer, done + 1
        values_N, turns_NN = ritz(space)
        along_KN = np.asarray(_inner(b, space.basis), np.float64)
        y_KN = _solve_in_basis(along_KN, values_N + shift, turns_NN)
        weights_KN = jnp.asarray(y_KN, _dtype(b))
        x = _mix(weights_KN, space.basis)
        moved = _mix(weights_KN, space.images)
        r = jax.tree.map(lambda b, m, x: b - m - shift * x, b, moved, x)
    return Solution(x, _relative(r, size_K), done)


def lanczos(apply: Map, start: Blocks, steps: int) -> Space:
    """An orthonormal basis of the Krylov space of ``start``, fully orthogonalised (Lanczos 1950).

    Args:
        apply: A, symmetric.
        start: K vectors to start from.
        steps: products of K vectors; fewer where the space closes.
    """
    space = extend(None, start, apply)
    if space is None:
        raise ValueError("lanczos was started from zeros")
    for _ in range(steps - 1):
        newest = jax.tree.map(lambda x: x[-len(next(iter(start.values()))) :], space.images)
        longer = extend(space, newest, apply)
        if longer is None:
            break
        space = longer
    return space


def extend(space: Space | None, directions: Blocks, apply: Map) -> Space | None:
    """The space with new directions in it; None if they add nothing to it."""
    new = directions
    for _ in range(2):  # twice is enough (Giraud et al. 2005)
        length_K = _inner_each(new, new) ** 0.5
        new = _scale(_quotient(jnp.ones_like(length_K), length_K), new)
        if space is not None:
            new = _without(new, space.basis)
        # Orthonormal among themselves by the eigenvectors of their Gram matrix. What is left of
        # a dependent direction is rounding, and dropped.
        gram = np.asarray(_inner(new, new), np.float64)
        values, turns = np.linalg.eigh((gram + gram.T) / 2)
        kept = values > (ROUNDING * float(jnp.finfo(_dtype(new)).eps)) ** 2
        if not kept.any():
            return None
        weights = (turns[:, kept] / np.sqrt(values[kept])).T
        new = _mix(jnp.asarray(weights, _dtype(new)), new)
    images = apply(new)
    if space is None:
        return Space(new, images)
    return Space(*(_join(old, more) for old, more in zip(space, (new, images), strict=True)))


def ritz(space: Space) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of the matrix within the space, ascending, and their vectors in its basis."""
    inside = np.asarray(_inner(space.basis, space.images), np.float64)
    values, turns = np.linalg.eigh((inside + inside.T) / 2)
    return values.clip(min=0), turns


# --- stacked vectors -------------------------------------------------------------------------


def _dtype(blocks: Blocks) -> jnp.dtype:
    """The type that the vectors are computed in."""
    return next(iter(blocks.values())).dtype


@jax.jit
def _inner(a: Blocks, b: Blocks) -> jax.Array:
    """(K, N) inner products."""
    each = [
        jnp.matmul(x.reshape(len(x), -1), b[path].reshape(len(b[path]), -1).T, precision="highest")
        for path, x in a.items()
    ]
    return sum(each[1:], each[0])


@jax.jit
def _inner_each(a: Blocks, b: Blocks) -> jax.Array:
    """(K,) inner products of vectors with their likes."""
    each = [(x * b[path]).reshape(len(x), -1).sum(axis=1) for path, x in a.items()]
    return sum(each[1:], each[0])


@jax.jit
def _mix(weights_KN: jax.Array, basis: Blocks) -> Blocks:
    mixed: Blocks = jax.tree.map(
        lambda q: jnp.tensordot(weights_KN, q, axes=1, precision="highest"), basis
    )
    return mixed


@jax.jit
def _without(a: Blocks, basis: Blocks) -> Blocks:
    inner_KN = _inner(a, basis)
    apart: Blocks = jax.tree.map(lambda v, along: v - along, a, _mix(inner_KN, basis))
    return apart


@jax.jit
def _scale(weights_K: jax.Array, a: Blocks) -> Blocks:
    scaled: Blocks = jax.tree.map(lambda x: x * weights_K.reshape(-1, *[1] * (x.ndim - 1)), a)
    return scaled


@jax.jit
def _add(a: Blocks, weights_K: jax.Array, b: Blocks) -> Blocks:
    added: Blocks = jax.tree.map(jnp.add, a, _scale(weights_K, b))
    return added


def _join(a: Blocks, b: Blocks) -> Blocks:
    return {path: jnp.concatenate([x, b[path]]) for path, x in a.items()}


def _quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a / b`` where b is above 0 and the quotient is finite; 0 elsewhere."""
    quotient = a / jnp.where(b > 0, b, 1)
    return jnp.where((b > 0) & jnp.isfinite(quotient), quotient, 0)


def _solve_in_basis(b_KN: np.ndarray, values_N: np.ndarray, turns_NN: np.ndarray) -> np.ndarray:
    """``(V diag V')^-1 b``, without directions that have no curvature at all."""
    enough = values_N > values_N.max() * np.finfo(np.float64).eps
    inverse_N = np.where(enough, 1 / np.where(enough, values_N, 1), 0)
    return (b_KN @ turns_NN * inverse_N) @ turns_NN.T


def _relative(r: Blocks, size_K: jax.Array) -> np.ndarray:
    size = np.asarray(size_K) ** 0.5
    return np.asarray(_inner_each(r, r)) ** 0.5 / np.where(size > 0, size, 1)
