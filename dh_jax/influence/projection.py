"""Influence in a random projection: TRAK's kernel, the projected Fisher, LESS's cosine.

Shapes: K queries, N fitted documents, B rows, S documents of a row, k numbers of a sketch.

With ``phi`` the sketch of a document's gradient (see `dh_jax.influence.sketch`):

- ``fisher``: ``-phi_q' (Phi' Phi / n + lambda I)^-1 phi_d``, the damped empirical Fisher as
  projected (Choe et al. 2024, arXiv:2405.13954).
- ``trak`` (Park et al. 2023, arXiv:2303.14186): features are gradients of the log odds
  ``log p / (1 - p)``, which are ``-phi / (1 - p)`` with ``p = exp(-mean loss)``; scores are those
  of its kernel, turned from the query's log odds to its loss.
- ``cosine`` (Xia et al. 2024, LESS, arXiv:2402.04333): no kernel, gradients of length 1. With
  ``adam`` the documents' features are those of the step that Adam would take on each alone
  (their section 3.1), while queries keep their gradients.

``lambda`` is ``damping`` (0.1) times the mean eigenvalue of the projected matrix. TRAK averages
scores over models; average ours.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError, DataError
from dh_jax.functions import Params
from dh_jax.influence.chunks import chunks_and_keys, from_chunks
from dh_jax.influence.documents import target_counts
from dh_jax.influence.estimator import Estimator, has_target, warn_of_coverage
from dh_jax.influence.gradients import document_totals, select
from dh_jax.influence.kronecker import eigenbasis
from dh_jax.influence.objective import Data, Objective, Scope, checked, refuse_non_finite
from dh_jax.influence.per_document import per_document
from dh_jax.influence.sketch import Sketch, check_sketch, project

LEAST_DOUBT = 1e-3  # 1 - p of a document that the model knows by heart


class Kernel(NamedTuple):
    """The projected curvature, inverted."""

    inverse_kk: jax.Array


class Adam(NamedTuple):
    """Adam's state at the checkpoint (of `optax.ScaleByAdamState`, in its order), and constants."""

    steps: int | jax.Array  # taken, optax's `count`
    mu: Params  # running mean of gradients, of the parameters' structure
    nu: Params  # running mean of their squares
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


def projection(
    objective: Objective,
    scope: Scope,
    *,
    size: int = 2048,
    kernel: Literal["fisher", "trak", "cosine"] = "fisher",
    damping: float = 0.1,
    seed: int = 0,
    adam: Adam | None = None,
) -> Estimator:
    """Influence by sketched gradients: k numbers a document, which can be kept on disk.

    Args:
        objective: any; taps are used where there are some.
        scope: which gradients.
        size: k, a power of two.
        kernel: see the head of this file.
        damping: lambda over the mean eigenvalue.
        seed: of the projection.
        adam: of ``cosine`` only, LESS's features of Adam's steps. A step is not linear in the
            gradient, so whole gradients of ``scope.chunk`` rows' documents exist at once: it is
            meant for adapters.

    Raises:
        ConfigError: a number lies outside its range, there is no such kernel, or ``adam`` is
            given to another kernel than ``cosine``.
        DataError: (of its ``fit``) no document has a target, or all gradients vanish.
    """
    if kernel not in ("fisher", "trak", "cosine"):
        raise ConfigError(f"projection kernel {kernel!r}; take 'fisher', 'trak' or 'cosine'")
    if not (math.isfinite(damping) and damping > 0):
        raise ConfigError(f"projection damping is {damping}; it must be finite and above 0")
    if adam is not None and kernel != "cosine":
        raise ConfigError(f"projection: adam belongs to kernel 'cosine', not to {kernel!r}")
    sketch = check_sketch(Sketch(size, seed))
    door = per_document(objective, scope)

    @jax.jit
    def features(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        """(B, S, k), of length 1 for cosines."""
        phi_BSk = door.sketched(sketch, params, batch, key)
        return _unit(phi_BSk) if kernel == "cosine" else phi_BSk

    def of_steps(adam: Adam, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        """(B, S, k) of the steps that Adam would take, of length 1."""
        mu, nu = (select(x).blocks for x in (adam.mu, adam.nu))

        def visit(_: None, xs: tuple[Batch, jax.Array]) -> tuple[None, jax.Array]:
            each = door.gradients(params, *xs)
            phi = [
                project(sketch, p, step.reshape(-1, *step.shape[2:]))
                for p, step in ((p, _step(adam, mu[p], nu[p], g)) for p, g in each.items())
            ]
            return None, sum(phi[1:], phi[0]).reshape(-1, scope.max_segments, size)

        _, phi_NCSk = jax.lax.scan(visit, None, chunks_and_keys(batch, scope.chunk, key))
        there_BS = target_counts(batch, scope.max_segments) > 0
        return _unit(from_chunks(phi_NCSk, len(batch.tokens_BT))) * there_BS[..., None]

    @jax.jit
    def doubts(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        """(B, S) 1 - p."""
        loss_BT = jnp.where(batch.loss_mask_BT, objective.loss(params, batch, key), 0)
        counts_BS = target_counts(batch, scope.max_segments).clip(min=1)
        mean_BS = document_totals(loss_BT, batch, scope.max_segments) / counts_BS
        return -jnp.expm1(-mean_BS).clip(max=-LEAST_DOUBT)

    def fit(params: Params, data: Data, key: jax.Array) -> Kernel:
        warn_of_coverage(door.coverage(params))
        if kernel == "cosine":
            return Kernel(jnp.eye(size, dtype=scope.dtype))
        total, documents = np.zeros((size, size)), 0
        for index, batch, batch_key in checked(data, scope, key):
            phi_BSk = features(params, batch, batch_key)
            if kernel == "trak":
                phi_BSk = phi_BSk / doubts(params, batch, batch_key)[..., None]
            refuse_non_finite(index, "gradient", jnp.square(phi_BSk).sum(axis=-1))
            total += np.asarray(_outer(phi_BSk), np.float64)
            documents += int(has_target(batch, scope).sum())
        if not documents:
            raise DataError("no document has a target to learn; there is no kernel to fit")
        values, vectors = eigenbasis(total / documents)  # type: ignore[arg-type]
        if values.sum() == 0:
            raise DataError("all fitted gradients vanish; there is no kernel to invert")
        inverse = (vectors / (values + damping * values.mean())) @ vectors.T
        return Kernel(jnp.asarray(inverse, scope.dtype))

    def queries(params: Params, state: Kernel, data: Data, key: jax.Array) -> jax.Array:
        """(K, k) the kernel's inverse applied to each query's features."""
        found = []
        for index, batch, batch_key in checked(data, scope, key):
            phi_BSk = features(params, batch, batch_key)
            refuse_non_finite(index, "gradient", jnp.square(phi_BSk).sum(axis=-1))
            found.append(phi_BSk[has_target(batch, scope)])
        return jnp.matmul(jnp.concatenate(found), state.inverse_kk, precision="highest")

    def with_adam(
        adam: Adam | None, params: Params, prepared: jax.Array, batch: Batch, key: jax.Array
    ) -> jax.Array:
        if adam is None:
            phi_BSk = features(params, batch, key)
        else:
            phi_BSk = of_steps(adam, params, batch, key)
        return -jnp.einsum("qk,bsk->qbs", prepared, phi_BSk, precision="highest")

    scores = partial(jax.jit(with_adam), adam)  # an argument: constants would be copied

    def score(
        params: Params, state: Kernel, prepared: jax.Array, batch: Batch, key: jax.Array
    ) -> jax.Array:
        return scores(params, prepared, batch, key)

    return Estimator(f"projection_{kernel}", scope, fit, queries, score, door.coverage)


def _step(adam: Adam, mu: jax.Array, nu: jax.Array, gradients: jax.Array) -> jax.Array:
    """Adam's step (Kingma & Ba 2015), without its rate, were the document the next batch."""
    count = jnp.asarray(adam.steps + 1, gradients.dtype)
    mean = (adam.b1 * mu + (1 - adam.b1) * gradients) / (1 - adam.b1**count)
    square = (adam.b2 * nu + (1 - adam.b2) * jnp.square(gradients)) / (1 - adam.b2**count)
    return mean / (jnp.sqrt(square) + adam.eps)


def _unit(phi_BSk: jax.Array) -> jax.Array:
    norm_BS1 = jnp.linalg.norm(phi_BSk, axis=-1, keepdims=True)
    return phi_BSk / jnp.where(norm_BS1 > 0, norm_BS1, 1)


@jax.jit
def _outer(phi_BSk: jax.Array) -> jax.Array:
    return jnp.einsum("bsk,bsl->kl", phi_BSk, phi_BSk, precision="highest")
