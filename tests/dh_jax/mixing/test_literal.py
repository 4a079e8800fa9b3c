"""Each policy against a literal NumPy transcription of its paper's equations, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.mixing.ado import ado
from dh_jax.mixing.aioli import aioli
from dh_jax.mixing.doge import doge
from dh_jax.mixing.doremi import average_weights, doremi
from dh_jax.mixing.group_influence import group_influence, influence_share
from dh_jax.mixing.influence import alignment, influence
from dh_jax.mixing.odm import odm
from dh_jax.mixing.policy import Observation
from dh_jax.mixing.schedules import stages, temperature

M, MOVES = 5, 40
CONFIGURED = np.array([0.35, 0.25, 0.2, 0.15, 0.05])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def observations(seed):
    """Random losses that fall, random gradients, and sources that are sometimes not read."""
    rng = np.random.default_rng(seed)
    out = []
    for k in range(MOVES):
        floor, scale = np.linspace(1, 3, M), np.linspace(3, 1, M)
        loss_M = floor + scale * (k + 1) ** -np.linspace(0.1, 0.7, M) + rng.normal(0, 0.02, M)
        tokens_M = rng.integers(0, 4, M) * 100.0
        out.append(
            {
                "step": 5 * (k + 1),
                "loss_M": np.where(tokens_M > 0, loss_M, 0),
                "tokens_M": tokens_M,
                "influence_M": rng.normal(size=M) * np.exp(rng.normal()),
                "alignment_M": rng.normal(size=M),
                "norm_M": rng.uniform(0.5, 2, M),
                "target_loss": 4 / (k + 1) ** 0.5 + rng.normal(0, 0.05),
            }
        )
    return out


def drive(policy, seen):
    """Weights in force after each observation, and the last state."""
    weights_M = policy.start(jnp.asarray(CONFIGURED))
    state, update, out = policy.init(weights_M), jax.jit(policy.update), []
    for record in seen:
        fields = {name: jnp.asarray(record[name]) for name in policy.needs}
        observation = Observation(jnp.int32(record["step"]), weights_M, **fields)
        weights_M, state = update(observation, state)
        out.append(np.asarray(weights_M))
    return np.array(out), state


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


# --- the papers ----------------------------------------------------------------------------


def literal_odm(seen, alpha):
    pi, reward, out = np.full(M, 1 / M), np.zeros(M), []
    for t, o in enumerate(seen, start=1):
        for i in range(M):
            if o["tokens_M"][i] > 0:
                reward[i] = alpha * reward[i] + (1 - alpha) * o["loss_M"][i] / pi[i]
        previous = min(1 / M, np.sqrt(np.log(M) / (M * t)))
        epsilon = min(1 / M, np.sqrt(np.log(M) / (M * (t + 1))))
        total = sum(np.exp(previous * reward[j]) for j in range(M))
        pi = np.array(
            [(1 - M * epsilon) * np.exp(previous * reward[i]) / total + epsilon for i in range(M)]
        )
        out.append(pi)
    return out


def literal_doremi(seen, reference, eta, c):
    alpha, excess, out = np.full(M, 1 / M), np.zeros(M), []
    for o in seen:
        for i in range(M):
            if o["tokens_M"][i] > 0:
                excess[i] = max(o["loss_M"][i] - reference[i], 0)
        unnormalised = alpha * np.exp(eta * excess)
        alpha = (1 - c) * unnormalised / unnormalised.sum() + c * np.full(M, 1 / M)
        out.append(alpha)
    return out


def literal_doge(seen, eta, normalised):
    alpha, out = np.full(M, 1 / M), []
    for o in seen:
        w = o["alignment_M"] / (np.mean(o["norm_M"]) if normalised else 1)
        alpha = alpha * np.exp(eta * w)
        alpha = alpha / alpha.sum()
        out.append(alpha)
    return out


def literal_aioli(seen, eta, off, hold):
    p, w, out = np.full(M, 1 / M), np.full(M, 1 / M), []
    drops, trials, before = np.zeros(M), np.zeros((M, M)), 0.0
    for k, o in enumerate(seen):
        at = k % (M + hold)
        if 1 <= at <= M:
            drops[at - 1], trials[at - 1] = before - o["target_loss"], w
        before = o["target_loss"]
        if at == M:
            a = np.linalg.inv(trials) @ drops
            if a.min() < 0:
                a = a - a.min()
            a = a / a.sum()
            p = p * np.exp(eta * a)
            p = p / p.sum()
        if at < M:
            w = np.full(M, off / (M - 1))
            w[at] = 1 - off
        else:
            w = p
        out.append(w)
    return out


def literal_ado(seen, gamma1, gamma2, s, delta):
    mu = CONFIGURED
    h, bar, out = mu.copy(), mu.copy(), []
    points = [([], []) for _ in range(M)]
    for t, o in enumerate(seen, start=1):
        n = o["step"]
        for i in range(M):
            if o["tokens_M"][i] > 0:
                points[i][0].append(n)
                points[i][1].append(o["loss_M"][i])
        if min(len(ns) for ns, _ in points) < 3:
            rho = mu.copy()
        else:
            speed = np.array([law_speed(np.array(ns), np.array(ys), n) for ns, ys in points])
            rho = mu * h**s * speed
            rho = rho / rho.sum()
        rho = np.maximum(rho, delta)
        rho = rho / rho.sum()
        pi = gamma2 * rho + (1 - gamma2) * bar
        bar = (1 - 1 / (t + 1)) * bar + rho / (t + 1)
        h = gamma1 * pi + (1 - gamma1) * h
        out.append(pi)
    return out


def law_speed(ns, ys, n):
    """Slope of the best of all laws eps + beta n^-alpha, fitted by lstsq on all points."""
    best = (np.inf, 0.0, 0.0)
    for alpha in 0.05 * np.arange(1, 17):
        x = ns**-alpha
        (eps, beta), *_ = np.linalg.lstsq(np.stack([np.ones_like(x), x], 1), ys, rcond=None)
        if beta < 0:
            eps, beta = ys.mean(), 0.0
        if eps < 0:
            eps, beta = 0.0, max(x @ ys / (x @ x), 0)
        error = np.square(ys - eps - beta * x).sum()
        if error < best[0] - 1e-12:
            best = (error, alpha, beta)
    _, alpha, beta = best
    return alpha * (beta * n**-alpha) / n


def literal_ascent(helpful, eta, smoothing, memory):
    w, a, spread, out = CONFIGURED, np.zeros(M), 0.0, []
    for t, h in enumerate(helpful, start=1):
        a = smoothing * a + (1 - smoothing) * h
        d = a / (1 - smoothing**t)
        d = d - w @ d
        spread = memory * spread + (1 - memory) * np.mean(d**2)
        r = np.sqrt(max(spread / (1 - memory**t), np.mean(d**2)))
        w = w * np.exp(eta * d / r)
        w = w / w.sum()
        out.append(w)
    return out


def literal_group(seen, tau, smoothing):
    a, out = np.zeros(M), []
    for t, o in enumerate(seen, start=1):
        a = smoothing * a - (1 - smoothing) * o["influence_M"]
        h = a / (1 - smoothing**t)
        out.append(softmax(np.log(CONFIGURED) + h / (tau * np.std(h))))
    return out


def literal_share(seen, smoothing):
    a, w, out = np.zeros(M), CONFIGURED, []
    for t, o in enumerate(seen, start=1):
        a = smoothing * a - (1 - smoothing) * o["influence_M"]
        h = np.maximum(a / (1 - smoothing**t), 0)
        w = h / h.sum() if h.sum() > 0 else w
        out.append(w)
    return out


REFERENCE = [2.0, 2.5, 1.5, 3.0, 2.2]
CASES = {
    "odm": (odm(0.9), lambda seen: literal_odm(seen, 0.9)),
    "doremi": (
        doremi(REFERENCE, 0.3, 1e-2),
        lambda seen: literal_doremi(seen, REFERENCE, 0.3, 1e-2),
    ),
    "doge": (doge(0.2), lambda seen: literal_doge(seen, 0.2, True)),
    "doge as in the paper": (
        doge(0.1, normalised=False),
        lambda seen: literal_doge(seen, 0.1, False),
    ),
    "aioli": (aioli(0.7, 0.25, 4), lambda seen: literal_aioli(seen, 0.7, 0.25, 4)),
    "ado": (ado(), lambda seen: literal_ado(seen, 0.1, 0.1, 0.5, 0.01)),
    "influence": (
        influence(0.3, 0.5),
        lambda seen: literal_ascent([-o["influence_M"] for o in seen], 0.3, 0.5, 0.9),
    ),
    "alignment": (
        alignment(0.3, 0.2),
        lambda seen: literal_ascent([o["alignment_M"] for o in seen], 0.3, 0.2, 0.9),
    ),
    "group_influence": (group_influence(0.5, 0.5), lambda seen: literal_group(seen, 0.5, 0.5)),
    "influence_share": (influence_share(0.5), lambda seen: literal_share(seen, 0.5)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_policy_equals_its_papers_equations(name, seed):
    policy, literal = CASES[name]
    seen = observations(seed)
    got, _ = drive(policy, seen)
    want = np.array(literal(seen))
    np.testing.assert_allclose(got, want, atol=1e-6, rtol=0)
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-9)
    assert np.ptp(want, axis=0).max() > 5e-3  # the weights did move


@pytest.mark.parametrize("name", CASES)
def test_policy_restored_midway_goes_on_with_the_same_bits(name, tmp_path):
    """State written as plain arrays and read again, as a checkpoint does."""
    policy, _ = CASES[name]
    seen = observations(3)
    whole, _ = drive(policy, seen)
    half, state = drive(policy, seen[: MOVES // 2])
    leaves, treedef = jax.tree.flatten(state)
    np.savez(tmp_path / "state.npz", *[np.asarray(x) for x in leaves])
    with np.load(tmp_path / "state.npz") as read:
        state = jax.tree.unflatten(treedef, [read[f"arr_{k}"] for k in range(len(leaves))])
    weights_M, update = jnp.asarray(half[-1]), jax.jit(policy.update)
    for record, want in zip(seen[MOVES // 2 :], whole[MOVES // 2 :], strict=True):
        fields = {key: jnp.asarray(record[key]) for key in policy.needs}
        weights_M, state = update(
            Observation(jnp.int32(record["step"]), weights_M, **fields), state
        )
        np.testing.assert_array_equal(weights_M, want)


def test_doremi_and_doge_keep_the_mean_that_a_proxy_run_recommends():
    for name in ("doremi", "doge"):
        got, state = drive(CASES[name][0], observations(2))
        np.testing.assert_allclose(state.mean_M, average_weights(got), atol=1e-9)


def test_temperature_and_stages_equal_their_formulas():
    start = temperature(2.0, [900, 400, 100, 100, 100]).start(jnp.asarray(CONFIGURED))
    np.testing.assert_allclose(start, np.array([30, 20, 10, 10, 10]) / 80)
    unit = np.eye(M)
    for interpolate in (False, True):
        policy = stages([10, 30], [unit[0], unit[1]], interpolate=interpolate)
        state = policy.init(jnp.asarray(CONFIGURED))
        for step in (0, 5, 10, 25, 30, 99):
            at = Observation(jnp.int32(step), jnp.asarray(CONFIGURED))
            got, state = policy.update(at, state)
            if interpolate:
                table = np.array([CONFIGURED, unit[0], unit[1]])
                want = [np.interp(step, [0, 10, 30], table[:, i]) for i in range(M)]
            else:
                want = CONFIGURED if step < 10 else unit[0] if step < 30 else unit[1]
            np.testing.assert_allclose(got, want, atol=1e-12)
