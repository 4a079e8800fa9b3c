"""Solving with curvature known only by its products: conjugate gradients, Krylov spaces, Lanczos.

Shapes: K right-hand sides, N vectors of a basis and room for M; vectors are stacked blocks
``(K, *shape)``.

Everything here is written so that going on past convergence changes nothing: quotients whose
denominators have become rounding errors are replaced by 0, and directions that add nothing to a
basis are dropped, so that no NaN can arise from solving too well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.distributed.mesh import to_host
from dh_jax.influence.gradients import Blocks

Map = Callable[[Blocks], Blocks]  # linear, of K stacked vectors


ROUNDING = 1000  # times the type's epsilon: a unit vector less than this new is not new


class Solution(NamedTuple):
    """An approximate solution of ``A x = b`` for K right-hand sides."""

    x: Blocks
    residual_K: np.ndarray  # |b - A x| / |b|; 0 where b is
    steps: int  # products with A


class Space(NamedTuple):
    """An orthonormal basis and what the matrix makes of it.

    There is room for all vectors from the start, so that every step runs the same programs; the
    places from ``filled`` on are 0, and nobody computes with more of them than fill up a block.
    """

    basis: Blocks  # (M, *shape), the first N of which are orthonormal
    images: Blocks  # (M, *shape), the matrix times each
    inside_MM: np.ndarray  # float64, basis times images
    filled: int  # N


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
    sides learn from each other's products, so few steps are needed; the price is memory for 2 K
    vectors a step, set aside at the start (at most for twice all dimensions).

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
    space = empty_space(b, steps)
    along_KM = np.zeros((len(size_K), len(space.inside_MM)))
    done = 0
    while done < steps and (_relative(r, size_K) > tolerance).any():
        longer = extend(space, precondition(r), apply)
        if longer is None:  # the residuals are rounding errors of what is there already
            break
        old, new = space.filled, longer.filled
        space, done = longer, done + 1
        fresh = _window(space.basis, old, len(size_K))
        along_KM[:, old:new] = to_host(_inner(b, fresh))[:, : new - old]
        values_N, turns_NN = ritz(space)
        y_KM = np.zeros_like(along_KM)
        y_KM[:, :new] = _solve_in_basis(along_KM[:, :new], values_N + shift, turns_NN)
        weights_KM = jnp.asarray(y_KM, _dtype(b))
        x = _mix(weights_KM, space.basis, new)
        r = _residual(b, _mix(weights_KM, space.images, new), shift, x)
    return Solution(x, _relative(r, size_K), done)


def lanczos(apply: Map, start: Blocks, steps: int) -> Space:
    """An orthonormal basis of the Krylov space of ``start``, fully orthogonalised (Lanczos 1950).

    Args:
        apply: A, symmetric.
        start: K vectors to start from.
        steps: products of K vectors; fewer where the space closes.
    """
    space = extend(empty_space(start, steps), start, apply)
    if space is None:
        raise ValueError("lanczos was started from zeros")
    for _ in range(steps - 1):
        K = _count(start)
        longer = extend(space, _window(space.images, max(space.filled - K, 0), K), apply)
        if longer is None:
            break
        space = longer
    return space


def empty_space(like: Blocks, steps: int) -> Space:
    """Room for ``steps`` times as many vectors as there are in ``like``; never for many more than
    there are dimensions."""
    K, size = _count(like), sum(x[0].size for x in like.values())
    M = K * -(-min(steps * K, size + K) // K)

    def room() -> Blocks:
        return {path: jnp.zeros((M, *x.shape[1:]), x.dtype) for path, x in like.items()}

    return Space(room(), room(), np.zeros((M, M)), 0)


def extend(space: Space, directions: Blocks, apply: Map) -> Space | None:
    """The space with new directions in it; None if they add nothing to it.

    The old space's arrays are written over: go on with the new one alone.
    """
    K, N = _count(directions), space.filled
    if sum(x[0].size for x in directions.values()) <= N:  # all dimensions are there
        return None
    new = directions
    for _ in range(2):  # twice is enough (Giraud et al. 2005)
        new, gram_KK = _apart(new, space.basis, N)
        # Orthonormal among themselves by the eigenvectors of their Gram matrix. What is left of
        # a dependent direction is rounding, and dropped: its place is 0, after the others.
        gram = to_host(gram_KK).astype(np.float64)
        values_K, turns_KK = np.linalg.eigh((gram + gram.T) / 2)
        kept_K = values_K > (ROUNDING * float(jnp.finfo(_dtype(new)).eps)) ** 2
        count = int(kept_K.sum())
        if not count:
            return None
        weights_KK = np.zeros((K, K))
        weights_KK[:count] = (turns_KK[:, kept_K] / np.sqrt(values_K[kept_K])).T
        new = _turn(jnp.asarray(weights_KK, _dtype(new)), new)
    image = apply(new)
    basis, images = _write(space.basis, new, N), _write(space.images, image, N)
    filled = N + count
    rows_KN = to_host(_along(image, basis, filled))[:count, :filled]
    space.inside_MM[N:filled, :filled] = rows_KN
    space.inside_MM[:filled, N:filled] = rows_KN.T
    return Space(basis, images, space.inside_MM, filled)


def ritz(space: Space) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of the matrix within the space, ascending, and their vectors in its basis."""
    inside_NN = space.inside_MM[: space.filled, : space.filled]
    values_N, turns_NN = np.linalg.eigh((inside_NN + inside_NN.T) / 2)
    return values_N.clip(min=0), turns_NN


# --- stacked vectors -------------------------------------------------------------------------


def _count(vectors: Blocks) -> int:
    return len(next(iter(vectors.values())))


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
def _turn(weights_KN: jax.Array, a: Blocks) -> Blocks:
    turned: Blocks = jax.tree.map(
        lambda q: jnp.tensordot(weights_KN, q, axes=1, precision="highest"), a
    )
    return turned


@partial(jax.jit, static_argnums=2)
def _window(basis: Blocks, start: int | jax.Array, count: int) -> Blocks:
    """``count`` of the vectors."""
    return {p: jax.lax.dynamic_slice_in_dim(x, start, count) for p, x in basis.items()}


@partial(jax.jit, donate_argnums=0)
def _write(basis: Blocks, new: Blocks, start: int) -> Blocks:
    """In place: the vectors' room is most of the memory that solving takes."""
    return {
        p: jax.lax.dynamic_update_slice_in_dim(x, new[p].astype(x.dtype), start, axis=0)
        for p, x in basis.items()
    }


@jax.jit
def _apart(new: Blocks, basis: Blocks, filled: int) -> tuple[Blocks, jax.Array]:
    """What is new in K directions, each taken as of length 1; and its Gram matrix."""
    length_K = _inner_each(new, new) ** 0.5
    new = _scale(_quotient(jnp.ones_like(length_K), length_K), new)

    def take_off(i: jax.Array, new: Blocks) -> Blocks:
        part = _window(basis, i * _count(new), _count(new))
        along = _turn(_inner(new, part), part)
        return jax.tree.map(jnp.subtract, new, along)

    new = jax.lax.fori_loop(0, -(-filled // _count(new)), take_off, new)
    return new, _inner(new, new)


@jax.jit
def _along(a: Blocks, basis: Blocks, filled: int) -> jax.Array:
    """(K, M) inner products with the basis; 0 where there is none."""
    K, M = _count(a), _count(basis)

    def visit(i: jax.Array, out_KM: jax.Array) -> jax.Array:
        part_KK = _inner(a, _window(basis, i * K, K)).astype(out_KM.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out_KM, part_KK, i * K, axis=1)

    return jax.lax.fori_loop(0, -(-filled // K), visit, jnp.zeros((K, M), _dtype(a)))


@jax.jit
def _mix(weights_KM: jax.Array, basis: Blocks, filled: int) -> Blocks:
    K = len(weights_KM)

    def add(i: jax.Array, total: Blocks) -> Blocks:
        part_KK = jax.lax.dynamic_slice_in_dim(weights_KM, i * K, K, axis=1)
        return jax.tree.map(jnp.add, total, _turn(part_KK, _window(basis, i * K, K)))

    start = {p: jnp.zeros((K, *x.shape[1:]), x.dtype) for p, x in basis.items()}
    return jax.lax.fori_loop(0, -(-filled // K), add, start)


@jax.jit
def _residual(b: Blocks, moved: Blocks, shift: float, x: Blocks) -> Blocks:
    left: Blocks = jax.tree.map(lambda b, m, x: b - m - shift * x, b, moved, x)
    return left


@jax.jit
def _scale(weights_K: jax.Array, a: Blocks) -> Blocks:
    scaled: Blocks = jax.tree.map(lambda x: x * weights_K.reshape(-1, *[1] * (x.ndim - 1)), a)
    return scaled


@jax.jit
def _add(a: Blocks, weights_K: jax.Array, b: Blocks) -> Blocks:
    added: Blocks = jax.tree.map(jnp.add, a, _scale(weights_K, b))
    return added


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
    size = to_host(size_K) ** 0.5
    return np.asarray(to_host(_inner_each(r, r)) ** 0.5 / np.where(size > 0, size, 1))
