"""EK-FAC and K-FAC against their literal formulas in float64 NumPy, and against kronfluence."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.errors import ConfigError, DataError
from dh_jax.influence.ekfac import ekfac
from dh_jax.influence.estimator import CoverageWarning, score
from dh_jax.influence.objective import Scope
from tests.dh_jax.influence import tapped_tiny, tiny
from tests.dh_jax.influence.test_per_document import lone_gradients

pytestmark = pytest.mark.filterwarnings(
    "ignore::dh_jax.influence.estimator.CoverageWarning"  # of tiny models the head is a good part
)
KEY = jax.random.PRNGKey(11)
T, S = 12, 4
SCOPED = tapped_tiny.SCOPED


def rows(seed, count):
    """Packed rows; one document of each batch has nothing to learn."""
    documents = tiny.random_rows(np.random.default_rng(seed), count, T)
    batch = tiny.pack(documents, T)
    last = batch.segment_ids_BT[0].max()
    batch.loss_mask_BT[0, batch.segment_ids_BT[0] == last] = False
    return documents, batch


# --- the literal formula ---------------------------------------------------------------------


def uses_of(params, batch):
    """For every tensor the layers that use it: activations (bias as a 1, ids one-hot) and
    cotangents, all tokens of documents with a target: lists of (tokens, I), (tokens, O)."""
    taps = tapped_tiny.zero_taps(params, batch)
    total = lambda taps: tapped_tiny.tapped(params, taps, batch, KEY)[0].sum()  # noqa: E731
    d = jax.grad(total)(taps)
    a = tapped_tiny.tapped(params, taps, batch, KEY)[1]
    counts = tiny.target_counts(batch, S)
    own = np.pad(counts > 0, ((0, 0), (1, 0)))
    learnt = np.take_along_axis(own, batch.segment_ids_BT, axis=1)
    out = {}
    for name, layer in tapped_tiny.LAYERS.items():
        act = np.asarray(a[name])[learnt]
        if layer.kind == "embedding":
            act = np.eye(tiny.VOCAB)[act]
        elif layer.kind == "linear":
            act = np.concatenate([act, np.ones((len(act), 1))], axis=1)
        out.setdefault(layer.weight, []).append((act, np.asarray(d[name])[learnt]))
    return out


def matrices(g):
    """Gradients by path as EK-FAC sees them: biases are the last rows of their kernels."""
    out = {}
    for layer in tapped_tiny.LAYERS.values():
        x = g[layer.weight]
        if layer.bias:
            x = np.concatenate([x, g[layer.bias][:, None, :]], axis=1)
        out[layer.weight] = x
    return out


def literal(params, batch, train, queries, documents, strategy, damping=0.1):
    """Scores by the formula: a loop over tensors, dense eigendecompositions, no factored form."""
    n = len(next(iter(train.values())))
    total = 0.0
    for path, uses in uses_of(params, batch).items():
        g, v, k = train[path], queries[path], documents[path]
        if g.ndim == 2:  # a scale
            values = (g**2).mean(axis=0)
            total += (v / (values + damping * values.mean())) @ k.T
            continue
        a, d = (np.concatenate(x) for x in zip(*uses, strict=True))
        A, D = a.T @ a / len(a), d.T @ d / n
        eigen_a, q_a = np.linalg.eigh(A)
        eigen_d, q_d = np.linalg.eigh(D)
        values = np.mean([(q_a.T @ x @ q_d) ** 2 for x in g], axis=0)
        if strategy == "kfac":
            values = np.outer(eigen_a, eigen_d)
        inverse = 1 / (values + damping * values.mean())
        moved = np.stack([q_a @ ((q_a.T @ x @ q_d) * inverse) @ q_d.T for x in v])
        total += np.einsum("kio,nio->kn", moved, k)
    return -total


def flattened(documents, batch, params):
    """(N, *shape) lone-document gradients of documents with a target."""
    there = tiny.target_counts(batch, S) > 0
    blocks = lone_gradients(tapped_tiny.loss, params, documents, T)
    return matrices({p: g[there] for p, g in blocks.items()})


@functools.cache
def problem():
    with jax.enable_x64(True):
        params = tapped_tiny.make_params(KEY, jnp.float64)
        sets = [rows(seed, count) for seed, count in ((0, 6), (1, 2), (2, 4))]
        gradients = [flattened(*each, params) for each in sets]
        return params, [batch for _, batch in sets], gradients


def cut(batch, *sizes):
    edges = np.cumsum((0, *sizes))
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], batch) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        ("ekfac", "float64"),
        pytest.param("ekfac", "float32", marks=pytest.mark.slow),
        ("kfac", "float64"),
    ],
)
def test_scores_equal_the_literal_formula(strategy, dtype):
    """Packed, masked, several tokens, biases, a shared layer, a table (one-hot), norms."""
    params, (train, probe, other), (g, v, k) = problem()
    with jax.enable_x64(True):
        # Documents masked out whole still lie in rows; lone gradients know nothing of the mask.
        want = literal(params, train, g, v, k, strategy)
    with jax.enable_x64(dtype == "float64"):
        low = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
        scope = Scope(SCOPED, S, chunk=2, dtype=dtype)
        estimator = ekfac(tapped_tiny.TAPPED, scope, labels="true", strategy=strategy)
        state = estimator.fit(low, cut(train, 3, 3), KEY)
        got = score(estimator, low, state, [probe], cut(other, 2, 2), KEY)
    assert got.values_KN.shape == want.shape and got.values_KN.dtype == dtype
    error = np.linalg.norm(got.values_KN - want) / np.linalg.norm(want)
    assert error < (1e-9 if dtype == "float64" else 1e-5)
    assert [tuple(x) for x in np.stack(got[1:], axis=1)] == [
        (b // 2, b % 2, s + 1) for b, s in np.argwhere(tiny.target_counts(other, S) > 0)
    ]


@pytest.mark.slow
def test_without_curvature_in_the_way_scores_are_gradient_products():
    """The identity strategy: damping so large that nothing else remains."""
    params, (train, probe, other), (_, v, k) = problem()
    with jax.enable_x64(True):
        scope = Scope(SCOPED, S, dtype="float64")
        estimator = ekfac(tapped_tiny.TAPPED, scope, labels="true", damping=1e12)
        state = estimator.fit(params, [train], KEY)
        got = score(estimator, params, state, [probe], [other], KEY).values_KN
        mean = {p: np.asarray(f[-1]).mean() for p, f in state.items()}
    want = -sum(
        np.tensordot(v[p].reshape(len(v[p]), -1), k[p].reshape(len(k[p]), -1), (1, 1)) / mean[p]
        for p in v
    )
    np.testing.assert_allclose(got * 1e12, want, rtol=1e-6)


# --- labels ----------------------------------------------------------------------------------


def one_target(batch):
    mask = np.zeros_like(batch.loss_mask_BT)
    mask[:, 0] = batch.loss_mask_BT[:, 0]
    return batch._replace(loss_mask_BT=mask)


@pytest.mark.slow
def test_all_labels_are_what_many_samples_tend_to():
    params = tapped_tiny.make_params(KEY)
    batch = one_target(rows(3, 6)[1])
    scope = Scope("down|embed", S)
    exact = ekfac(tapped_tiny.TAPPED, scope, labels="all").fit(params, [batch], KEY)
    rough = ekfac(tapped_tiny.TAPPED, scope, samples=300).fit(params, [batch], KEY)
    for path, factor in exact.items():
        want, got = (np.sort(np.asarray(f[path][-1]).ravel()) for f in (exact, rough))
        assert np.linalg.norm(got - want) < 0.15 * np.linalg.norm(want), path
        orthogonal = np.asarray(factor[-2])
        np.testing.assert_allclose(orthogonal.T @ orthogonal, np.eye(len(orthogonal)), atol=1e-6)
    with pytest.raises(DataError, match=r"a document has \d+ targets; labels 'all' are exact"):
        ekfac(tapped_tiny.TAPPED, scope, labels="all").fit(params, [rows(3, 6)[1]], KEY)


@functools.cache
def gauss_newton_traces(reduction):
    """Trace of each tensor's dense Gauss-Newton matrix, in float64; a bias is with its kernel."""
    batch = rows(6, 6)[1]
    counts = np.pad(tiny.target_counts(batch, S), ((0, 0), (1, 0)))
    of_tokens = np.take_along_axis(counts, batch.segment_ids_BT, axis=1)
    assert len(np.unique(of_tokens[of_tokens > 0])) > 2  # documents of different lengths
    w = batch.loss_mask_BT / (np.maximum(of_tokens, 1) if reduction == "mean" else 1)
    params = tapped_tiny.make_params(KEY)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
        p = jax.nn.softmax(tapped_tiny.logits(params, batch))
        M = jnp.einsum("btv,vw->btvw", p, jnp.eye(tiny.VOCAB)) - p[..., None] * p[..., None, :]
        traces = {}
        for path, J in gradients_of_logits(params, batch).items():
            trace = jnp.einsum("bt,btvp,btvw,btwp->", w, J, M, J) / (counts > 0).sum()
            owner = path.replace("bias", "kernel")
            traces[owner] = traces.get(owner, 0.0) + float(trace)
    return traces


def gradients_of_logits(params, batch):
    """(B, T, V, P) Jacobians by path."""
    J = jax.jit(jax.jacfwd(lambda params: tapped_tiny.logits(params, batch)))(params)
    leaves = jax.tree_util.tree_flatten_with_path(J)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.reshape(*x.shape[:3], -1)
        for path, x in leaves
    }


@pytest.mark.slow  # test_products.py has the sampled Fisher by its dense matrix
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sampled_labels_have_the_trace_of_the_gauss_newton_matrix(reduction):
    """Lambda sums to the mean squared gradient, whatever the basis; so it must to the trace."""
    params, batch = tapped_tiny.make_params(KEY), rows(6, 6)[1]
    estimator = ekfac(tapped_tiny.TAPPED, Scope(SCOPED, S, reduction), samples=100)
    factors = estimator.fit(params, [batch], KEY)
    want = gauss_newton_traces(reduction)
    for path, factor in factors.items():
        assert abs(float(factor[-1].sum()) / want[path] - 1) < 0.2, path  # 1 - 1/T otherwise


@pytest.mark.slow
def test_sampled_labels_are_the_same_for_the_same_key():
    params = tapped_tiny.make_params(KEY)
    batches = cut(rows(4, 4)[1], 2, 2)
    estimator = ekfac(tapped_tiny.TAPPED, Scope("down", S))
    one, two, other = (estimator.fit(params, batches, k) for k in (KEY, KEY, jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.allclose(one["down/kernel"][-1], other["down/kernel"][-1], rtol=1e-3)


# --- what is refused, and said ---------------------------------------------------------------


def test_a_broken_document_is_named():
    params = tapped_tiny.make_params(KEY)
    params["embed"]["table"] = params["embed"]["table"].at[3].set(jnp.nan)
    documents = [[np.array([1, 2, 4])], [np.array([5, 6]), np.array([7, 3, 1])]]
    fine, broken = (tiny.pack(d, T) for d in (documents[:1], documents[1:]))
    estimator = ekfac(tapped_tiny.TAPPED, Scope(SCOPED, S), labels="true")
    with pytest.raises(DataError, match=r"batch 1, row 0, document \(segment\) \d: loss or grad"):
        estimator.fit(params, [fine, broken], KEY)
    state = estimator.fit(params, [fine], KEY)
    with pytest.raises(DataError, match=r"batch 0, row 0, document \(segment\) \d: gradient is"):
        score(estimator, params, state, [broken], [fine], KEY)
    with pytest.raises(DataError, match=r"batch 1, row 0, document \(segment\) \d: score is not"):
        score(estimator, params, state, [fine], [fine, broken], KEY)


def test_low_coverage_is_said():
    params = tapped_tiny.make_params(KEY)
    estimator = ekfac(tapped_tiny.TAPPED, Scope("down", S), labels="true")
    with pytest.warns(CoverageWarning, match=r"measured on 1\d% of the parameters, under 90%"):
        estimator.fit(params, [rows(5, 2)[1]], KEY)


def test_impossible_settings_are_refused():
    scope = Scope(SCOPED, S)
    for options, message in (
        ({"damping": 0.0}, "damping is 0.0"),
        ({"samples": 0}, "samples is 0"),
        ({"labels": "drawn"}, "labels 'drawn'"),
        ({"strategy": "shampoo"}, "strategy 'shampoo'"),
    ):
        with pytest.raises(ConfigError, match=message):
            ekfac(tapped_tiny.TAPPED, scope, **options)
    blind = tapped_tiny.TAPPED._replace(logits=None)
    with pytest.raises(ConfigError, match=r"labels 'sampled' need Objective\.logits"):
        ekfac(blind, scope)
    with pytest.raises(ConfigError, match="statistics in bfloat16"):
        ekfac(tapped_tiny.TAPPED, scope._replace(dtype="bfloat16"))
    batch = rows(0, 2)[1]
    blank = batch._replace(loss_mask_BT=np.zeros_like(batch.loss_mask_BT))
    with pytest.raises(DataError, match="no document has a target"):
        ekfac(tapped_tiny.TAPPED, scope).fit(tapped_tiny.make_params(KEY), [blank], KEY)
