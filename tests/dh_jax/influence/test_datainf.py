"""DataInf against float64 NumPy loops over its formula and against dense inverses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.errors import ConfigError, DataError
from dh_jax.influence.calculator import DataInfCalculator
from dh_jax.influence.datainf import mean_square
from tests.dh_jax.influence import tiny

KEY = jax.random.PRNGKey(7)
T = 12
MODELS = {
    "mlp": (tiny.mlp_loss, tiny.mlp_params),
    "sequence": (tiny.sequence_loss, tiny.sequence_params),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def problem(model="sequence", train=6, probe=3, seed=0):
    loss_fn, make = MODELS[model]
    rng = np.random.default_rng(seed)
    batches = [tiny.pack(tiny.random_rows(rng, n, T), T) for n in (train, probe, 4)]
    return loss_fn, make(KEY, jnp.float64), *batches


def row(batch, b):
    return jax.tree.map(lambda x: x[b : b + 1], batch)


@functools.cache
def shared(loss_fn):
    """One calculator, so that tests of the same shapes share its compiled programs."""
    return DataInfCalculator(loss_fn, chunk=4)


@functools.cache
def reverse(loss_fn):
    def mean(params, batch):
        return loss_fn(params, batch, KEY).sum() / batch.loss_mask_BT.sum()

    return jax.jit(jax.grad(mean))


def gradient(loss_fn, params, batch):
    """Reverse-mode gradient of one row's masked mean, by path, in NumPy."""
    paths = jax.tree_util.tree_flatten_with_path(reverse(loss_fn)(params, batch))[0]
    return {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in paths}


def gradients(loss_fn, params, batch):
    return [gradient(loss_fn, params, row(batch, b)) for b in range(len(batch.tokens_BT))]


def probe_mean(loss_fn, params, probe):
    each = gradients(loss_fn, params, probe)
    return {path: np.mean([g[path] for g in each], axis=0) for path in each[0]}


def literal_scores(train, v, queries, damping):
    """The formula, term by term."""
    out = []
    for g_k in queries:
        score = 0.0
        for path in v:
            g = [x[path].ravel() for x in train]
            lam = damping * np.mean([np.mean(x**2) for x in g])
            vl, gk = v[path].ravel(), g_k[path].ravel()
            swapped = 0.0
            for gi in g:
                swapped += (vl @ gi) * (gi @ gk) / (lam + gi @ gi)
            score += (swapped / len(g) - vl @ gk) / lam
        out.append(score)
    return np.array(out)


def run(calculator, params, train, probe, rows):
    state = calculator.fit(params, train, KEY)
    v = calculator.probe_gradient(params, probe, KEY)
    q = calculator.precondition(state, v)
    return np.asarray(calculator.score_rows(params, q, rows, KEY)), v, q


@pytest.mark.parametrize("model", MODELS)
def test_scores_equal_a_literal_loop_over_the_formula(model):
    loss_fn, params, train, probe, rows = problem(model)
    got, v, _ = run(DataInfCalculator(loss_fn, damping=0.3, chunk=4), params, train, probe, rows)
    want_v = probe_mean(loss_fn, params, probe)
    for path, block in v.items():
        np.testing.assert_allclose(block, want_v[path], rtol=1e-9, atol=1e-12)
    g = gradients(loss_fn, params, train)
    want = literal_scores(g, want_v, gradients(loss_fn, params, rows), 0.3)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got.dtype == np.float64


@pytest.mark.parametrize("examples", [127, 128, 192, 256])
def test_damping_of_a_large_block_does_not_leave_int32(examples):
    """127 examples of 2^24 entries are the last whose product an int32 holds."""
    squares_B = np.random.default_rng(examples).random(examples)
    got = jax.jit(mean_square, static_argnums=2)(
        jnp.asarray(squares_B, jnp.float32), jnp.int32(examples), 1 << 24
    )
    np.testing.assert_allclose(got, squares_B.mean() / 2**24, rtol=1e-6)


def dense_scores(fishers, v, queries):
    """-v' F^-1 g for each query, summed over blocks; the inverses by LAPACK."""
    return np.array(
        [
            -sum(v[p].ravel() @ np.linalg.solve(fishers[p], g[p].ravel()) for p in fishers)
            for g in queries
        ]
    )


def damped(g, path, damping):
    lam = damping * np.mean([np.mean(x[path] ** 2) for x in g])
    return [lam * np.eye(x[path].size) + np.outer(x[path], x[path]) for x in g]


def test_one_example_gives_the_dense_damped_fisher_inverse():
    loss_fn, params, train, probe, rows = problem("mlp", train=1)
    got, v, _ = run(shared(loss_fn), params, train, probe, rows)
    g = gradients(loss_fn, params, train)
    fishers = {path: damped(g, path, 0.1)[0] for path in v}
    want = dense_scores(
        fishers, probe_mean(loss_fn, params, probe), gradients(loss_fn, params, rows)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_one_example_repeated_gives_the_dense_damped_fisher_inverse():
    """The mean of equal inverses is the inverse of the mean, whatever n."""
    loss_fn, params, train, probe, rows = problem("mlp", train=1)
    five = jax.tree.map(lambda x: np.repeat(x, 5, axis=0), train)
    once, *_ = run(shared(loss_fn), params, train, probe, rows)
    got, *_ = run(DataInfCalculator(loss_fn, chunk=2), params, five, probe, rows)
    np.testing.assert_allclose(got, once, rtol=1e-9)


def test_many_examples_give_the_mean_of_their_dense_inverses():
    loss_fn, params, train, probe, rows = problem("mlp", train=5)
    got, v, _ = run(shared(loss_fn), params, train, probe, rows)
    g = gradients(loss_fn, params, train)
    swapped = {
        path: np.linalg.inv(np.mean([np.linalg.inv(f) for f in damped(g, path, 0.1)], axis=0))
        for path in v
    }
    want = dense_scores(
        swapped, probe_mean(loss_fn, params, probe), gradients(loss_fn, params, rows)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_documents_of_packed_rows_score_as_they_would_alone():
    loss_fn, params, train, probe, _ = problem()
    documents = tiny.random_rows(np.random.default_rng(5), 5, T)
    packed = tiny.pack(documents, T)
    calculator = shared(loss_fn)
    _, _, q = run(calculator, params, train, probe, packed)
    got = np.asarray(calculator.score_documents(params, q, packed, 5, KEY))
    assert got.shape == (5, 5)
    want = np.zeros_like(got)
    for b, row_documents in enumerate(documents):
        for s, document in enumerate(row_documents):
            if len(document) > 1:  # a single token has no target
                g = gradient(loss_fn, params, tiny.pack([[document]], T))
                want[b, s] = -sum((np.asarray(q[p]) * g[p]).sum() for p in g)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    assert (want != 0).sum() >= 8


def test_too_many_segments_are_refused():
    loss_fn, params, train, probe, rows = problem("mlp")
    calculator = shared(loss_fn)
    _, _, q = run(calculator, params, train, probe, rows)
    most = int(rows.segment_ids_BT.max())
    calculator.score_documents(params, q, rows, most, KEY)
    with pytest.raises(DataError, match=f"{most} segments, above max_segments {most - 1}"):
        calculator.score_documents(params, q, rows, most - 1, KEY)


@pytest.mark.parametrize(("chunk", "max_bytes"), [(1, 0), (5, 0), (5, 1 << 20), (64, 1 << 20)])
def test_chunks_and_ways_of_fitting_agree(chunk, max_bytes):
    loss_fn, params, train, probe, rows = problem("mlp")
    whole, *_ = run(shared(loss_fn), params, train, probe, rows)
    calculator = DataInfCalculator(loss_fn, chunk=chunk, max_bytes=max_bytes)
    state = calculator.fit(params, train, KEY)
    assert (state.gradients is None) == (max_bytes == 0) != (state.rows is None)
    got, *_ = run(calculator, params, train, probe, rows)
    np.testing.assert_allclose(got, whole, rtol=1e-9)
    q = calculator.precondition(state, calculator.probe_gradient(params, probe, KEY))
    fitted = calculator.score_fitted(state, q)
    again = calculator.score_rows(params, q, train, KEY)
    np.testing.assert_allclose(fitted, again, rtol=1e-9)
    assert len(np.unique(np.round(fitted, 12))) == len(train.tokens_BT)  # so that order shows


def test_rows_without_a_target_count_nowhere():
    loss_fn, params, train, probe, rows = problem("mlp")

    def with_blank(batch):
        joined = jax.tree.map(lambda x: np.concatenate([x, x[:2]]), batch)
        joined.loss_mask_BT[-2:] = False
        return joined

    want, *_ = run(shared(loss_fn), params, train, probe, rows)
    got, *_ = run(shared(loss_fn), params, *map(with_blank, (train, probe, rows)))
    np.testing.assert_allclose(got[:-2], want, rtol=1e-9)
    np.testing.assert_array_equal(got[-2:], 0)


@pytest.mark.parametrize("max_bytes", [0, 1 << 20])
def test_a_block_that_training_cannot_move_is_left_out(max_bytes):
    """As LoRA's first factor at its start: its gradient is 0, and so would lambda be."""
    loss_fn, params, train, probe, rows = problem("mlp")
    want, *_ = run(shared(loss_fn), params, train, probe, rows)
    calculator = DataInfCalculator(loss_fn, max_bytes=max_bytes)
    got, _, q = run(calculator, params | {"unused": jnp.ones(3)}, train, probe, rows)
    np.testing.assert_allclose(got, want, rtol=1e-9)
    np.testing.assert_array_equal(q["unused"], 0)


def test_a_subset_scores_as_the_formula_over_its_blocks():
    loss_fn, params, train, probe, rows = problem()
    calculator = DataInfCalculator(loss_fn, parameters="^head/|mix")
    got, v, _ = run(calculator, params, train, probe, rows)
    assert sorted(v) == ["head/bias", "head/kernel", "mix/kernel"]
    want_v = {p: g for p, g in probe_mean(loss_fn, params, probe).items() if p in v}
    g = gradients(loss_fn, params, train)
    want = literal_scores(g, want_v, gradients(loss_fn, params, rows), 0.1)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    sizes = {p: x.size for p, x in g[0].items()}
    assert calculator.coverage(params) == pytest.approx(
        sum(sizes[p] for p in v) / sum(sizes.values())
    )


def test_every_function_is_compiled_once_for_one_shape():
    loss_fn, params, train, probe, rows = problem("mlp")
    traces = []

    def counted(params, batch, key):
        traces.append(1)
        return loss_fn(params, batch, key)

    calculator = DataInfCalculator(counted, max_bytes=0)
    scores, counts = [], []
    for scale in (1.0, 1.1):
        moved = jax.tree.map(lambda x, scale=scale: x * scale, params)
        out, _, q = run(calculator, moved, train, probe, rows)
        calculator.score_documents(moved, q, rows, 5, KEY)
        scores.append(out)
        counts.append(len(traces))
    assert 0 < counts[0] == counts[1]
    assert not np.allclose(*scores)


def test_state_survives_flattening():
    loss_fn, params, train, probe, _ = problem("mlp")
    calculator = shared(loss_fn)
    state = calculator.fit(params, train, KEY)
    leaves, treedef = jax.tree.flatten(state)
    again = jax.tree.unflatten(treedef, [np.asarray(x) for x in leaves])
    v = calculator.probe_gradient(params, probe, KEY)
    jax.tree.map(
        np.testing.assert_array_equal,
        calculator.precondition(state, v),
        calculator.precondition(again, v),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"damping": 0.0}, "damping is 0.0"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DataInfCalculator(tiny.mlp_loss, **fields)


def test_a_pattern_that_matches_nothing_names_some_parameters():
    loss_fn, params, train, *_ = problem()
    calculator = DataInfCalculator(loss_fn, parameters="layers/")
    with pytest.raises(ConfigError, match=r"'layers/' matches none of 4 .* embed"):
        calculator.fit(params, train, KEY)
