"""Gradient products, cosines, TracIn, DataInf, Woodbury and projections against dense formulas."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.errors import ConfigError, DataError
from dh_jax.influence.empirical_fisher import datainf, woodbury
from dh_jax.influence.estimator import score
from dh_jax.influence.first_order import Checkpoints, gradient_cosine, gradient_dot, tracin
from dh_jax.influence.objective import Objective, Scope
from dh_jax.influence.projection import projection
from dh_jax.influence.sketch import Sketch, project
from tests.dh_jax.influence import tapped_tiny, tiny
from tests.dh_jax.influence.test_ekfac import cut
from tests.dh_jax.influence.test_per_document import lone_gradients

pytestmark = pytest.mark.filterwarnings("ignore::dh_jax.influence.estimator.CoverageWarning")
KEY = jax.random.PRNGKey(2)
T = 8
SCOPE = Scope("down|embed|norm", chunk=4, dtype="float64")  # a row is a document, for speed


def rows(seed, count):
    rng = np.random.default_rng(seed)
    documents = [[rng.integers(0, tiny.VOCAB, rng.integers(3, T + 1))] for _ in range(count)]
    return documents, tiny.pack(documents, T)


@functools.cache
def problem():
    """Parameters, batches, and lone-document gradients by tensor: (N, size) each."""
    with jax.enable_x64(True):
        params = tapped_tiny.make_params(KEY, jnp.float64)
        sets = [rows(seed, count) for seed, count in ((0, 8), (1, 4), (2, 8))]
        out = []
        for documents, _ in sets:
            blocks = lone_gradients(tapped_tiny.loss, params, documents, T)
            chosen = [n for n in blocks if any(x in n for x in ("down", "embed", "norm"))]
            out.append({n: blocks[n][:, 0].reshape(len(documents), -1) for n in chosen})
        return params, [batch for _, batch in sets], out


def joined(g):
    return np.concatenate([g[n] for n in sorted(g)], axis=1)


def run(make, objective=tapped_tiny.TAPPED, params=None, **options):
    with jax.enable_x64(True):
        given, (train, probe, other), _ = problem()
        params = given if params is None else params
        estimator = make(objective, SCOPE, **options)
        state = estimator.fit(params, cut(train, 4, 4), KEY)
        return score(estimator, params, state, [probe], cut(other, 4, 4), KEY).values_KN


def test_gradient_products_and_cosines():
    _, _, (_, v, k) = problem()
    v, k = joined(v), joined(k)
    want = -v @ k.T
    np.testing.assert_allclose(run(gradient_dot), want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(run(gradient_dot, tapped_tiny.PLAIN), want, rtol=1e-9, atol=1e-12)
    norms = np.linalg.norm(v, axis=1)[:, None] * np.linalg.norm(k, axis=1)
    np.testing.assert_allclose(run(gradient_cosine), want / norms, rtol=1e-9, atol=1e-12)


def test_tracin_sums_checkpoints_by_their_rates():
    params, *_ = problem()
    with jax.enable_x64(True):
        moved = jax.tree.map(lambda x: 1.1 * x, params)
    checkpoints = Checkpoints((params, moved), (0.5, 2.0))
    want = 0.5 * run(gradient_dot) + 2.0 * run(gradient_dot, params=moved)
    np.testing.assert_allclose(run(tracin, params=checkpoints), want, rtol=1e-9)
    with pytest.raises(ConfigError, match=r"2 checkpoints, learning rates \[nan\]"):
        run(tracin, params=checkpoints._replace(rates=(1.0, float("nan"))))


def test_datainf_equals_a_literal_loop_over_its_formula():
    _, _, (g, v, k) = problem()
    want = np.zeros((len(joined(v)), len(joined(k))))
    for n in g:
        lam = 0.3 * np.mean(g[n] ** 2)
        for q, one in enumerate(v[n]):
            for d, other in enumerate(k[n]):
                swapped = 0.0
                for gi in g[n]:
                    swapped += (one @ gi) * (gi @ other) / (lam + gi @ gi)
                want[q, d] += (swapped / len(g[n]) - one @ other) / lam
    np.testing.assert_allclose(run(datainf, damping=0.3), want, rtol=1e-6)


def test_woodbury_equals_the_dense_solve():
    _, _, (g, v, k) = problem()
    g, v, k = joined(g), joined(v), joined(k)
    lam = 0.1 * np.mean(g**2)
    want = -v @ np.linalg.solve(g.T @ g / len(g) + lam * np.eye(g.shape[1]), k.T)
    got = run(woodbury)
    assert np.linalg.norm(got - want) < 1e-8 * np.linalg.norm(want)


def test_gradients_that_would_not_fit_are_refused_before_they_are_made():
    for make in (woodbury, datainf):
        with pytest.raises(ConfigError, match=r"take [\d,]+ bytes, above max_bytes 1,000; fit on"):
            run(make, max_bytes=1000)
        with pytest.raises(ConfigError, match="damping is -1"):
            make(tapped_tiny.TAPPED, SCOPE, damping=-1.0)


# --- projections -----------------------------------------------------------------------------


def test_projected_products_are_within_five_percent_of_exact_ones():
    """At k = 2,048, relative to the norms: of real gradients, and of random vectors."""
    _, _, (g, v, _) = problem()
    rng = np.random.default_rng(0)
    spiky = rng.normal(size=(40, 5000)) ** 5  # a few entries carry most of the norm
    related = spiky + rng.normal(size=(40, 5000)) * 10
    pairs = [(joined(g), joined(v)), (spiky, related), (rng.normal(size=(40, 9000)),) * 2]
    for a, b in pairs:
        errors = []
        for seed in range(4):
            sketch = Sketch(2048, seed)
            phi, psi = (np.asarray(project(sketch, "w", jnp.asarray(x, "f4"))) for x in (a, b))
            norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
            errors.append((phi @ psi.T - a @ b.T) / norms)
        assert np.sqrt(np.mean(np.square(errors))) < 0.05
        assert abs(np.mean(errors)) < 0.01  # unbiased


@pytest.mark.parametrize("kernel", ["fisher", "trak", "cosine"])
def test_projected_scores_equal_the_formula_on_sketches(kernel):
    params, (train, _, _), gradients = problem()
    sketch = Sketch(64, 5)
    with jax.enable_x64(True):
        shaped = [{n: jnp.asarray(x) for n, x in g.items()} for g in gradients]
        phi, q, d = (np.asarray(sum(project(sketch, n, x) for n, x in g.items())) for g in shaped)
        loss_BT = np.asarray(tapped_tiny.loss(params, train, KEY))
    if kernel == "cosine":
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, d)]
        want = -unit[0] @ unit[1].T
    else:
        if kernel == "trak":
            mean = loss_BT.sum(axis=1) / train.loss_mask_BT.sum(axis=1)
            phi = phi / (1 - np.exp(-mean))[:, None]
        matrix = phi.T @ phi / len(phi)
        matrix += 0.1 * np.trace(matrix) / 64 * np.eye(64)
        want = -q @ np.linalg.solve(matrix, d.T)
    got = run(projection, kernel=kernel, size=64, seed=5)
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9 * np.abs(want).max())


def test_impossible_projections_are_refused():
    for options, message in (
        ({"size": 1000}, "sketch size is 1000; take a power of two"),
        ({"kernel": "gauss"}, "kernel 'gauss'"),
        ({"damping": 0.0}, "damping is 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            projection(tapped_tiny.TAPPED, SCOPE, **options)


def test_any_loss_will_do_and_a_broken_document_is_named():
    """Plainly, by a loss that nothing else is known of."""
    params = tiny.sequence_params(KEY)
    params["embed"] = params["embed"].at[3].set(jnp.inf)
    fine, broken = (tiny.pack([[np.array(d)]], T) for d in ([1, 2, 4], [1, 3, 5]))
    estimator = datainf(Objective(tiny.sequence_loss), Scope())
    with pytest.raises(DataError, match=r"batch 1, row 0, document \(segment\) 1: gradient is"):
        estimator.fit(params, [fine, broken], KEY)
    state = estimator.fit(params, [fine], KEY)
    assert np.isfinite(score(estimator, params, state, [fine], [fine], KEY).values_KN).all()
