"""Policies that follow a plan made before training: by size, or in stages.

Shapes: M sources, S stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.errors import ConfigError
from dh_jax.mixing.policy import NoState, Observation, Policy, as_configured


def temperature(tau: float, sizes: Sequence[float] | None = None) -> Policy:
    """Weights in proportion to ``size^(1/tau)``, from the first step to the last.

    ``tau`` = 1 is proportional, infinity is uniform; between them small sources are read more
    often than their size asks for.

    Args:
        tau: at least 1, or infinity.
        sizes: of the sources, in any unit; default: the configured weights stand for sizes.

    References:
        Devlin et al. 2019, multilingual BERT (exponent S = 1/tau = 0.7); Arivazhagan et al. 2019,
        arXiv:1907.05019, section 3.1 (p^(1/T) with T = 5).

    Raises:
        ConfigError: ``tau`` is below 1, or a size is not above 0.
    """
    if not tau >= 1:
        raise ConfigError(f"mixing.temperature is {tau}; it must be at least 1 (1: proportional)")
    if sizes is not None and not all(0 < size < np.inf for size in sizes):
        raise ConfigError(f"sizes of the sources are {list(sizes)}; each must be above 0")

    def start(weights_M: jax.Array) -> jax.Array:
        size_M = weights_M if sizes is None else jnp.asarray(sizes, weights_M.dtype)
        share_M = (size_M / size_M.sum()) ** (1 / tau)
        return share_M / share_M.sum()

    return Policy(
        start=start,
        init=lambda weights_M: NoState(),
        update=lambda observation, state: (observation.weights_M, state),
    )


def stages(
    steps: Sequence[int], weights_SM: Sequence[Sequence[float]], *, interpolate: bool = False
) -> Policy:
    """Configured weights first, then other weights from given steps on.

    Args:
        steps: step from which each stage's weights hold, ascending, at least 1.
        weights_SM: weights of each stage, each row summing to 1.
        interpolate: go from the weights of one stage to the next in a straight line over steps,
            reaching a stage's weights at its step (the configured ones belong to step 0).

    Raises:
        ConfigError: steps do not ascend, or a stage's weights are no mixture.
    """
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1:
        raise ConfigError(f"mixing.stages start at steps {list(steps)}; they must ascend from 1")
    for step, row in zip(steps, weights_SM, strict=True):
        if not (all(w >= 0 for w in row) and abs(sum(row) - 1) < 1e-6):
            raise ConfigError(
                f"weights of the stage from step {step} are {list(row)}; "
                "none may be negative and they must sum to 1"
            )

    def init(weights_M: jax.Array) -> jax.Array:
        return weights_M  # the configured ones: what the plan starts from

    def update(observation: Observation, first_M: jax.Array) -> tuple[jax.Array, jax.Array]:
        table = jnp.concatenate([first_M[None], jnp.asarray(weights_SM, first_M.dtype)])
        at = jnp.asarray([0, *steps], first_M.dtype)
        now = observation.step.astype(first_M.dtype)
        if interpolate:
            return jax.vmap(lambda w: jnp.interp(now, at, w), in_axes=1)(table), first_M
        return table[(now >= at).sum() - 1], first_M

    return Policy(as_configured, init, update)
