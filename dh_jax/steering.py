"""One move of a run's weights: sample what the policy asks for, let it move, tell the loader."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import numpy as np

from dh_jax.data.loader import Loader
from dh_jax.distributed.agreement import from_first_host
from dh_jax.errors import DataError
from dh_jax.functions import Params
from dh_jax.influence.optimizer import (
    GRADIENTS,
    InfluenceAwareOptimizer,
    InfluenceState,
)
from dh_jax.mixing.pace import Pace, placed_alike
from dh_jax.mixing.policy import SAMPLED
from dh_jax.runlog import Record
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
    halvings = optimizer.halvings(state)
    samples = samplers.draw("train", halvings) if samplers and needs & GRADIENTS else {}
    probes = samplers.draw("probe", halvings) if samplers and needs & SAMPLED else {}
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


def decide_next(
    optimizer: InfluenceAwareOptimizer,
    state: InfluenceState,
    recent: MutableMapping[str, Any],
    decided: Mapping[int, Record],
) -> tuple[InfluenceState, Record]:
    """Decide when a budget lets the weights move again; call it behind every move, everywhere.

    Args:
        optimizer: with a budget.
        state: behind the move.
        recent: seconds of the phases ``train`` and ``reweight``, those of compilation left out;
            the latter are taken out, as they are spent.
        decided: step -> record of what was decided there before the run was broken off; taken
            instead of the clock, so that a resumption makes the same moves.

    Returns:
        The new state, and the decision for the log: the step of the next move (``due``), what a
        move costs and all did (``cost`` and ``spent``, in training steps), ``halvings``.
    """
    step = int(state.step)
    moves, steps = recent.pop("reweight", ()), recent.get("train", ())
    if (record := decided.get(step)) is not None:
        types = {"due": np.int32, "cost": np.float32, "spent": np.float32, "halvings": np.int32}
        pace = Pace(**{name: kind(record[name]) for name, kind in types.items()})
        assert state.pace, "decide_next is for an optimizer with a budget"
        return state._replace(pace=placed_alike(state.pace, pace)), record
    seconds = from_first_host(
        {
            "move": moves[-1] if moves else math.nan,
            "step": statistics.median(steps) if steps else math.nan,
        }
    )
    state = optimizer.spent(state, seconds["move"], seconds["step"])
    assert state.pace, "decide_next is for an optimizer with a budget"
    values = {name: value.item() for name, value in state.pace._asdict().items()}
    return state, {"kind": "pace", "step": step, **values}


def by_source(loader: Loader, values_M: Any) -> dict[str, float]:
    """An array over sources as a mapping from their names."""
    return dict(zip(loader.names, np.asarray(values_M, np.float64).tolist(), strict=True))
