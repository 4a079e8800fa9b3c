"""What policies ask of the sources' gradients, measured on rows of each: influence and alignment.

Shapes: M sources, B rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch
from dh_jax.distributed.mesh import to_host
from dh_jax.errors import ConfigError
from dh_jax.functions import Params
from dh_jax.influence.alignment import check_targets, source_alignment, target_gradient, target_loss
from dh_jax.influence.calculator import DataInfCalculator
from dh_jax.influence.checks import refuse_non_finite, rows_with_targets

GRADIENTS = frozenset({"influence_M", "alignment_M", "norm_M"})  # measured on the sources' rows


class Measure(Protocol):
    """Measures by other means than `measured`, of a model that it knows (a torch one's pieces)."""

    def __call__(
        self,
        needs: frozenset[str],
        sources: Mapping[str, Batch],
        probes: Mapping[str, Batch],
        targets: Mapping[str, float],
        /,
    ) -> tuple[dict[str, Any], float | None]:
        """As `measured`."""


def measured(
    calculator: DataInfCalculator,
    params: Params,
    key: jax.Array,
    needs: frozenset[str],
    sources: Mapping[str, Batch],
    probes: Mapping[str, Batch],
    targets: Mapping[str, float],
) -> tuple[dict[str, Any], float | None]:
    """What a policy needs to see, and the share of parameters that gradients were taken of.

    Args:
        calculator: of the loss being trained.
        params: the parameters being trained.
        key: random key, as the loss may use it.
        needs: names of `Observation`, of those that rows are sampled for.
        sources: name -> training rows; looked at where a need is of `GRADIENTS`.
        probes: name -> held-out rows.
        targets: probe -> weight, summing to 1.

    Returns:
        The needs by name, and the share (None: no need is of `GRADIENTS`).

    Raises:
        ConfigError: a target has no probe rows.
        DataError: rows hold nothing to learn, or a number is not finite.
    """
    seen: dict[str, Any] = {}
    probed = (probes, targets, key)
    coverage = calculator.coverage(params) if needs & GRADIENTS else None
    if "influence_M" in needs:
        seen["influence_M"] = source_influence(calculator, params, sources, *probed)
    if needs & {"alignment_M", "norm_M"}:
        pair = source_alignment(calculator, params, sources, *probed)
        both = dict(zip(("alignment_M", "norm_M"), pair, strict=True))
        seen |= {name: both[name] for name in needs & set(both)}
    if "target_loss" in needs:
        seen["target_loss"] = target_loss(calculator, params, *probed)
    return seen, coverage


def source_influence(
    calculator: DataInfCalculator,
    params: Params,
    sources: Mapping[str, Batch],
    probes: Mapping[str, Batch],
    targets: Mapping[str, float],
    key: jax.Array,
) -> np.ndarray:
    """Mean influence of each source's rows on the weighted loss of the target probes.

    The curvature is fitted on the rows of all sources together; a row without a valid target
    counts nowhere.

    Args:
        calculator: of the loss being trained.
        params: the parameters being trained.
        sources: name -> training rows; all of one length T.
        probes: name -> held-out rows.
        targets: probe -> weight, summing to 1.
        key: random key, as the loss may use it.

    Returns:
        (M,) in the order of ``sources``; positive = harmful.

    Raises:
        ConfigError: a target has no probe rows, or sources differ in row length.
        DataError: rows hold nothing to learn, or a gradient or score is not finite; names whose.
    """
    check_targets(targets, probes)
    lengths = {name: batch.tokens_BT.shape[1] for name, batch in sources.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"sources differ in row length {lengths}; sample rows of one length")
    valid = {name: rows_with_targets(f"source {name!r}", batch) for name, batch in sources.items()}
    fit_key, probe_key = jax.random.split(key)
    v = target_gradient(calculator, params, probes, targets, probe_key)
    rows: Batch = jax.tree.map(lambda *x: jnp.concatenate(x), *sources.values())
    cuts = np.cumsum([len(v) for v in valid.values()])[:-1]

    fitted = calculator.fit(params, rows, fit_key)
    squares_B = to_host(sum(fitted.squares_B.values()))
    refuse_non_finite("gradient", dict(zip(valid, np.split(squares_B, cuts), strict=True)))

    q = calculator.precondition(fitted, v)
    scores_B = to_host(calculator.score_fitted(fitted, q))
    scores = dict(zip(valid, np.split(scores_B, cuts), strict=True))
    refuse_non_finite("influence", scores)
    means = [scores[name][valid[name]].mean() for name in valid]
    return np.asarray(means, np.float32)
