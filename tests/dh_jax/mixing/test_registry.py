"""Policies by name: every shipped config makes one, and what no policy can be is refused."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from dh_jax.config import InfluenceConfig, MixingConfig, config_folder, typed
from dh_jax.errors import ConfigError
from dh_jax.mixing.policy import LEARNT, SAMPLED, Observation
from dh_jax.mixing.registry import MOVING, PLANNED, make_policy
from dh_jax.schema import StageConfig

NAMES = ("code", "prose", "maths")
WEIGHTS = jnp.asarray([0.5, 0.3, 0.2], jnp.float32)
SIZES = {"code": 400, "prose": 100, "maths": 100}
STAGES = [StageConfig(10, {"maths": 1.0})]
REFERENCE = dict.fromkeys(NAMES, 2.0)


def shipped():
    paths = sorted((config_folder() / "mixing").glob("*.yaml"))
    return {path.stem: typed(MixingConfig, OmegaConf.load(path)) for path in paths}


def test_every_policy_ships_with_a_config_of_its_name():
    configs = shipped()
    assert set(configs) == set(PLANNED | MOVING)
    for name, config in configs.items():
        assert config.policy == name
        config = dataclasses.replace(config, stages=STAGES, reference=REFERENCE)
        policy = make_policy(config, NAMES, SIZES)
        assert policy.needs <= LEARNT | SAMPLED
        start = policy.start(WEIGHTS)
        assert start.dtype == np.float32 and abs(float(start.sum()) - 1) < 1e-6
    typed(InfluenceConfig, OmegaConf.load(config_folder() / "influence" / "datainf.yaml"))


def test_a_policy_asks_only_for_what_it_reads():
    needs = {name: make_policy(config, NAMES, SIZES).needs for name, config in shipped().items()
             if name not in ("schedule", "doremi")}  # fmt: skip
    assert all(not needs[name] for name in ("static", "uniform", "temperature", "proportional"))
    assert needs["odm"] == needs["ado"] == LEARNT
    assert needs["aioli"] == {"target_loss"}
    assert needs["alignment"] == {"alignment_M"}


def test_sizes_come_from_the_config_before_the_store():
    policy = make_policy(MixingConfig(policy="proportional"), NAMES, SIZES)
    np.testing.assert_allclose(policy.start(WEIGHTS), [4 / 6, 1 / 6, 1 / 6], rtol=1e-6)
    given = MixingConfig(
        policy="temperature", temperature=2, sizes={"code": 4, "prose": 1, "maths": 1}
    )
    np.testing.assert_allclose(make_policy(given, NAMES, None).start(WEIGHTS), [0.5, 0.25, 0.25])


def test_bounds_freeze_and_average_wrap_a_policy_by_config():
    config = MixingConfig(policy="alignment", bounds={"prose": [0.0, 0.1]}, freeze=5, ema=0.5)
    policy = make_policy(config, NAMES)
    weights = policy.start(WEIGHTS)
    np.testing.assert_allclose(weights, [0.6, 0.1, 0.3], atol=1e-6)
    seen = Observation(jnp.int32(1), weights, alignment_M=jnp.asarray([0.0, 9.0, 1.0]))
    moved, state = policy.update(seen, policy.init(weights))
    assert moved[1] <= np.float32(0.1) and not np.array_equal(moved, weights)
    late = policy.update(seen._replace(step=jnp.int32(5)), state)[0]
    np.testing.assert_array_equal(late, weights)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "influnce"}, "'influnce' .did you mean 'influence'.*known policies: static"),
        ({"policy": "influence", "smoothing": 1.0}, "smoothing is 1.0"),
        ({"policy": "influence", "learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"policy": "influence", "learning_rate": float("nan")}, "learning_rate is nan"),
        ({"policy": "odm", "ema": -0.1}, "ema is -0.1"),
        ({"policy": "odm", "on_failure": "skip"}, "on_failure is 'skip'"),
        ({"policy": "odm", "bounds": {"proze": [0, 1]}}, "'proze' .did you mean 'prose'"),
        ({"policy": "odm", "bounds": {"prose": [0.1]}}, r"bounds.prose is \[0.1\]; give"),
        ({"policy": "doremi"}, "reference is empty.*reference_run"),
        ({"policy": "doremi", "reference": {"code": 1.0}}, "no value for source 'prose', 'maths'"),
        ({"policy": "doremi", "reference": dict.fromkeys(NAMES, float("inf"))}, "must be finite"),
        ({"policy": "proportional"}, "streams do not know"),
        ({"policy": "temperature", "sizes": dict.fromkeys(NAMES, 0.0)}, "each must be above 0"),
        ({"policy": "temperature", "sizes": SIZES, "temperature": 0.5}, "temperature is 0.5"),
        ({"policy": "schedule"}, "stages is empty"),
        ({"policy": "schedule", "stages": [StageConfig(5, {"code": 0.5})]}, "must sum to 1"),
        ({"policy": "schedule", "stages": [StageConfig(5, {"cod": 1.0})]}, "mean 'code'"),
        ({"policy": "schedule", "stages": [StageConfig(0, {"code": 1.0})]}, "ascend from 1"),
        ({"policy": "aioli", "hold": 0}, "hold is 0"),
        ({"policy": "aioli", "exploration": 1.0}, "exploration is 1.0"),
    ],
)
def test_impossible_mixing_configs_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        make_policy(MixingConfig(**fields), NAMES)


@pytest.mark.parametrize(("sources", "exploration"), [(2, 0.5), (3, 0.7), (4, 0.75)])
def test_trials_of_aioli_that_would_be_alike_are_refused(sources, exploration):
    names = list("abcd")[:sources]
    config = MixingConfig(policy="aioli", exploration=exploration, min_weight=0.0, max_weight=1.0)
    policy = make_policy(config, names)
    with pytest.raises(ConfigError, match=f"with {sources} sources it must be below 0.*take 0.25"):
        policy.start(jnp.full(sources, 1 / sources))
    np.testing.assert_array_equal(make_policy(config, names[:1]).start(jnp.ones(1)), [1])


@pytest.mark.parametrize(
    "bounds",
    [
        {"code": [0.2, 0.2], "prose": [0.4, 0.4], "maths": [0.4, 0.4]},  # every weight is fixed
        {"code": [0.1, 0.1], "prose": [0.1, 0.1]},  # two are, and so the third
        {"maths": [0.1, 0.1]},
    ],
)
def test_aioli_stays_finite_where_bounds_make_its_trials_alike(bounds):
    config = MixingConfig(policy="aioli", bounds=bounds, min_weight=0.0, max_weight=1.0, hold=2)
    policy = make_policy(config, NAMES)
    weights = policy.start(WEIGHTS)
    state = policy.init(weights)
    for step, loss in enumerate(np.linspace(5, 4, 12) ** 2):  # two rounds
        seen = Observation(jnp.int32(step), weights, target_loss=jnp.float32(loss))
        weights, state = policy.update(seen, state)
        assert np.isfinite(state.proportions_M).all()
        for name, weight in zip(NAMES, weights, strict=True):
            low, high = bounds.get(name, (0.0, 1.0))
            assert np.float32(low) - 1e-6 <= weight <= np.float32(high) + 1e-6
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-6)
