"""Policies by the name a configuration gives them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dh_jax.config import MixingConfig
from dh_jax.errors import ConfigError
from dh_jax.mixing.ado import ado
from dh_jax.mixing.aioli import aioli
from dh_jax.mixing.combinators import bounded, frozen, smoothed
from dh_jax.mixing.doge import doge
from dh_jax.mixing.doremi import doremi
from dh_jax.mixing.group_influence import group_influence, influence_share
from dh_jax.mixing.influence import alignment, influence
from dh_jax.mixing.odm import odm
from dh_jax.mixing.policy import Policy, static, uniform
from dh_jax.mixing.schedules import stages, temperature
from dh_jax.rules import one_of, suggest


class Sources(NamedTuple):
    """What a policy may have to know of the sources before training."""

    names: tuple[str, ...]
    sizes: Mapping[str, float] | None  # training tokens; None where that is not known


def _temperature(config: MixingConfig, sources: Sources) -> Policy:
    return temperature(config.temperature, _sizes(config, sources))


def _proportional(config: MixingConfig, sources: Sources) -> Policy:
    return temperature(1.0, _sizes(config, sources))


def _schedule(config: MixingConfig, sources: Sources) -> Policy:
    if not config.stages:
        raise ConfigError(
            "mixing.stages is empty; give stages, for example "
            f"mixing.stages=[{{step: 100, weights: {{{sources.names[0]}: 1.0}}}}]"
        )
    for stage in config.stages:
        _known(f"mixing.stages from step {stage.step}", stage.weights, sources.names)
    return stages(
        [stage.step for stage in config.stages],
        [[stage.weights.get(name, 0.0) for name in sources.names] for stage in config.stages],
        interpolate=config.interpolate,
    )


def _doremi(config: MixingConfig, sources: Sources) -> Policy:
    if not config.reference:
        raise ConfigError(
            "mixing.reference is empty; give the losses of a reference model by source, in nats a "
            "target, or mixing.reference_run=FOLDER of a run that has finished"
        )
    reference = _one_each("mixing.reference", config.reference, sources.names)
    return doremi(reference, config.learning_rate, config.exploration)


def _influence(config: MixingConfig, sources: Sources) -> Policy:
    return influence(config.learning_rate, config.smoothing)


def _alignment(config: MixingConfig, sources: Sources) -> Policy:
    return alignment(config.learning_rate, config.smoothing)


# Those that follow a plan, and those that look and move within bounds.
PLANNED: dict[str, Callable[[MixingConfig, Sources], Policy]] = {
    "static": lambda config, sources: static(),
    "uniform": lambda config, sources: uniform(),
    "temperature": _temperature,
    "proportional": _proportional,
    "schedule": _schedule,
}
MOVING: dict[str, Callable[[MixingConfig, Sources], Policy]] = {
    "influence": _influence,
    "alignment": _alignment,
    "group_influence": lambda c, sources: group_influence(c.temperature, c.smoothing),
    "influence_share": lambda c, sources: influence_share(c.smoothing),
    "doge": lambda c, sources: doge(c.learning_rate),
    "odm": lambda c, sources: odm(c.smoothing),
    "doremi": _doremi,
    "aioli": lambda c, sources: aioli(c.learning_rate, c.exploration, c.hold),
    "ado": lambda c, sources: ado(),
}
SIZED = frozenset({"temperature", "proportional"})  # policies that ask for the sources' sizes


def make_policy(
    config: MixingConfig, names: Sequence[str], sizes: Mapping[str, float] | None = None
) -> Policy:
    """The policy that a mixing config describes.

    Whether the bounds suit the number of sources is checked by the policy's ``start``, which
    knows it.

    Args:
        config: see `MixingConfig`.
        names: of the sources, in the mixture's order.
        sizes: training tokens by source, for the policies in `SIZED`; ``config.sizes`` goes first.

    Raises:
        ConfigError: a name is unknown or a number lies outside its range.
    """
    builders = PLANNED | MOVING
    if config.policy not in builders:
        raise ConfigError(
            f"mixing.policy is {config.policy!r}{suggest(config.policy, list(builders))}; "
            f"known policies: {', '.join(builders)}"
        )
    one_of("mixing.on_failure", config.on_failure, ("stop", "keep"))
    for label, share in (("smoothing", config.smoothing), ("ema", config.ema)):
        if not 0 <= share < 1:
            raise ConfigError(f"mixing.{label} is {share}; it must be in [0, 1)")
    if not (math.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise ConfigError(
            f"mixing.learning_rate is {config.learning_rate}; it must be finite and above 0 "
            "(policy=static keeps the weights still)"
        )
    if not config.temperature > 0:
        raise ConfigError(f"mixing.temperature is {config.temperature}; it must be above 0")
    if not 0 <= config.exploration < 1:
        raise ConfigError(f"mixing.exploration is {config.exploration}; it must be in [0, 1)")
    policy = builders[config.policy](config, Sources(tuple(names), sizes))
    if config.policy in MOVING:
        if config.ema:
            policy = smoothed(policy, config.ema)
        policy = bounded(policy, *_bounds(config, names))
    return policy if config.freeze is None else frozen(policy, config.freeze)


# --- what is given by source -------------------------------------------------------------------


def _bounds(config: MixingConfig, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(M,) least and (M,) greatest weights."""
    _known("mixing.bounds", config.bounds, names)
    pairs = []
    for name in names:
        pair = config.bounds.get(name, [config.min_weight, config.max_weight])
        if len(pair) != 2:
            raise ConfigError(f"mixing.bounds.{name} is {list(pair)}; give [least, greatest]")
        pairs.append(pair)
    low_M, high_M = np.asarray(pairs, np.float32).reshape(-1, 2).T
    return low_M, high_M


def _sizes(config: MixingConfig, sources: Sources) -> list[float]:
    sizes = config.sizes or sources.sizes
    if not sizes:
        raise ConfigError(
            f"mixing={config.policy} needs the sources' sizes, which streams do not know; "
            "prepare the data, or give mixing.sizes in any unit"
        )
    return _one_each("mixing.sizes", sizes, sources.names)


def _one_each(label: str, values: Mapping[str, float], names: Sequence[str]) -> list[float]:
    _known(label, values, names)
    missing = [name for name in names if name not in values]
    if missing:
        raise ConfigError(f"{label} has no value for source {', '.join(map(repr, missing))}")
    return [values[name] for name in names]


def _known(label: str, values: Mapping[str, object], names: Sequence[str]) -> None:
    for name in values:
        if name not in names:
            raise ConfigError(
                f"{label} names source {name!r}{suggest(name, names)}; sources: {', '.join(names)}"
            )
