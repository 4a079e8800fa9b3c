"""Adaptive data optimization: more of what a scaling law says will still be learnt.

Shapes: M sources, A exponents tried.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.mixing.policy import Observation, Policy, as_configured

EXPONENTS = tuple(0.05 * (k + 1) for k in range(16))  # alpha: 0.05 ... 0.8, the paper's range
LEAST_POINTS = 3  # points a law of three numbers needs


class Law(NamedTuple):
    """Moments of (n^-alpha, loss) for every exponent: all that a least-squares fit asks for."""

    count_M: jax.Array  # points seen of each source
    x_MA: jax.Array  # mean of n^-alpha
    y_M: jax.Array  # mean of the loss
    xx_MA: jax.Array  # sum of squares about the mean
    xy_MA: jax.Array
    yy_M: jax.Array


class ADOState(NamedTuple):
    """What ADO remembers."""

    law: Law
    prior_M: jax.Array  # mu: the configured weights
    credit_M: jax.Array  # h: moving average of the weights
    mean_M: jax.Array  # pi bar: average of preferences
    moves: jax.Array  # int32, t


def ado(
    credit_rate: float = 0.1, rate: float = 0.1, exponent: float = 0.5, least: float = 0.01
) -> Policy:
    r"""Follow the slope of a power law fitted to each source's loss.

    With ``n`` steps made and the law ``L(n) = eps + beta n^-alpha`` of each source, move ``t``
    does::

        speed = alpha (L(n) - eps) / n
        rho  ~ mu h^exponent speed             rho <- max(rho, least), renormalised
        w    <- rate rho + (1 - rate) pi
        pi   <- (t pi + rho) / (t + 1)         h <- credit_rate w + (1 - credit_rate) h

    with ``mu`` the configured weights, where ``h`` and ``pi`` begin. Until every source has given
    three points, ``rho`` is ``mu``. The target is never looked at.

    Args:
        credit_rate: gamma_1 of the paper.
        rate: gamma_2 of the paper.
        exponent: s of the paper.
        least: delta_min of the paper.

    Returns:
        A policy that needs ``loss_M`` and ``tokens_M``.

    References:
        Jiang et al. 2025, arXiv:2410.11820, section 3 and algorithm 1. Deviations: the law is
        fitted by least squares on the loss, exactly in ``eps`` and ``beta`` (both kept from
        below 0) for each alpha of a grid, from running moments (the paper: Huber loss of the
        logarithm by L-BFGS from a grid of starts, on a smoothed history, every 1000 steps). So
        the state is of one size however long the run, and nothing depends on where a search
        began. ``n`` counts steps, equal for all sources, as the authors' code does by default.
    """

    def init(weights_M: jax.Array) -> ADOState:
        zero_M = jnp.zeros_like(weights_M)
        zero_MA = jnp.zeros((weights_M.size, len(EXPONENTS)), weights_M.dtype)
        law = Law(zero_M, zero_MA, zero_M, zero_MA, zero_MA, zero_M)
        return ADOState(law, weights_M, weights_M, weights_M, jnp.zeros((), jnp.int32))

    def update(observation: Observation, state: ADOState) -> tuple[jax.Array, ADOState]:
        assert observation.loss_M is not None and observation.tokens_M is not None
        n = observation.step.astype(observation.weights_M.dtype).clip(min=1)
        law = _add(state.law, n, observation.loss_M, observation.tokens_M > 0)
        preference_M = state.prior_M * state.credit_M**exponent * _speed(law, n)
        known = (law.count_M >= LEAST_POINTS).all() & (preference_M.sum() > 0)
        preference_M = jnp.where(known, preference_M, state.prior_M)
        rho_M = (preference_M / preference_M.sum()).clip(min=least)
        rho_M = rho_M / rho_M.sum()
        weights_M = rate * rho_M + (1 - rate) * state.mean_M
        t = state.moves + 1
        mean_M = (t * state.mean_M + rho_M) / (t + 1)
        credit_M = credit_rate * weights_M + (1 - credit_rate) * state.credit_M
        return weights_M, ADOState(law, state.prior_M, credit_M, mean_M, t)

    return Policy(as_configured, init, update, needs=frozenset({"loss_M", "tokens_M"}))


def _add(law: Law, n: jax.Array, loss_M: jax.Array, seen_M: jax.Array) -> Law:
    """One more point of each source that was read; means and central moments (Welford 1962),
    since raw sums of squares would drown the slope in rounding."""
    x_A = n ** -jnp.asarray(EXPONENTS, n.dtype)
    count_M = law.count_M + 1
    dx_MA = x_A - law.x_MA
    dy_M = loss_M - law.y_M
    share_M = 1 / count_M
    keep_M = law.count_M * share_M
    new = Law(
        count_M,
        law.x_MA + dx_MA * share_M[:, None],
        law.y_M + dy_M * share_M,
        law.xx_MA + dx_MA**2 * keep_M[:, None],
        law.xy_MA + dx_MA * dy_M[:, None] * keep_M[:, None],
        law.yy_M + dy_M**2 * keep_M,
    )

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(seen_M.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return Law(*map(choose, new, law))


def _speed(law: Law, n: jax.Array) -> jax.Array:
    """(M,) ``alpha beta n^-alpha / n``, the slope of each source's best law at ``n``."""
    alpha_A = jnp.asarray(EXPONENTS, n.dtype)
    count_M, y_M, yy_M = law.count_M[:, None], law.y_M[:, None], law.yy_M[:, None]

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0).clip(min=0)

    free_MA = ratio(law.xy_MA, law.xx_MA)
    raw_xy_MA = law.xy_MA + count_M * law.x_MA * y_M  # about 0 rather than the means
    through_MA = ratio(raw_xy_MA, law.xx_MA + count_M * law.x_MA**2)
    floor_MA = y_M - free_MA * law.x_MA < 0  # eps would be negative: a law through 0 instead
    beta_MA = jnp.where(floor_MA, through_MA, free_MA)
    # Both errors about the means, so that they compare in float32 too.
    offset_MA = jnp.where(floor_MA, y_M - beta_MA * law.x_MA, 0)
    spread_MA = yy_M - 2 * beta_MA * law.xy_MA + beta_MA**2 * law.xx_MA
    error_MA = spread_MA + count_M * offset_MA**2
    best_M = error_MA.argmin(axis=1)
    beta_M = jnp.take_along_axis(beta_MA, best_M[:, None], axis=1)[:, 0]
    return alpha_A[best_M] * beta_M * n ** (-alpha_A[best_M] - 1)
