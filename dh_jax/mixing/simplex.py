"""The bounded simplex: mixture weights that sum to 1 and stay between their bounds."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dh_jax.errors import ConfigError

SUM_TOLERANCE = 1e-6


def check_bounds(n: int, low: ArrayLike, high: ArrayLike) -> None:
    """Refuse bounds that no mixture of ``n`` sources can keep.

    Args:
        n: number of sources, at least 1.
        low: least weight, a scalar or one for each source, in [0, 1].
        high: greatest weight, likewise.

    Raises:
        ConfigError: a bound is outside [0, 1], the two cross, or no weights between them sum to 1.
    """
    low_M = np.broadcast_to(np.asarray(low, np.float64), (n,))
    high_M = np.broadcast_to(np.asarray(high, np.float64), (n,))
    for label, bound_M in (("min_weight", low_M), ("max_weight", high_M)):
        bad = bound_M[~((bound_M >= 0) & (bound_M <= 1))]
        if bad.size:
            raise ConfigError(f"{label} is {bad[0]:g}; it must lie between 0 and 1")
    if (low_M > high_M).any():
        m = int(np.argmax(low_M > high_M))
        raise ConfigError(f"min_weight {low_M[m]:g} is above max_weight {high_M[m]:g}")
    least, most = math.fsum(low_M), math.fsum(high_M)
    if least > 1 + SUM_TOLERANCE:
        raise ConfigError(
            f"min_weight over {n} sources sums to {least:g}, above 1; "
            f"lower it to {math.floor(1e4 / n) / 1e4:g} or less"
        )
    if most < 1 - SUM_TOLERANCE:
        raise ConfigError(
            f"max_weight over {n} sources sums to {most:g}, below 1; "
            f"raise it to {math.ceil(1e4 / n) / 1e4:g} or more"
        )


@jax.jit
def project(weights_M: jax.Array, low: ArrayLike, high: ArrayLike) -> jax.Array:
    """The nearest point (Euclidean) of ``{w : sum(w) = 1, low <= w <= high}``; jit-able.

    The answer is ``clip(weights - tau, low, high)`` for the one shift ``tau`` that makes it sum
    to 1. That sum falls piecewise linearly in ``tau`` with kinks where an entry meets a bound, so
    we evaluate it at all 2M kinks, find the piece that crosses 1, and solve that piece exactly:
    O(M^2), no iteration and no tolerance, which for a mixture's handful of sources is the
    simplest exact way.

    Args:
        weights_M: any finite vector, float32 or float64.
        low: least weight, a scalar or (M,).
        high: greatest weight, a scalar or (M,); ``sum(low) <= 1 <= sum(high)`` (`check_bounds`).

    Returns:
        (M,) weights of the same dtype: exactly within bounds, sum 1 up to rounding.

    >>> project(jnp.array([0.9, 0.2, 0.1]), 0.0, 0.5).round(3).tolist()
    [0.5, 0.30000001192092896, 0.20000000298023224]
    """
    low_M = jnp.broadcast_to(jnp.asarray(low, weights_M.dtype), weights_M.shape)
    high_M = jnp.broadcast_to(jnp.asarray(high, weights_M.dtype), weights_M.shape)
    kinks = jnp.sort(jnp.concatenate([weights_M - high_M, weights_M - low_M]))
    sums = jnp.clip(weights_M - kinks[:, None], low_M, high_M).sum(axis=1)
    piece = jnp.clip((sums >= 1).sum() - 1, 0, kinks.size - 2)
    middle = (kinks[piece] + kinks[piece + 1]) / 2
    shifted_M = weights_M - middle
    free_M = (shifted_M > low_M) & (shifted_M < high_M)
    held_M = jnp.where(free_M, 0, jnp.clip(shifted_M, low_M, high_M))
    count = free_M.sum()
    excess = jnp.where(free_M, weights_M, 0).sum() + held_M.sum() - 1
    tau = jnp.where(count > 0, excess / count.clip(min=1), middle)  # no entry free: a flat piece
    return jnp.clip(weights_M - tau, low_M, high_M)
