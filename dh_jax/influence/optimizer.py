"""Any optax optimizer, with a mixture that steers itself: influence joined to a policy.

Shapes: M sources, B rows.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dh_jax.batch import Batch
from dh_jax.distributed.mesh import to_host
from dh_jax.errors import ConfigError, DataError
from dh_jax.functions import Params
from dh_jax.influence.calculator import DataInfCalculator
from dh_jax.influence.gradients import Blocks, valid_rows
from dh_jax.mixing.policy import Observation, Policy, PolicyState

MEASURED = frozenset({"influence_M"})  # fields of Observation that `reweight` can fill


class InfluenceState(NamedTuple):
    """All that the optimizer remembers: a pytree, checkpointed whole."""

    inner: optax.OptState  # of the wrapped optimizer
    step: jax.Array  # int32, updates made
    weights_M: jax.Array  # float32, the mixture in force
    policy: PolicyState


class Reweighting(NamedTuple):
    """What one move of the weights saw and did, in plain NumPy for logs and reports."""

    step: int  # optimizer steps made when the weights moved
    previous_M: np.ndarray  # float32, weights before
    weights_M: np.ndarray  # float32, weights from now on
    influence_M: np.ndarray | None  # float32, positive = harmful; None if the policy asks for none
    coverage: float | None  # share of the parameters that influence was measured on


class InfluenceAwareOptimizer:
    """Wraps an optax optimizer; `reweight` moves the weights of a mixture every so many steps.

    Wherever optax wants a ``GradientTransformation`` this may stand: `init` and `update` are pure
    and jit-able and give the wrapped optimizer's updates, bit for bit. Only `reweight` looks at
    data, outside ``jit``, since its errors must reach the user::

        updates, state = optimizer.update(grads, state, params)
        if optimizer.due(step):  # step = updates made so far
            state, move = optimizer.reweight(params, state, source_rows, probe_rows, key)
            loader.set_weights(dict(zip(optimizer.source_names, move.weights_M)))

    Args:
        optimizer: any optax optimizer.
        policy: moves the weights (`dh_jax.mixing.registry.make_policy`).
        calculator: measures influence; None will do for a policy that needs none.
        source_names: names of the mixture's sources, in the loader's order.
        weights: the configured mixture: by name, or in the order of ``source_names``.
        interval: steps between two moves.
        warmup: steps before the first move.
        probe_names: names of the probes that can be targets.
        targets: probe -> weight, normalised here; empty means every probe counts the same.

    Raises:
        ConfigError: a name is unknown, a number is outside its range, the bounds of the policy
            cannot hold for so many sources, or the policy needs what nobody measures.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        policy: Policy,
        calculator: DataInfCalculator | None = None,
        *,
        source_names: Sequence[str],
        weights: Mapping[str, float] | Sequence[float],
        interval: int = 20,
        warmup: int = 0,
        probe_names: Sequence[str] = (),
        targets: Mapping[str, float] | None = None,
    ) -> None:
        if interval < 1:
            raise ConfigError(f"mixing.interval is {interval} steps; the least is 1")
        if warmup < 0:
            raise ConfigError(f"mixing.warmup is {warmup} steps; the least is 0")
        unknown = policy.needs - MEASURED
        if unknown:
            raise ConfigError(
                f"the policy needs {', '.join(sorted(unknown))}, which reweight does not measure; "
                f"it measures {', '.join(sorted(MEASURED))}"
            )
        self.inner = optax.with_extra_args_support(optimizer)
        self.policy = policy
        self.calculator = calculator
        self.source_names = tuple(source_names)
        self.interval = interval
        self.warmup = warmup
        self.targets: dict[str, float] = {}
        if policy.needs:
            if calculator is None:
                raise ConfigError("the policy needs influence; give a DataInfCalculator")
            self.targets = resolve_targets(targets or {}, probe_names)
        start_M = jnp.asarray(_in_order(weights, self.source_names), jnp.float32)
        self._start_M = np.asarray(policy.start(start_M))
        self._move = jax.jit(policy.update)

    def init(self, params: Params) -> InfluenceState:
        """State before the first step. ``weights_M`` are the mixture to start with."""
        weights_M = jnp.asarray(self._start_M)
        return InfluenceState(
            inner=self.inner.init(params),
            step=jnp.zeros((), jnp.int32),
            weights_M=weights_M,
            policy=self.policy.init(weights_M),
        )

    def update(
        self, updates: Params, state: InfluenceState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, InfluenceState]:
        """The wrapped optimizer's update; the weights stay as they are."""
        updates, inner = self.inner.update(updates, state.inner, params, **extra)
        return updates, state._replace(inner=inner, step=optax.safe_increment(state.step))

    def due(self, step: int) -> bool:
        """Whether the weights are to move once ``step`` updates have been made."""
        since = step - self.warmup
        return step > 0 and since >= 0 and since % self.interval == 0

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
            DataError: they hold nothing to learn, or their gradient or score is not finite.
        """
        influence_M: np.ndarray | None = None
        coverage: float | None = None
        if "influence_M" in self.policy.needs:
            assert self.calculator is not None
            influence_M = source_influence(
                self.calculator,
                params,
                _by_name(sources, self.source_names),
                probes or {},
                self.targets,
                jax.random.key(0) if key is None else key,
            )
            coverage = self.calculator.coverage(params)
        seen = None if influence_M is None else jnp.asarray(influence_M, jnp.float32)
        observation = Observation(state.step, state.weights_M, influence_M=seen)
        weights_M, policy_state = self._move(observation, state.policy)
        move = Reweighting(
            step=int(state.step),
            previous_M=np.asarray(state.weights_M),
            weights_M=np.asarray(weights_M),
            influence_M=influence_M,
            coverage=coverage,
        )
        return state._replace(weights_M=weights_M, policy=policy_state), move


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
    missing = [name for name in targets if name not in probes]
    if missing:
        raise ConfigError(f"no rows for probe {', '.join(map(repr, missing))}; it is a target")
    lengths = {name: batch.tokens_BT.shape[1] for name, batch in sources.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"sources differ in row length {lengths}; sample rows of one length")
    valid = {name: _valid(f"source {name!r}", batch) for name, batch in sources.items()}
    for name in targets:
        _valid(f"probe {name!r}", probes[name])

    fit_key, probe_key = jax.random.split(key)
    rows: Batch = jax.tree.map(lambda *x: jnp.concatenate(x), *sources.values())
    cuts = np.cumsum([len(v) for v in valid.values()])[:-1]

    fitted = calculator.fit(params, rows, fit_key)
    squares_B = to_host(sum(fitted.squares_B.values()))
    _refuse_non_finite("gradient", dict(zip(valid, np.split(squares_B, cuts), strict=True)))

    v: Blocks = {}
    for name, weight in targets.items():
        gradient = calculator.probe_gradient(params, probes[name], probe_key)
        if not bool(_all_finite(gradient)):
            raise DataError(f"probe {name!r}: gradient is not finite; {_CURE}")
        v = {path: weight * g + v.get(path, 0.0) for path, g in gradient.items()}

    q = calculator.precondition(fitted, v)
    scores_B = to_host(calculator.score_fitted(fitted, q))
    scores = dict(zip(valid, np.split(scores_B, cuts), strict=True))
    _refuse_non_finite("influence", scores)
    means = [scores[name][valid[name]].mean() for name in valid]
    return np.asarray(means, np.float32)


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

_CURE = "training has diverged or the rows are broken: lower the learning rate or look at them"


def _in_order(weights: Mapping[str, float] | Sequence[float], names: Sequence[str]) -> list[float]:
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ConfigError(
                f"weights name {', '.join(weights)} but the sources are {', '.join(names)}"
            )
        return [weights[name] for name in names]
    if len(weights) != len(names):
        raise ConfigError(f"{len(weights)} weights for {len(names)} sources; give one for each")
    return list(weights)


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


def _valid(owner: str, batch: Batch) -> np.ndarray:
    valid_B: np.ndarray = to_host(valid_rows(batch))
    if not valid_B.any():
        raise DataError(f"{owner}: none of its {len(valid_B)} rows has a target to learn")
    return valid_B


def _refuse_non_finite(what: str, values: Mapping[str, np.ndarray]) -> None:
    bad = {name: int((~np.isfinite(x)).sum()) for name, x in values.items()}
    if any(bad.values()):
        named = ", ".join(f"{n!r} ({k} of {len(values[n])} rows)" for n, k in bad.items() if k)
        raise DataError(f"{what} is not finite for source {named}; {_CURE}")


@jax.jit
def _all_finite(blocks: Blocks) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(blocks)]).all()
