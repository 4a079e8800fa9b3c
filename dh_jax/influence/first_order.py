"""Influence without curvature: gradient products, cosines, and TracIn over checkpoints.

Shapes: K queries, B rows, S documents of a row.

TracIn (Pruthi et al. 2020, arXiv:2002.08484) sums gradient products over checkpoints, each by its
learning rate: ``score = -sum_c eta_c <grad of the query, grad of the document>`` at checkpoint c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError
from dh_jax.functions import Params
from dh_jax.influence.documents import spread
from dh_jax.influence.estimator import (
    Estimator,
    gather_gradients,
    linear,
    warn_of_coverage,
)
from dh_jax.influence.gradients import Blocks
from dh_jax.influence.objective import Data, Objective, Scope
from dh_jax.influence.per_document import per_document


def gradient_dot(objective: Objective, scope: Scope) -> Estimator:
    """``-<g_query, g_document>``: what one plain gradient step on the document does."""
    return linear(
        "gradient_dot",
        per_document(objective, scope),
        scope,
        fit=lambda params, data, key: (),
        precondition=lambda params, state, v, key: v,
    )


def gradient_cosine(objective: Objective, scope: Scope) -> Estimator:
    """Gradient product over both norms, in [-1, 1]; 0 where a gradient vanishes."""
    door = per_document(objective, scope)
    gradients = jax.jit(door.gradients)

    def fit(params: Params, data: Data, key: jax.Array) -> tuple[()]:
        warn_of_coverage(door.coverage(params))
        return ()

    def finish(params: Params, state: tuple[()], v: Blocks, key: jax.Array) -> Blocks:
        flat = [x.reshape(len(x), -1) for x in v.values()]
        norm_K = jnp.sqrt(sum(jnp.square(x).sum(axis=1) for x in flat))
        inverse_K = _inverse(norm_K)
        return {p: x * inverse_K.reshape(-1, *[1] * (x.ndim - 1)) for p, x in v.items()}

    def queries(params: Params, state: tuple[()], data: Data, key: jax.Array) -> Blocks:
        v = gather_gradients(gradients, scope, params, data, key)
        return finish(params, state, v, key)

    @jax.jit
    def score(
        params: Params, state: tuple[()], prepared: Blocks, batch: Batch, key: jax.Array
    ) -> jax.Array:
        products_BSK, squares_BS = door.moments(params, prepared, batch, key)
        scores_BSK = -products_BSK * _inverse(jnp.sqrt(squares_BS))[..., None]
        return jnp.moveaxis(scores_BSK, -1, 0)

    @jax.jit
    def by_token(params: Params, prepared: Blocks, batch: Batch, key: jax.Array) -> jax.Array:
        squares_BS = sum(door.squares(params, batch, key).values(), jnp.zeros(()))
        inverse_BT = spread(_inverse(jnp.sqrt(squares_BS)), batch)
        shares_BTK = door.by_token(params, prepared, batch, key)
        return -jnp.moveaxis(shares_BTK * inverse_BT[..., None], -1, 0)

    return Estimator(
        "gradient_cosine", scope, fit, queries, score, door.coverage, door, finish, by_token
    )


class Checkpoints(NamedTuple):
    """Parameters along a training run, for `tracin`: they stand where one set of params would."""

    params: tuple[Params, ...]
    rates: tuple[float, ...]  # the learning rate at each


def tracin(objective: Objective, scope: Scope, base: Any = gradient_dot) -> Estimator:
    """Sum over `Checkpoints` of another estimator's scores, each by its learning rate.

    Args:
        objective: see `Objective`.
        scope: which gradients.
        base: makes the estimator that is applied at each checkpoint; with
            `gradient_dot` this is TracIn.

    Returns:
        An estimator whose ``params`` are `Checkpoints`.

    Raises:
        ConfigError: (of its ``fit``) there is no checkpoint, or a rate is negative or not finite.
    """
    inner: Estimator = base(objective, scope)

    def each(checkpoints: Checkpoints) -> Sequence[tuple[Params, float]]:
        pairs = list(zip(checkpoints.params, checkpoints.rates, strict=True))
        bad = [rate for _, rate in pairs if not (math.isfinite(rate) and rate >= 0)]
        if bad or not pairs:
            raise ConfigError(
                f"tracin: {len(pairs)} checkpoints, learning rates {bad}; give at least one "
                "checkpoint, and rates that are finite and not negative"
            )
        return pairs

    def fit(params: Checkpoints, data: Data, key: jax.Array) -> list[Any]:
        return [inner.fit(p, data, key) for p, _ in each(params)]

    def queries(params: Checkpoints, state: list[Any], data: Data, key: jax.Array) -> list[Any]:
        pairs = zip(each(params), state, strict=True)
        return [inner.queries(p, s, data, key) for (p, _), s in pairs]

    def score(
        params: Checkpoints, state: list[Any], prepared: list[Any], batch: Batch, key: jax.Array
    ) -> jax.Array:
        triples = zip(each(params), state, prepared, strict=True)
        parts = [rate * inner.score(p, s, q, batch, key) for (p, rate), s, q in triples]
        return sum(parts[1:], parts[0])

    return Estimator(
        f"tracin_{inner.name}",
        scope,
        fit,
        queries,
        score,
        lambda params: inner.coverage(each(params)[0][0]),
    )


def _inverse(norm: jax.Array) -> jax.Array:
    return jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
