"""First-order measurements of a mixture's sources: gradients against the target's, and its loss.

Shapes: M sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError, DataError
from dh_jax.functions import LossFn, Params, masked_mean
from dh_jax.influence.calculator import DataInfCalculator
from dh_jax.influence.checks import CURE, refuse_gradient, rows_with_targets
from dh_jax.influence.gradients import Blocks


def source_alignment(
    calculator: DataInfCalculator,
    params: Params,
    sources: Mapping[str, Batch],
    probes: Mapping[str, Batch],
    targets: Mapping[str, float],
    key: jax.Array,
) -> tuple[np.ndarray, np.ndarray]:
    """Dot product of each source's mean gradient with the target's, and the source's norm.

    Of the parameters that the calculator selects. One gradient exists at a time beside the
    target's; every row that has a target counts the same.

    Args:
        calculator: of the loss being trained.
        params: the parameters being trained.
        sources: name -> training rows.
        probes: name -> held-out rows.
        targets: probe -> weight, summing to 1.
        key: random key, as the loss may use it.

    Returns:
        (M,) alignment, positive = helpful, and (M,) norms, in the order of ``sources``.

    Raises:
        ConfigError: a target has no probe rows.
        DataError: rows hold nothing to learn, or a gradient is not finite; names whose.
    """
    check_targets(targets, probes)
    source_key, probe_key = jax.random.split(key)
    v = target_gradient(calculator, params, probes, targets, probe_key)
    products = []
    for name, rows in sources.items():
        owner = f"source {name!r}"
        rows_with_targets(owner, rows)
        gradient = calculator.probe_gradient(params, rows, source_key)
        refuse_gradient(owner, gradient)
        products.append(_products(gradient, v))
    alignment_M, norm_M = np.asarray(products, np.float32).T
    return alignment_M, norm_M


def target_gradient(
    calculator: DataInfCalculator,
    params: Params,
    probes: Mapping[str, Batch],
    targets: Mapping[str, float],
    key: jax.Array,
) -> Blocks:
    """Gradient of the weighted loss of the target probes.

    Raises:
        DataError: a probe holds nothing to learn, or its gradient is not finite.
    """
    v: Blocks = {}
    for name, weight in targets.items():
        owner = f"probe {name!r}"
        rows_with_targets(owner, probes[name])
        gradient = calculator.probe_gradient(params, probes[name], key)
        refuse_gradient(owner, gradient)
        v = {path: weight * g + v.get(path, 0.0) for path, g in gradient.items()}
    return v


def target_loss(
    calculator: DataInfCalculator,
    params: Params,
    probes: Mapping[str, Batch],
    targets: Mapping[str, float],
    key: jax.Array,
) -> float:
    """Loss of the target, nats: the weighted sum of the probes' means over their targets.

    Raises:
        ConfigError: a target has no probe rows.
        DataError: they hold nothing to learn, or the loss is not finite; names whose.
    """
    check_targets(targets, probes)
    total = 0.0
    for name, weight in targets.items():
        rows_with_targets(f"probe {name!r}", probes[name])
        loss = float(_mean_loss(calculator.loss_fn, params, probes[name], key))
        if not np.isfinite(loss):
            raise DataError(f"probe {name!r}: the loss is {loss}; {CURE}")
        total += weight * loss
    return total


def check_targets(targets: Mapping[str, float], probes: Mapping[str, Batch]) -> None:
    """Refuse targets that no rows were given for."""
    missing = [name for name in targets if name not in probes]
    if missing:
        raise ConfigError(f"no rows for probe {', '.join(map(repr, missing))}; it is a target")


@jax.jit
def _products(gradient: Blocks, v: Blocks) -> tuple[jax.Array, jax.Array]:
    dot = sum(jnp.vdot(g, v[path], precision="highest") for path, g in gradient.items())
    square = sum(jnp.vdot(g, g, precision="highest") for g in gradient.values())
    return jnp.asarray(dot), jnp.sqrt(square)


@partial(jax.jit, static_argnums=0)
def _mean_loss(loss_fn: LossFn, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    return masked_mean(loss_fn(params, batch, key), batch.loss_mask_BT)
