"""Policies made of policies: what each changes, and what it leaves alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dh_jax.errors import ConfigError
from dh_jax.mixing.combinators import bounded, every, frozen, scheduled, smoothed, warmed_up
from dh_jax.mixing.influence import alignment
from dh_jax.mixing.policy import Observation, Policy, as_configured, static, uniform

WEIGHTS = jnp.asarray([0.5, 0.3, 0.2], jnp.float32)
OTHER = jnp.asarray([0.1, 0.2, 0.7], jnp.float32)


def always(weights_M):
    """Proposes the same weights at every move and counts its moves."""
    return Policy(
        as_configured,
        lambda first_M: jnp.zeros((), jnp.int32),
        lambda observation, moves: (jnp.asarray(weights_M, jnp.float32), moves + 1),
    )


def drive(policy, steps, start_M=WEIGHTS):
    weights_M = policy.start(start_M)
    state, update, out = policy.init(weights_M), jax.jit(policy.update), []
    for step in steps:
        weights_M, state = update(Observation(jnp.int32(step), weights_M), state)
        out.append(np.asarray(weights_M))
    return out, state


def test_weights_are_projected_where_clamping_would_break_the_bounds():
    proposal, low, high = np.float32([0.98, 0.01, 0.01]), 0.1, 0.5
    clamped = np.clip(proposal, low, high)
    assert (clamped / clamped.sum()).max() > high + 0.1  # what one is tempted to do
    (got,), _ = drive(bounded(always(proposal), low, high), [1])
    np.testing.assert_allclose(got, [0.5, 0.25, 0.25], atol=1e-6)


@settings(max_examples=20)  # each of which is compiled
@given(
    st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4).filter(lambda x: sum(x) > 0.1),
    st.lists(st.integers(0, 24).map(lambda k: k / 100), min_size=4, max_size=4),
    st.lists(st.integers(26, 100).map(lambda k: k / 100), min_size=4, max_size=4),
)
def test_bounds_of_each_source_hold_exactly_and_the_projection_is_the_nearest(raw, low, high):
    """KKT of the projection with per-source bounds: one shift explains every free entry, and no
    bound entry would rather move inwards."""
    raw, low, high = (np.asarray(x, np.float32) for x in (raw, low, high))
    proposal = raw / raw.sum()
    (got,), _ = drive(bounded(always(proposal), low, high), [1], jnp.full(4, 0.25, jnp.float32))
    assert (got >= low).all() and (got <= high).all()
    assert abs(got.sum(dtype=np.float64) - 1) < 4e-6
    shift = proposal.astype(np.float64) - got
    free = (got > low) & (got < high)
    if free.any():
        tau = shift[free].mean()
        np.testing.assert_allclose(shift[free], tau, atol=1e-5)
        assert (shift[got <= low] <= tau + 1e-5).all()
        assert (shift[got >= high] >= tau - 1e-5).all()


def test_bounds_no_mixture_can_keep_are_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"min_weight over 3 sources sums to 1\.2"):
        bounded(static(), 0.4).start(WEIGHTS)
    with pytest.raises(ConfigError, match=r"min_weight 0.6 is above max_weight 0.5"):
        bounded(static(), [0.0, 0.6, 0.0], [1.0, 0.5, 1.0]).start(WEIGHTS)


def test_weights_that_are_not_finite_pass_through_the_bounds_unhidden():
    (got,), _ = drive(bounded(always([0.5, np.nan, 0.5]), 0.1, 0.9), [1])
    np.testing.assert_array_equal(np.isnan(got), [False, True, False])


def test_smoothing_goes_part_of_the_way():
    got, _ = drive(smoothed(always(OTHER), 0.75), [1, 2])
    first = 0.75 * WEIGHTS + 0.25 * OTHER
    np.testing.assert_allclose(got, [first, 0.75 * first + 0.25 * OTHER], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"1\.0; it must be in"):
        smoothed(static(), 1.0)


@pytest.mark.parametrize(
    ("wrap", "moving"),
    [
        (lambda p: warmed_up(p, 3), [3, 4, 5, 6]),
        (lambda p: every(p, 3), [3, 6]),
        (lambda p: frozen(p, 3), [1, 2]),
        (lambda p: every(warmed_up(frozen(p, 6), 3), 2), [4]),
    ],
)
def test_policies_move_only_when_they_may(wrap, moving):
    """State stays too, so a delayed policy has not counted moves that it did not make."""
    steps = range(1, 7)
    got, moves = drive(wrap(smoothed(always(OTHER), 0.5)), steps)
    before = np.asarray(WEIGHTS)
    for step, now in zip(steps, got, strict=True):
        assert (now != before).any() == (step in moving)
        before = now
    assert int(moves) == len(moving)


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="0 steps; the least is 1"):
        every(static(), 0)


def test_policies_follow_one_another_with_states_of_their_own():
    policy = scheduled([uniform(), always(OTHER), static()], [3, 5])
    got, state = drive(policy, range(1, 8))
    third = np.full(3, 1 / 3, np.float32)
    np.testing.assert_array_equal(got, [third, third, OTHER, OTHER, OTHER, OTHER, OTHER])
    assert int(state.inner[1]) == 2
    assert scheduled([uniform(), alignment()], [3]).needs == {"alignment_M"}
    with pytest.raises(ConfigError, match="2 policies with boundaries"):
        scheduled([uniform(), static()], [3, 3])


def test_policies_compile_for_accelerators():
    policy = frozen(bounded(smoothed(alignment(), 0.5), 0.02, [0.9, 0.5, 0.9]), 1000)
    seen = Observation(jnp.int32(1), WEIGHTS, alignment_M=OTHER)
    lowered = jax.export.export(jax.jit(policy.update), platforms=("cuda", "tpu", "cpu"))
    assert lowered(seen, policy.init(WEIGHTS)).platforms == ("cuda", "tpu", "cpu")
