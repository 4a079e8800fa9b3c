"""Policies against literal transcriptions, and the properties that every move must keep."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dh_jax.config import MixingConfig
from dh_jax.errors import ConfigError
from dh_jax.mixing.influence import influence
from dh_jax.mixing.policy import Observation, static, uniform
from dh_jax.mixing.registry import make_policy

NAMES = ["code", "prose", "maths"]
WEIGHTS = jnp.asarray([0.5, 0.3, 0.2], jnp.float32)


def see(weights_M, influence_M=None, step=0):
    return Observation(jnp.int32(step), jnp.asarray(weights_M), influence_M)


@functools.cache
def jitted(policy):
    return jax.jit(policy.update)


def drive(policy, moves, weights_M):
    """Weights after each observed influence."""
    weights_M = policy.start(jnp.asarray(weights_M, jnp.float32))
    state, update, out = policy.init(weights_M), jitted(policy), []
    for step, influence_M in enumerate(moves):
        seen = jnp.asarray(influence_M, jnp.float32)
        weights_M, state = update(see(weights_M, seen, step), state)
        out.append(np.asarray(weights_M))
    return out


def test_static_keeps_and_uniform_levels():
    keep, level = static(), uniform()
    assert keep.needs == level.needs == frozenset()
    np.testing.assert_array_equal(keep.start(WEIGHTS), WEIGHTS)
    np.testing.assert_array_equal(keep.update(see(WEIGHTS), keep.init(WEIGHTS))[0], WEIGHTS)
    third = np.full(3, 1 / 3, np.float32)
    np.testing.assert_array_equal(level.start(WEIGHTS), third)
    np.testing.assert_array_equal(level.update(see(WEIGHTS), level.init(WEIGHTS))[0], third)


def literal(moves, weights, rate, smoothing, low, high, memory):
    """The documented update in float64 NumPy; the projection by bisection on its shift."""
    w, a, s, out = np.array(weights, np.float64), np.zeros(len(weights)), 0.0, []
    for t, seen in enumerate(moves, start=1):
        a = smoothing * a - (1 - smoothing) * np.array(seen, np.float64)
        h = a / (1 - smoothing**t)
        d = h - np.dot(w, h)
        s = memory * s + (1 - memory) * np.mean(d**2)
        r = np.sqrt(max(s / (1 - memory**t), np.mean(d**2)))
        w = w * np.exp(rate * d / r)
        w = w / w.sum()
        lo, hi = -2.0, 2.0
        for _ in range(100):
            middle = (lo + hi) / 2
            lo, hi = (middle, hi) if np.clip(w - middle, low, high).sum() > 1 else (lo, middle)
        w = np.clip(w - lo, low, high)
        out.append(w)
    return out


@pytest.mark.parametrize("smoothing", [0.0, 0.6])
def test_influence_policy_equals_its_literal_transcription(smoothing):
    rng = np.random.default_rng(0)
    moves = rng.normal(size=(12, 5)) * np.geomspace(1, 1e-3, 12)[:, None]
    weights = [0.3, 0.3, 0.2, 0.1, 0.1]
    policy = influence(0.7, smoothing, 0.05, 0.5, memory=0.8)
    got = drive(policy, moves, weights)
    want = literal(moves, weights, 0.7, smoothing, 0.05, 0.5, 0.8)
    np.testing.assert_allclose(got, want, atol=3e-6)
    assert np.ptp(want, axis=0).min() > 0.05  # the weights did move


def test_harmful_sources_lose_weight_and_helpful_ones_gain():
    first, *_ = drive(influence(0.5), [[3.0, -1.0, 0.0]], [1 / 3] * 3)
    assert first[1] > first[2] > first[0]


BOUNDED = [
    (low, high, influence(rate, 0.3, low, high))
    for rate, low, high in ((0.1, 0, 1), (50, 0, 0.6), (0.5, 0.02, 0.9), (5, 0.2, 0.3))
]


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), max_size=6),
    st.sampled_from(BOUNDED),
)
@settings(max_examples=60, deadline=None)
def test_bounds_are_never_broken(moves, bounded):
    low, high, policy = bounded
    for w in drive(policy, moves, [0.97, 0.01, 0.01, 0.01]):
        assert (w >= np.float32(low)).all() and (w <= np.float32(high)).all()
        assert abs(w.sum(dtype=np.float64) - 1) < 4e-6


def test_step_does_not_depend_on_the_scale_of_influence():
    moves = np.random.default_rng(1).normal(size=(6, 3))
    weights = [0.5, 0.3, 0.2]
    small, large = (drive(influence(0.3), moves * c, weights) for c in (1e-6, 1e6))
    np.testing.assert_allclose(small, large, rtol=1e-4)


def test_steps_shrink_when_sources_cease_to_differ():
    moves = [[1.0, -1.0]] * 5 + [[0.01, -0.01]]
    w = drive(influence(0.1), moves, [0.5, 0.5])
    assert abs(w[5] - w[4]).max() < 0.05 * abs(w[0] - 0.5).max()


def test_step_is_bounded_when_the_scale_suddenly_grows():
    moves = [[1e-3, -1e-3, 0.0]] * 5 + [[1e3, -1e3, 0.0]]
    w = drive(influence(0.2), moves, [1 / 3] * 3)
    change = np.log(w[5] / w[4])
    assert np.ptp(change) <= 2 * 0.2 * np.sqrt(3) + 1e-5


def test_equal_influence_moves_nothing():
    w = drive(influence(0.5), [[2.0] * 3, [0.0] * 3], WEIGHTS)
    np.testing.assert_allclose(w, [WEIGHTS, WEIGHTS], atol=1e-6)


def test_configured_weights_outside_the_bounds_are_projected_at_the_start():
    start = influence(0.5, 0.0, 0.1, 0.6).start(jnp.asarray([0.9, 0.1, 0.0], jnp.float32))
    np.testing.assert_allclose(start, [0.6, 0.25, 0.15], atol=1e-6)


def test_config_names_policies():
    assert make_policy(MixingConfig(policy="static"), NAMES).needs == frozenset()
    assert make_policy(MixingConfig(policy="uniform"), NAMES).needs == frozenset()
    bounds = MixingConfig(policy="influence", min_weight=0.2, max_weight=0.5)
    policy = make_policy(bounds, NAMES)
    assert policy.needs == {"influence_M"}
    start = policy.start(jnp.asarray([1.0, 0.0, 0.0], jnp.float32))
    np.testing.assert_allclose(start, [0.5, 0.25, 0.25], atol=1e-6)
    with pytest.raises(ConfigError, match="min_weight over 6 sources"):
        make_policy(bounds, list("abcdef")).start(jnp.full(6, 1 / 6))
