"""Iterative solvers against dense solves, and what they do past convergence."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dh_jax.errors import ConfigError, DataError
from dh_jax.influence.ekfac import ekfac
from dh_jax.influence.estimator import score
from dh_jax.influence.gradients import select
from dh_jax.influence.iterative import conjugate_gradient, lissa, low_rank
from dh_jax.influence.krylov import block_krylov, conjugate_gradients, lanczos, ritz
from dh_jax.influence.objective import Objective, Scope
from tests.dh_jax.influence import tapped_tiny
from tests.dh_jax.influence.test_ekfac import cut
from tests.dh_jax.influence.test_estimators import rows

pytestmark = pytest.mark.filterwarnings("ignore::dh_jax.influence.estimator.CoverageWarning")
KEY = jax.random.PRNGKey(8)


def matrix(seed=0, size=30, rank=30):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    values = np.where(np.arange(size) < rank, np.logspace(0, -3, size), 0)
    return (q * values) @ q.T


def as_map(A):
    A = jnp.asarray(A)
    return jax.jit(lambda x: {"a": (y := _flat(x) @ A)[:, :10], "b": y[:, 10:].reshape(-1, 4, 5)})


def _flat(x):
    return jnp.concatenate([x["a"], x["b"].reshape(len(x["b"]), -1)], axis=1)


def blocks(rows):
    rows = jnp.asarray(rows)
    return {"a": rows[:, :10], "b": rows[:, 10:].reshape(-1, 4, 5)}


def same(x):
    return x


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
@pytest.mark.parametrize("rank", [pytest.param(30, marks=pytest.mark.slow), 12])
def test_past_convergence_nothing_changes_and_nothing_is_nan(rank, dtype):
    with jax.enable_x64(dtype == "float64"):
        A = matrix(rank=rank) + 1e-2 * np.eye(30)
        b = np.random.default_rng(1).normal(size=(3, 30))
        b[1] = b[0]  # equal sides make the block dependent
        b[2] = 0  # and one is solved already
        want = np.linalg.solve(A, b.T).T
        bounds = {"float32": 1e-3, "float64": 1e-9}
        apply, bare = as_map(A.astype(dtype)), as_map((A - 1e-2 * np.eye(30)).astype(dtype))
        sides = blocks(b.astype(dtype))
        alone = conjugate_gradients(apply, sides, same, 200, 0.0)
        together = block_krylov(bare, sides, same, 1e-2, 200, 0.0)
        for solution in (alone, together):
            x = np.asarray(_flat(solution.x))
            assert np.isfinite(x).all() and np.isfinite(solution.residual_K).all()
            assert np.linalg.norm(x - want) < bounds[dtype] * np.linalg.norm(want)
            assert not x[2].any()
        assert together.steps <= 31 and alone.steps < 100  # both stop by themselves


def test_a_block_needs_fewer_products_than_its_sides_alone():
    with jax.enable_x64(True):
        A, b = matrix(size=30), np.random.default_rng(2).normal(size=(6, 30))
        alone = conjugate_gradients(as_map(A + 1e-2 * np.eye(30)), blocks(b), same, 99, 1e-6)
        together = block_krylov(as_map(A), blocks(b), same, 1e-2, 99, 1e-6)
    assert together.steps < 0.5 * alone.steps
    assert max(alone.residual_K.max(), together.residual_K.max()) < 1e-6


def test_later_steps_compile_nothing():
    compiled = []

    def listen(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about.get("fun_name"))

    apply, b = as_map(matrix().astype("float32")), np.random.default_rng(5).normal(size=(2, 30))
    sides = blocks(b.astype("float32"))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert block_krylov(apply, sides, same, 1.0, 15, 0.5).steps <= 3
        assert compiled
        compiled.clear()
        assert block_krylov(apply, sides, same, 1e-2, 15, 0.0).steps > 8
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_good_preconditioner_saves_steps():
    with jax.enable_x64(True):
        A, b = matrix(), np.random.default_rng(3).normal(size=(2, 30))
        near = np.linalg.inv(A + 2e-3 * np.eye(30))  # of twice the shift
        plain, helped = (
            block_krylov(as_map(A), blocks(b), m, 1e-3, 99, 1e-4).steps
            for m in (same, as_map((near + near.T) / 2))
        )
    assert helped < 0.6 * plain


def test_lanczos_finds_the_spectrum_and_stops_where_the_space_closes():
    with jax.enable_x64(True):
        A = matrix(rank=5)
        space = lanczos(as_map(A), blocks(np.random.default_rng(4).normal(size=(1, 30))), 40)
        values, _ = ritz(space)
    assert len(values) <= 8
    np.testing.assert_allclose(values[::-1][:5], np.logspace(0, -3, 30)[:5], rtol=1e-8)


# --- as estimators ---------------------------------------------------------------------------


@functools.cache
def dense_problem():
    """The tapped tensors' Gauss-Newton matrix, and gradients, by plain differentiation."""
    with jax.enable_x64(True):
        params = tapped_tiny.make_params(KEY, jnp.float64)
        batches = [rows(seed, count)[1] for seed, count in ((0, 8), (1, 4), (2, 8))]
        selection = select(params, "down|norm")
        flat, unravel = ravel_pytree(selection.blocks)

        def losses(x, batch):
            return tapped_tiny.loss(selection.merge(unravel(x)), batch, KEY)

        @jax.jit
        def curvature(batch):
            out = lambda x: tapped_tiny.logits(selection.merge(unravel(x)), batch)  # noqa: E731
            J, p = jax.jacfwd(out)(flat), jax.nn.softmax(out(flat))
            mean = jnp.einsum("btv,btvp->btp", p, J)
            G = jnp.einsum("btv,btvp,btvq,bt->pq", p, J, J, batch.loss_mask_BT)
            return G - jnp.einsum("btp,btq,bt->pq", mean, mean, batch.loss_mask_BT)

        document_gradients = jax.jit(lambda batch: jax.jacfwd(losses)(flat, batch).sum(axis=1))
        v, k = (np.asarray(document_gradients(batch)) for batch in batches[1:])
        return params, batches, np.asarray(curvature(batches[0])) / 8, v, k


SCOPE = Scope("down|norm", chunk=8, dtype="float64")  # a row is a document, for speed


def fit_and_score(estimator, count=2):
    with jax.enable_x64(True):
        params, (train, probe, other), *_ = dense_problem()
        state = estimator.fit(params, cut(train, *[8 // count] * count), KEY)
        scores = score(estimator, params, state, [probe], [other], KEY)
        return state, scores.values_KN


def exact(shift):
    _, _, G, v, k = dense_problem()
    return -v @ np.linalg.solve(G + float(shift) * np.eye(len(G)), k.T)


@pytest.mark.parametrize(
    ("block", "helped"), [pytest.param(True, True, marks=pytest.mark.slow), (False, False)]
)
def test_conjugate_gradients_solve_the_damped_gauss_newton_system(helped, block):
    with jax.enable_x64(True):
        helper = ekfac(tapped_tiny.TAPPED, SCOPE) if helped else None
        estimator = conjugate_gradient(
            tapped_tiny.TAPPED, SCOPE, preconditioner=helper, block=block, steps=80, tolerance=1e-9
        )
    state, got = fit_and_score(estimator)
    want = exact(state.shift)
    assert np.linalg.norm(got - want) < 1e-7 * np.linalg.norm(want)
    trace = np.trace(dense_problem()[2])
    size = len(dense_problem()[2])
    assert 0.5 < float(state.shift) / (0.1 * trace / size) < 2  # an estimate of the stated rule


@pytest.mark.slow
def test_low_rank_is_close_where_the_spectrum_falls():
    with jax.enable_x64(True):
        estimator = low_rank(tapped_tiny.TAPPED, SCOPE, rank=20)
    state, got = fit_and_score(estimator, 1)
    assert np.corrcoef(got.ravel(), exact(state.shift).ravel())[0, 1] > 0.95


@pytest.mark.slow
def test_low_rank_at_full_rank_is_exact():
    with jax.enable_x64(True):
        estimator = low_rank(tapped_tiny.TAPPED, SCOPE, rank=60)
    state, got = fit_and_score(estimator, 1)
    want = exact(state.shift)
    assert np.linalg.norm(got - want) < 1e-6 * np.linalg.norm(want)


def test_lissa_is_its_series_and_refuses_a_scale_at_which_it_would_diverge():
    with jax.enable_x64(True):
        estimator = lissa(tapped_tiny.TAPPED, SCOPE, steps=60)
    state, got = fit_and_score(estimator, 1)
    _, _, G, v, k = dense_problem()
    series, r = np.eye(len(G)) - (G + float(state.shift) * np.eye(len(G))) / float(state.scale), v
    for _ in range(60):
        r = v + r @ series
    want = -r @ k.T / float(state.scale)
    assert np.linalg.norm(got - want) < 1e-9 * np.linalg.norm(want)
    assert np.corrcoef(got.ravel(), exact(state.shift).ravel())[0, 1] > 0.9
    largest = np.linalg.eigvalsh(dense_problem()[2])[-1] + float(state.shift)
    assert 1 < float(state.scale) / largest < 1.11
    with jax.enable_x64(True):
        small = lissa(tapped_tiny.TAPPED, SCOPE, scale=0.5 * largest)
    with pytest.raises(ConfigError, match=r"lissa scale is .* not above the largest eigenvalue"):
        fit_and_score(small, 1)


def test_impossible_settings_are_refused():
    for make, options, message in (
        (conjugate_gradient, {"damping": 0.0}, "damping is 0.0"),
        (conjugate_gradient, {"steps": 0}, "is 0; the least is 1"),
        (conjugate_gradient, {"tolerance": -1.0}, "tolerance is -1"),
        (low_rank, {"rank": 0}, "is 0; the least is 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(tapped_tiny.TAPPED, Scope("down"), **options)
    blind = Objective(tapped_tiny.loss)
    with pytest.raises(ConfigError, match="needs Objective"):
        lissa(blind, Scope())
    params = tapped_tiny.make_params(KEY)
    blank = rows(0, 2)[1]
    blank = blank._replace(loss_mask_BT=np.zeros_like(blank.loss_mask_BT))
    with pytest.raises(DataError, match=r"trace is 0.0; it must be finite and above 0"):
        low_rank(tapped_tiny.PLAIN, Scope("down")).fit(params, [blank], KEY)
