"""Refusals of what a policy is shown or gives, naming the source at fault."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dh_jax.errors import ConfigError, DataError
from dh_jax.mixing.policy import Observation


def refuse_unknown(observation: Observation, names: Sequence[str]) -> None:
    """Refuse to show a policy numbers that are not finite: it would spread them over all sources.

    Raises:
        DataError: names the number and its source.
    """
    for field in ("loss_M", "influence_M", "alignment_M", "norm_M"):
        values_M = getattr(observation, field)
        known = [] if values_M is None else zip(names, np.asarray(values_M), strict=True)
        for name, value in known:
            if not np.isfinite(value):
                raise DataError(
                    f"{field.removesuffix('_M')} of source {name!r} is {value} at step "
                    f"{int(observation.step)}; training has diverged or its rows are broken: "
                    "lower the learning rate or look at them"
                )


def refuse_no_mixture(weights_M: np.ndarray, names: Sequence[str]) -> None:
    """Refuse weights that are none.

    Raises:
        DataError: a weight is negative or not finite, or they do not sum to 1.
    """
    pairs = list(zip(names, weights_M.tolist(), strict=True))
    bad = [f"{name!r} ({weight})" for name, weight in pairs if not 0 <= weight < np.inf]
    if bad:
        raise DataError(
            f"the policy gave weights that are no mixture for source {', '.join(bad)}; set "
            "mixing.on_failure=keep to go on with the last weights, or choose another policy"
        )
    total = weights_M.sum(dtype=np.float64)
    if abs(total - 1) > 1e-4:
        raise DataError(
            f"the policy gave weights {dict(pairs)}, which sum to {total:g}, not 1; "
            "choose another policy"
        )


def weights_in_order(
    weights: Mapping[str, float] | Sequence[float], names: Sequence[str]
) -> list[float]:
    """Configured weights in the order of ``names``.

    Raises:
        ConfigError: they are of other sources, or no mixture; names the source.
    """
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ConfigError(
                f"weights name {', '.join(weights)} but the sources are {', '.join(names)}"
            )
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise ConfigError(f"{len(weights)} weights for {len(names)} sources; give one for each")
    for name, weight in zip(names, weights, strict=True):
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"weight of source {name!r} is {weight}; it must be at least 0")
    total = math.fsum(weights)
    if abs(total - 1) > 1e-4:
        raise ConfigError(f"weights of the sources sum to {total:g}; they must sum to 1")
    return list(weights)
