"""Products against dense matrices by `jax.hessian` and `jax.jacrev`, and how they may be split."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dh_jax.errors import ConfigError, DataError
from dh_jax.influence.gradients import select
from dh_jax.influence.objective import Objective, Scope
from dh_jax.influence.products import accumulated, batch_product
from tests.dh_jax.influence import tiny

KEY = jax.random.PRNGKey(3)
T, S = 9, 4
OBJECTIVE = Objective(tiny.sequence_loss, tiny.sequence_logits)
CURVATURES = ("hessian", "gauss_newton", "empirical_fisher")
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def documents(rows=6, seed=0):
    return tiny.pack(tiny.random_rows(np.random.default_rng(seed), rows, T), T)


def split(batch, *sizes):
    edges = np.cumsum((0, *sizes))
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], batch) for a, b in itertools.pairwise(edges)]


@functools.cache
def dense(curvature, reduction):
    """The matrix itself, in float64, over all parameters in the order of `ravel_pytree`."""
    params, batch = tiny.sequence_params(KEY, jnp.float64), documents()
    return np.asarray(jax.jit(lambda x: _dense(curvature, x, batch, reduction))(params))


def _dense(curvature, params, batch, reduction):
    flat, unravel = ravel_pytree(select(params).blocks)
    merge = select(params).merge
    counts = tiny.target_counts(batch, S)  # (B, S)
    n = (counts > 0).sum()
    weight = np.asarray(batch.loss_mask_BT, np.float64)
    if reduction == "mean":
        padded = np.pad(np.maximum(counts, 1), ((0, 0), (1, 0)), constant_values=1)
        weight = weight / np.take_along_axis(padded, batch.segment_ids_BT, axis=1)

    def losses(x):
        return tiny.sequence_loss(merge(unravel(x)), batch, KEY)

    if curvature == "hessian":
        return jax.hessian(lambda x: (weight * losses(x)).sum())(flat) / n
    if curvature == "gauss_newton":
        z = tiny.sequence_logits(params, batch)
        J = jax.jacfwd(lambda x: tiny.sequence_logits(merge(unravel(x)), batch))(flat)
        p = jax.nn.softmax(z)
        H = jnp.einsum("btv,vw->btvw", p, jnp.eye(tiny.VOCAB)) - jnp.einsum("btv,btw->btvw", p, p)
        return jnp.einsum("btvp,btvw,btwq,bt->pq", J, H, J, weight) / n
    J = jax.jacfwd(losses)(flat) * weight[..., None]
    own = batch.segment_ids_BT[..., None] == np.arange(1, S + 1)
    g = jnp.einsum("btp,bts->bsp", J, own).reshape(-1, flat.size)
    return g.T @ g / n


@functools.cache
def product(curvature, reduction="sum", chunk=4):
    return batch_product(
        OBJECTIVE, Scope(max_segments=S, reduction=reduction, chunk=chunk), curvature
    )


def operator(params, data, curvature, reduction="sum", chunk=4):
    scope = Scope(max_segments=S, reduction=reduction, chunk=chunk)
    return accumulated(product(curvature, reduction, chunk), scope, params, data, KEY)


def stacked(params, count, dtype, seed=1):
    rng = np.random.default_rng(seed)
    return {
        n: jnp.asarray(rng.normal(size=(count, *b.shape)), dtype)
        for n, b in select(params).blocks.items()
    }


def as_rows(vectors):
    return np.stack(
        [ravel_pytree({n: v[k] for n, v in vectors.items()})[0] for k in range(3)]
    ).astype(np.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_products_equal_the_dense_matrix(curvature, reduction, dtype):
    with jax.enable_x64(True):
        params = tiny.sequence_params(KEY, jnp.float64)
        batch = documents()
        matrix = dense(curvature, reduction)
        low = jax.tree.map(lambda x: x.astype(dtype), params)
        vectors = stacked(params, 3, dtype)
        with jax.enable_x64(dtype == "float64"):
            got = operator(low, [batch], curvature, reduction)(vectors)
        assert all(v.dtype == dtype for v in got.values())
        want = as_rows(vectors) @ matrix
        error = np.linalg.norm(as_rows(got) - want, axis=1) / np.linalg.norm(want, axis=1)
        assert error.max() < TOLERANCE[dtype]
        assert np.abs(matrix - matrix.T).max() < 1e-12 * np.abs(matrix).max()


@pytest.mark.parametrize(
    "curvature", [*CURVATURES, pytest.param("sampled_fisher", marks=pytest.mark.slow)]
)
def test_products_are_symmetric_and_a_stack_is_its_vectors(curvature):
    params = tiny.sequence_params(KEY)
    apply = operator(params, [documents()], curvature)
    vectors = stacked(params, 3, jnp.float32)
    moved = apply(vectors)
    single = apply({n: v[1] for n, v in vectors.items()})
    for name, v in single.items():
        np.testing.assert_allclose(v, moved[name][1], rtol=1e-5, atol=1e-6)
    x, y = as_rows(vectors), as_rows(moved)
    scale = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)
    assert (np.abs(x @ y.T - (x @ y.T).T) / scale).max() < 1e-6
    if curvature != "hessian":
        assert (np.diag(x @ y.T) > 0).all()


@pytest.mark.parametrize(
    "curvature",
    [c if c == "gauss_newton" else pytest.param(c, marks=pytest.mark.slow) for c in CURVATURES],
)
def test_how_data_is_split_does_not_matter(curvature):
    params = tiny.sequence_params(KEY)
    batch, vectors = documents(), stacked(params, 3, jnp.float32)
    whole = as_rows(operator(params, [batch], curvature, chunk=8)(vectors))
    for sizes, chunk in (((3, 3), 8), ((1, 2, 3), 1)):
        parts = as_rows(operator(params, split(batch, *sizes), curvature, chunk=chunk)(vectors))
        error = np.linalg.norm(parts - whole, axis=1) / np.linalg.norm(whole, axis=1)
        assert error.max() < 1e-6


@pytest.mark.parametrize("reduction", [pytest.param("sum", marks=pytest.mark.slow), "mean"])
def test_sampled_fisher_tends_to_the_dense_gauss_newton_matrix(reduction):
    """The mean over many draws; documents of several targets, so cross terms must cancel, and of
    different lengths, so that no one factor makes up for wrong weights."""
    draws = 1000
    with jax.enable_x64(True):
        params, batch = tiny.sequence_params(KEY, jnp.float64), documents()
        vectors = stacked(params, 3, jnp.float64)
        want = as_rows(vectors) @ dense("gauss_newton", reduction)
        kernel = product("sampled_fisher", reduction)
        counts = tiny.target_counts(batch, S)
        assert len(np.unique(counts[counts > 0])) > 2
        each = jax.jit(lambda keys: jax.lax.map(lambda k: kernel(params, vectors, batch, k), keys))(
            jax.random.split(KEY, draws)
        )
        each = np.stack([as_rows({p: v[i] for p, v in each.items()}) for i in range(draws)])
    each /= (counts > 0).sum()
    spread = each.std(axis=0) / draws**0.5
    z = (each.mean(axis=0) - want) / np.maximum(spread, 1e-9)
    assert np.abs(z).max() < 5  # 3 x 115 entries
    assert np.linalg.norm(each.mean(axis=0) - want) < 0.1 * np.linalg.norm(want)


def test_a_subset_of_parameters_gives_its_block_of_the_matrix():
    with jax.enable_x64(True):
        params = tiny.sequence_params(KEY, jnp.float64)
        batch = documents()
        scope = Scope("mix", max_segments=S)
        apply = accumulated(batch_product(OBJECTIVE, scope, "hessian"), scope, params, [batch], KEY)
        got = apply({"mix/kernel": jnp.eye(16).reshape(16, 4, 4)})["mix/kernel"].reshape(16, 16)
        matrix = dense("hessian", "sum")
        names = np.concatenate(
            [np.full(b.size, n) for n, b in sorted(select(params).blocks.items())]
        )
        own = names == "mix/kernel"
        np.testing.assert_allclose(got, matrix[own][:, own], rtol=1e-10, atol=1e-13)


def test_what_cannot_be_computed_is_refused():
    params = tiny.sequence_params(KEY)
    vectors = stacked(params, 3, jnp.float32)
    with pytest.raises(ConfigError, match="'gauss_newton' needs"):
        batch_product(Objective(tiny.sequence_loss), Scope(), "gauss_newton")
    with pytest.raises(ConfigError, match="no curvature 'fischer'"):
        batch_product(OBJECTIVE, Scope(), "fischer")
    with pytest.raises(ConfigError, match=r"statistics in bfloat16 drown.*take float32"):
        batch_product(OBJECTIVE, Scope(dtype="bfloat16"), "hessian")
    scope = Scope(max_segments=1)
    kernel = batch_product(OBJECTIVE, scope, "hessian")
    with pytest.raises(DataError, match=r"batch 0: a row has \d segments, above max_segments 1"):
        accumulated(kernel, scope, params, [documents()], KEY)(vectors)
    with pytest.raises(DataError, match="no batch to measure"):
        accumulated(kernel, scope, params, iter([]), KEY)(vectors)
