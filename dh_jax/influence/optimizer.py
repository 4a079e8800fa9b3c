"""Any optax optimizer, with a mixture that steers itself: influence joined to a policy.

Shapes: M sources, B rows.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError, DataError
from dh_jax.functions import Params
from dh_jax.influence.calculator import DataInfCalculator
from dh_jax.influence.sources import GRADIENTS, Measure, measured
from dh_jax.mixing.checks import refuse_no_mixture, refuse_unknown, weights_in_order
from dh_jax.mixing.pace import (
    Budget,
    Pace,
    check_budget,
    first_pace,
    next_pace,
    placed_alike,
)
from dh_jax.mixing.policy import LEARNT, SAMPLED, Observation, Policy, PolicyState


class InfluenceState(NamedTuple):
    """All that the optimizer remembers: a pytree, checkpointed whole."""

    inner: optax.OptState  # of the wrapped optimizer
    step: jax.Array  # int32, updates made
    weights_M: jax.Array  # float32, the mixture in force
    policy: PolicyState
    nats_M: jax.Array  # float32, loss summed over targets since the last move; see `observe`
    targets_M: jax.Array  # float32, targets learnt since the last move
    pace: Pace | tuple[()] = ()  # when the weights move next; only where a budget decides it


class Reweighting(NamedTuple):
    """What one move of the weights saw and did, in plain NumPy for logs and reports."""

    step: int  # optimizer steps made when the weights moved
    previous_M: np.ndarray  # float32, weights before
    weights_M: np.ndarray  # float32, weights from now on
    influence_M: np.ndarray | None  # float32, positive = harmful; None if the policy asks for none
    coverage: float | None  # share of the parameters that gradients were taken of
    alignment_M: np.ndarray | None = None  # float32, positive = helpful; likewise


class InfluenceAwareOptimizer:
    """Wraps an optax optimizer; `reweight` moves the weights of a mixture every so many steps.

    Wherever optax wants a ``GradientTransformation`` this may stand: `init` and `update` are pure
    and jit-able and give the wrapped optimizer's updates, bit for bit. Only `reweight` looks at
    data, outside ``jit``, since its errors must reach the user::

        updates, state = optimizer.update(grads, state, params)
        state = optimizer.observe(state, loss_M, targets_M)  # for policies that look at losses
        if optimizer.due(step, state):  # step = updates made so far
            state, move = optimizer.reweight(params, state, source_rows, probe_rows, key)
            loader.set_weights(dict(zip(optimizer.source_names, move.weights_M)))
            state = optimizer.spent(state, move_seconds, step_seconds)  # with a budget

    Args:
        optimizer: any optax optimizer.
        policy: moves the weights (`dh_jax.mixing.registry.make_policy`).
        calculator: measures influence, gradients and probes, or a `Measure` that does; None will do
            for a policy that needs nothing of the kind.
        source_names: names of the mixture's sources, in the loader's order.
        weights: the configured mixture: by name, or in the order of ``source_names``.
        interval: steps between two moves.
        warmup: steps before the first move.
        probe_names: names of the probes that can be targets.
        targets: probe -> weight, normalised here; empty means every probe counts the same.
        budget: what share of training's time moves may take; ``interval`` is then the least
            number of steps between two of them, and `spent` sets the number.
        longest: most steps between two moves for the budget's sake, as long as samples can be
            halved instead; default: ten intervals.
        halvings: how often samples may be halved (`halvings` says how often they are).

    Raises:
        ConfigError: a name is unknown, a number is outside its range, the bounds of the policy
            cannot hold for so many sources, or the policy needs what nobody measures.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        policy: Policy,
        calculator: DataInfCalculator | Measure | None = None,
        *,
        source_names: Sequence[str],
        weights: Mapping[str, float] | Sequence[float],
        interval: int = 20,
        warmup: int = 0,
        probe_names: Sequence[str] = (),
        targets: Mapping[str, float] | None = None,
        budget: float | None = None,
        longest: int | None = None,
        halvings: int = 0,
    ) -> None:
        if interval < 1:
            raise ConfigError(f"mixing.interval is {interval} steps; the least is 1")
        if warmup < 0:
            raise ConfigError(f"mixing.warmup is {warmup} steps; the least is 0")
        unknown = policy.needs - SAMPLED - LEARNT
        if unknown:
            raise ConfigError(
                f"the policy needs {', '.join(sorted(unknown))}, which reweight does not measure; "
                f"it measures {', '.join(sorted(SAMPLED | LEARNT))}"
            )
        self.inner = optax.with_extra_args_support(optimizer)
        self.policy = policy
        self.calculator = calculator
        self.source_names = tuple(source_names)
        self.interval = interval
        self.warmup = warmup
        self.budget: Budget | None = None
        if budget is not None:
            longest = 10 * interval if longest is None else longest
            self.budget = check_budget(Budget(budget, interval, longest, halvings))
        self.targets: dict[str, float] = {}
        if policy.needs & SAMPLED:
            if calculator is None:
                raise ConfigError(
                    f"the policy needs {', '.join(sorted(policy.needs & SAMPLED))}; "
                    "give a DataInfCalculator"
                )
            self.targets = resolve_targets(targets or {}, probe_names)
        start_M = jnp.asarray(weights_in_order(weights, self.source_names), jnp.float32)
        self._start_M = np.asarray(policy.start(start_M))
        self._move = jax.jit(policy.update)

    def init(self, params: Params) -> InfluenceState:
        """State before the first step. ``weights_M`` are the mixture to start with."""
        weights_M = jnp.asarray(self._start_M)
        return InfluenceState(
            inner=self.inner.init(params),
            step=jnp.zeros((), jnp.int32),
            weights_M=weights_M,
            # A policy may keep one array in several places; a step that donates wants each its own.
            policy=jax.tree.map(jnp.copy, self.policy.init(weights_M)),
            nats_M=jnp.zeros_like(weights_M),
            targets_M=jnp.zeros_like(weights_M),
            pace=jax.tree.map(jnp.asarray, first_pace(self.budget, self.warmup))
            if self.budget
            else (),
        )

    def update(
        self, updates: Params, state: InfluenceState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, InfluenceState]:
        """The wrapped optimizer's update; the weights stay as they are."""
        updates, inner = self.inner.update(updates, state.inner, params, **extra)
        return updates, state._replace(inner=inner, step=optax.safe_increment(state.step))

    def observe(
        self, state: InfluenceState, loss_M: jax.Array, targets_M: jax.Array
    ) -> InfluenceState:
        """Note what a step learnt of each source; pure and jit-able.

        Costs nothing for a policy that does not look at losses.

        Args:
            state: of this optimizer.
            loss_M: mean loss of each source's targets in the step's (global) batch, nats.
            targets_M: how many there were.
        """
        if not self.policy.needs & LEARNT:
            return state
        return state._replace(
            nats_M=state.nats_M + loss_M * targets_M, targets_M=state.targets_M + targets_M
        )

    def due(self, step: int, state: InfluenceState | None = None) -> bool:
        """Whether the weights are to move once ``step`` updates have been made.

        With a budget ``state`` says it.

        Raises:
            ConfigError: there is a budget, and no state is given.
        """
        if self.budget is not None:
            if state is None or not state.pace:
                raise ConfigError("with a budget the state says when a move is due; give it")
            return step >= int(state.pace.due)
        since = step - self.warmup
        return step > 0 and since >= 0 and since % self.interval == 0

    def spent(
        self, state: InfluenceState, move_seconds: float, step_seconds: float
    ) -> InfluenceState:
        """Note what the move just made took, and decide when the next one is due.

        Every process must give the same seconds. NaN stands for what was not measured, or was
        mostly compilation. Without a budget nothing happens.
        """
        if self.budget is None or not state.pace:
            return state
        pace = next_pace(self.budget, state.pace, int(state.step), move_seconds, step_seconds)
        return state._replace(pace=placed_alike(state.pace, pace))

    def halvings(self, state: InfluenceState) -> int:
        """How often samples are to be halved for the budget's sake."""
        return int(state.pace.halvings) if state.pace else 0

    def reweight(
        self,
        params: Params,
        state: InfluenceState,
        sources: Mapping[str, Batch] | Sequence[Batch] = (),
        probes: Mapping[str, Batch] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[InfluenceState, Reweighting]:
        """Measure what the policy needs to see, and let it move the weights.

        A policy that needs nothing may be called without rows: nothing is computed for it.

        Args:
            params: the parameters being trained.
            state: of this optimizer.
            sources: rows freshly sampled from each source's training split.
            probes: rows of every target probe; others are ignored.
            key: random key for the loss; default: key 0.

        Returns:
            The state with its new weights, and a record of the move.

        Raises:
            ConfigError: rows of a source or a target probe are missing.
            DataError: they hold nothing to learn, their gradient or score is not finite, or the
                policy looks at losses and none was observed.
        """
        observation, coverage = self._observation(params, state, sources, probes, key)
        refuse_unknown(observation, self.source_names)
        weights_M, policy_state = self._move(observation, state.policy)
        refuse_no_mixture(np.asarray(weights_M), self.source_names)
        move = Reweighting(
            step=int(state.step),
            previous_M=np.asarray(state.weights_M),
            weights_M=np.asarray(weights_M),
            influence_M=_plain(observation.influence_M),
            coverage=coverage,
            alignment_M=_plain(observation.alignment_M),
        )
        targets_M = state.targets_M  # zeros placed as they are, in buffers of their own to donate
        state = state._replace(
            weights_M=weights_M,
            policy=policy_state,
            nats_M=targets_M - targets_M,
            targets_M=targets_M - targets_M,
        )
        return state, move

    def _observation(
        self,
        params: Params,
        state: InfluenceState,
        sources: Mapping[str, Batch] | Sequence[Batch],
        probes: Mapping[str, Batch] | None,
        key: jax.Array | None,
    ) -> tuple[Observation, float | None]:
        """What the policy asks to see, and the share of parameters that gradients covered."""
        needs = self.policy.needs
        seen: dict[str, Any] = {}
        coverage: float | None = None
        if needs & LEARNT:
            if not (state.targets_M > 0).any():
                raise DataError(  # not of the config: batches may have held nothing to learn
                    "the policy looks at losses, but no target was observed since its last move: "
                    "call observe after every update, or raise mixing.interval where batches hold "
                    "nothing to learn"
                )
            seen["loss_M"] = state.nats_M / state.targets_M.clip(min=1)
            seen["tokens_M"] = state.targets_M
        if needs & SAMPLED:
            rows = _by_name(sources, self.source_names) if needs & GRADIENTS else {}
            measure = self.calculator
            if isinstance(measure, DataInfCalculator):
                key = jax.random.key(0) if key is None else key
                measure = partial(measured, measure, params, key)
            assert measure is not None
            sampled, coverage = measure(needs & SAMPLED, rows, probes or {}, self.targets)
            seen |= jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), sampled)
        return Observation(state.step, state.weights_M, **seen), coverage


def resolve_targets(targets: Mapping[str, float], probe_names: Sequence[str]) -> dict[str, float]:
    """Target weights that sum to 1, those of weight 0 left out; equal where none is given.

    Raises:
        ConfigError: there is no probe, a name is unknown, or the weights cannot be normalised.
    """
    if not probe_names:
        raise ConfigError("influence needs a probe to judge by, but the data config has none")
    for name, weight in targets.items():
        if name not in probe_names:
            near = difflib.get_close_matches(name, probe_names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(
                f"influence.targets names probe {name!r}{hint}; probes: {', '.join(probe_names)}"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(
                f"influence.targets.{name} is {weight}; it must be finite and at least 0"
            )
    chosen = dict(targets) or dict.fromkeys(probe_names, 1.0)
    total = math.fsum(chosen.values())
    if total == 0:
        raise ConfigError("influence.targets are all 0; give one probe a positive weight")
    return {name: weight / total for name, weight in chosen.items() if weight > 0}


# --- checks ----------------------------------------------------------------------------------


def _plain(values_M: jax.Array | None) -> np.ndarray | None:
    return None if values_M is None else np.asarray(values_M)


def _by_name(
    batches: Mapping[str, Batch] | Sequence[Batch], names: Sequence[str]
) -> dict[str, Batch]:
    if isinstance(batches, Mapping):
        missing = [name for name in names if name not in batches]
        if missing:
            raise ConfigError(f"no rows of source {', '.join(map(repr, missing))} to measure")
        return {name: batches[name] for name in names}
    if len(batches) != len(names):
        raise ConfigError(f"rows of {len(batches)} sources given, but there are {len(names)}")
    return dict(zip(names, batches, strict=True))
