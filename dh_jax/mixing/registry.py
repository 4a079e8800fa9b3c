"""Policies by the name a configuration gives them."""

from __future__ import annotations

import math
from collections.abc import Callable

from dh_jax.config import MixingConfig
from dh_jax.errors import ConfigError
from dh_jax.mixing.influence import influence
from dh_jax.mixing.policy import Policy, static, uniform

POLICIES: dict[str, Callable[[MixingConfig], Policy]] = {
    "static": lambda config: static(),
    "uniform": lambda config: uniform(),
    "influence": lambda config: influence(
        config.learning_rate, config.smoothing, config.min_weight, config.max_weight
    ),
}


def make_policy(config: MixingConfig) -> Policy:
    """The policy that a mixing config describes.

    Whether the bounds suit the number of sources is checked by the policy's ``start``, which
    knows it.

    Raises:
        ConfigError: the name is unknown or a number lies outside its range.
    """
    if config.policy not in POLICIES:
        raise ConfigError(
            f"mixing.policy is {config.policy!r}; known policies: {', '.join(POLICIES)}"
        )
    if not 0 <= config.smoothing < 1:
        raise ConfigError(f"mixing.smoothing is {config.smoothing}; it must be in [0, 1)")
    if not (math.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise ConfigError(
            f"mixing.learning_rate is {config.learning_rate}; it must be finite and above 0 "
            "(policy=static keeps the weights still)"
        )
    return POLICIES[config.policy](config)
