"""One move of a run's weights: sample what the policy asks for, let it move, tell the loader."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from dh_jax.data.loader import Loader
from dh_jax.distributed.agreement import from_first_host
from dh_jax.errors import DataError
from dh_jax.functions import Params
from dh_jax.influence.optimizer import GRADIENTS, InfluenceAwareOptimizer, InfluenceState
from dh_jax.mixing.policy import SAMPLED
from dh_jax.sampling import Samplers


def move_weights(
    optimizer: InfluenceAwareOptimizer,
    samplers: Samplers | None,
    loader: Loader,
    params: Params,
    state: InfluenceState,
    key: jax.Array,
    *,
    keep: bool = False,
) -> tuple[InfluenceState, dict[str, Any] | None]:
    """Move the weights of a mixture, from the first batch not yet delivered.

    Rows are drawn only for what the policy needs.

    Args:
        keep: where no weights come of it, go on with the last ones.

    Returns:
        The new state, and a record for the log; None where the weights stayed as they were.

    Raises:
        DataError: what the policy asked for, or what it gave, is not finite; not if ``keep``.
    """
    needs = optimizer.policy.needs
    samples = samplers.draw("train") if samplers and needs & GRADIENTS else {}
    probes = samplers.draw("probe") if samplers and needs & SAMPLED else {}
    step = int(state.step)
    try:
        state, move = optimizer.reweight(params, state, samples, probes, key)
    except DataError as error:
        if not keep:
            raise
        kept = " ".join(str(error).split())
        return state, {"kind": "reweight", "step": step, "weights": loader.weights, "kept": kept}
    if (move.weights_M == move.previous_M).all():
        return state, None
    loader.set_weights(from_first_host(by_source(loader, move.weights_M)))
    record: dict[str, Any] = {"kind": "reweight", "step": step, "weights": loader.weights}
    if move.influence_M is not None:
        record["influence"] = by_source(loader, move.influence_M)
    if move.alignment_M is not None:
        record["alignment"] = by_source(loader, move.alignment_M)
    if move.coverage is not None:
        record["coverage"] = move.coverage
    return state, record


def by_source(loader: Loader, values_M: Any) -> dict[str, float]:
    """An array over sources as a mapping from their names."""
    return dict(zip(loader.names, np.asarray(values_M, np.float64).tolist(), strict=True))
