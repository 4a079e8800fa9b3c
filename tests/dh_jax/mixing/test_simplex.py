"""Projection onto the bounded simplex against optimality conditions and brute force."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dh_jax.errors import ConfigError
from dh_jax.mixing.simplex import check_bounds, project

project_jit = jax.jit(project)


@st.composite
def problems(draw, most=8):
    """A vector and bounds between which some point sums to 1."""
    n = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if n <= most]))  # few programs
    unit = st.integers(0, 64).map(lambda k: k / 64)  # no subnormals: XLA takes them for 0
    y = np.array(draw(st.lists(st.floats(-5, 5, width=32), min_size=n, max_size=n)))
    inside = np.array(draw(st.lists(unit, min_size=n, max_size=n))) + 1e-3
    inside /= inside.sum()
    below = np.array(draw(st.lists(unit, min_size=n, max_size=n)))
    above = np.array(draw(st.lists(unit, min_size=n, max_size=n)))
    return y, inside * below, inside + (1 - inside) * above


def best_vertex(gain, low, high):
    """max of gain.z over the bounded simplex, greedily: an exact linear programme."""
    z, left = low.copy(), 1 - low.sum()
    for i in np.argsort(-gain):
        z[i] += min(left, high[i] - low[i])
        left -= z[i] - low[i]
    return gain @ z


@given(problems())
@settings(max_examples=100, deadline=None)
def test_no_feasible_direction_leads_closer(problem):
    """Variational inequality, equivalent to the KKT conditions: (y - p).(z - p) <= 0."""
    y, low, high = problem
    with jax.enable_x64(True):
        p = np.asarray(project_jit(jnp.asarray(y), low, high))
    assert (p >= low).all() and (p <= high).all()
    assert abs(p.sum() - 1) < 1e-12
    assert best_vertex(y - p, low, high) - (y - p) @ p < 1e-11


@given(problems(most=4))
@settings(max_examples=60, deadline=None)
def test_equals_the_best_of_all_active_sets(problem):
    y, low, high = problem
    best, nearest = None, np.inf
    for sides in itertools.product("lfh", repeat=len(y)):
        free = np.array([s == "f" for s in sides])
        w = np.where(np.array(sides) == "l", low, high)
        if free.any():
            w[free] = y[free] + (1 - w[~free].sum() - y[free].sum()) / free.sum()
        feasible = (w >= low - 1e-12).all() and (w <= high + 1e-12).all()
        if feasible and abs(w.sum() - 1) < 1e-9 and np.square(w - y).sum() < nearest:
            best, nearest = w, np.square(w - y).sum()
    with jax.enable_x64(True):
        p = np.asarray(project_jit(jnp.asarray(y), low, high))
    np.testing.assert_allclose(p, best, atol=1e-9)


@given(problems())
@settings(max_examples=100, deadline=None)
def test_float32_keeps_bounds_exactly_and_sums_to_one(problem):
    y, low, high = (np.asarray(x, np.float32) for x in problem)
    p = np.asarray(project_jit(jnp.asarray(y), low, high))
    assert p.dtype == np.float32
    assert (p >= low).all() and (p <= high).all()
    assert abs(p.sum(dtype=np.float64) - 1) < 4e-6


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 10, 49])
def test_bounds_that_leave_one_point_give_that_point(n):
    y = jnp.linspace(-1, 2, n, dtype=jnp.float32)
    check_bounds(n, 1 / n, 1 / n)
    for low, high in ((1 / n, 1.0), (0.0, 1 / n)):
        check_bounds(n, low, high)
        np.testing.assert_allclose(project_jit(y, low, high), np.full(n, 1 / n), rtol=1e-6)


def test_weights_already_within_bounds_stay():
    w = jnp.asarray([0.25, 0.35, 0.1, 0.15, 0.15], jnp.float32)
    np.testing.assert_allclose(project_jit(w, 0.02, 0.9), w, atol=1e-7)


@pytest.mark.parametrize(
    ("n", "low", "high", "message"),
    [
        (3, 0.4, 1.0, "min_weight over 3 sources sums to 1.2.*0.3333 or less"),
        (3, 0.0, 0.3, "max_weight over 3 sources sums to 0.9.*0.3334 or more"),
        (1, 0.02, 0.9, "max_weight over 1 sources sums to 0.9"),
        (2, -0.1, 1.0, "min_weight is -0.1"),
        (2, 0.0, 1.5, "max_weight is 1.5"),
        (2, 0.0, float("nan"), "max_weight is nan"),
        (2, 0.6, 0.5, "min_weight 0.6 is above max_weight 0.5"),
    ],
)
def test_bounds_no_mixture_can_keep_are_refused(n, low, high, message):
    with pytest.raises(ConfigError, match=message):
        check_bounds(n, low, high)
