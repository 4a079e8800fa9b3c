"""Streams, blocks and means of queries, thin queries, tokens and self-influence, each against the
loop in memory or a dense formula."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.batch import checksum
from dh_jax.errors import ConfigError, DataError, StateError
from dh_jax.influence.empirical_fisher import woodbury
from dh_jax.influence.estimator import gather_gradients, score
from dh_jax.influence.first_order import gradient_cosine, gradient_dot
from dh_jax.influence.objective import NotFinite, Objective, Scope
from dh_jax.influence.queries import prepare, prepare_means
from dh_jax.influence.streaming import stream
from dh_jax.influence.thin import Thin, dense, mean_query, thinned
from tests.dh_jax.influence import tapped_tiny, tiny

pytestmark = pytest.mark.filterwarnings("ignore::dh_jax.influence.estimator.CoverageWarning")
KEY = jax.random.PRNGKey(4)
T = 8
SCOPE = Scope("down|embed", chunk=2)  # a row is a document, for speed


@functools.cache
def data():
    """Three batches of documents, and two of queries; the last row of each batch is empty."""
    rng = np.random.default_rng(5)

    def rows():
        return [[rng.integers(0, tiny.VOCAB, rng.integers(3, T + 1))] for _ in range(2)]

    batches = [tiny.pack([*rows(), []], T, source=i) for i in range(5)]
    return batches[:3], batches[3:]


@functools.cache
def made(make):
    params = tapped_tiny.make_params(KEY)
    estimator = make(tapped_tiny.PLAIN, SCOPE)  # compiles in a third of the time of taps
    state = estimator.fit(params, data()[0], KEY)
    return estimator, params, state, estimator.queries(params, state, data()[1], KEY)


def streamed(make, prepared, **options):
    estimator, params, state, _ = made(make)
    return list(stream(estimator, params, state, prepared, iter(data()[0]), KEY, **options))


MAKERS = [
    gradient_cosine,
    *(pytest.param(m, marks=pytest.mark.slow) for m in (gradient_dot, woodbury)),
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_stream_gives_the_scores_of_the_loop_in_memory(make):
    estimator, params, state, prepared = made(make)
    documents, queries = data()
    want = score(estimator, params, state, queries, documents, KEY)
    parts = streamed(make, prepared)
    np.testing.assert_array_equal(np.concatenate([p.values_KN for p in parts], 1), want.values_KN)
    for part, batch in zip(parts, documents, strict=True):
        assert part.checksum == checksum(batch) and (part.source_N == part.batch).all()
        assert part.targets_N.sum() == batch.loss_mask_BT.sum()


def test_documents_of_packed_rows_come_in_order():
    rng = np.random.default_rng(6)
    batches = [tiny.pack(tiny.random_rows(rng, 2, 12), 12) for _ in range(2)]
    params = tiny.mlp_params(KEY)
    estimator = gradient_dot(Objective(tiny.mlp_loss), Scope(max_segments=4))
    prepared = estimator.queries(params, (), batches[:1], KEY)
    want = score(estimator, params, (), batches[:1], batches, KEY)
    parts = list(stream(estimator, params, (), prepared, batches, KEY))
    np.testing.assert_array_equal(np.concatenate([p.values_KN for p in parts], 1), want.values_KN)
    np.testing.assert_array_equal(np.concatenate([p.row_N for p in parts]), want.row_N)
    np.testing.assert_array_equal(np.concatenate([p.segment_N for p in parts]), want.segment_N)
    assert max(p.segment_N.max() for p in parts) > 1


@pytest.mark.parametrize("make", MAKERS)
def test_queries_in_blocks_equal_all_at_once(make):
    estimator, params, state, whole = made(make)
    blocks = prepare(estimator, params, state, data()[1], KEY)
    for path, x in whole.items():
        close = 1e-5 * np.abs(x).max()
        np.testing.assert_allclose(blocks[path], x, atol=close, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("make", [gradient_dot, woodbury])
def test_a_mean_query_has_the_mean_of_its_documents_scores(make):
    estimator, params, state, whole = made(make)
    means = prepare_means(estimator, params, state, [data()[1], data()[1][:1]], KEY)
    each = np.concatenate([p.values_KN for p in streamed(make, whole)], 1)
    ours = np.concatenate([p.values_KN for p in streamed(make, means)], 1)
    scale = np.abs(each).max()
    np.testing.assert_allclose(ours[0], each.mean(0), atol=1e-5 * scale)
    np.testing.assert_allclose(ours[1], each[:2].mean(0), atol=1e-5 * scale)


def test_the_cosine_of_a_mean_query_is_with_the_mean_gradient():
    estimator, params, state, _ = made(gradient_cosine)
    dot = gather_gradients(jax.jit(estimator.door.gradients), SCOPE, params, data()[1], KEY)
    means = prepare_means(estimator, params, state, [data()[1]], KEY)
    flat = np.concatenate([np.asarray(x).reshape(len(x), -1) for x in dot.values()], 1).mean(0)
    ours = np.concatenate([np.asarray(means[p]).reshape(-1) for p in dot])
    np.testing.assert_allclose(ours, flat / np.linalg.norm(flat), atol=1e-6)


@pytest.mark.parametrize("make", MAKERS)
def test_tokens_add_up_to_their_documents_score(make):
    estimator, params, _, prepared = made(make)
    batch = data()[0][1]
    shares_KBT = np.asarray(estimator.by_token(params, prepared, batch, KEY))
    part = streamed(make, prepared)[1]
    own_NT = batch.segment_ids_BT[part.row_N] == part.segment_N[:, None]
    sums_KN = (shares_KBT[:, part.row_N] * own_NT).sum(-1)
    np.testing.assert_allclose(sums_KN, part.values_KN, atol=1e-5 * np.abs(sums_KN).max())
    assert (shares_KBT[:, ~batch.loss_mask_BT] == 0).all()


@pytest.mark.slow
def test_self_influence_is_the_quadratic_form_of_a_documents_gradient():
    estimator, params, state, _ = made(woodbury)
    part = streamed(woodbury, made(woodbury)[3], self_influence=True)[0]
    batch = data()[0][0]
    prepared = estimator.queries(params, state, [batch], KEY)
    gradients = made(gradient_dot)[0].queries(params, (), [batch], KEY)
    want = sum(
        np.einsum("nx,nx->n", *(np.asarray(g[p]).reshape(len(g[p]), -1) for g in both))
        for both in [(prepared, gradients)]
        for p in prepared
    )
    np.testing.assert_allclose(part.self_N, want, rtol=1e-4)
    assert (part.self_N > 0).all()


def test_thin_queries_are_the_truncated_decomposition_and_say_their_error():
    params, batch = tapped_tiny.make_params(KEY), data()[0][0]
    estimator = gradient_dot(tapped_tiny.TAPPED, SCOPE)
    door = estimator.door
    assert door.kernels == {"down/kernel"}
    rng = np.random.default_rng(7)
    whole = {p: rng.normal(size=(3, *b.shape)) for p, b in door.blocks(params).items()}
    kernel = whole["down/kernel"]
    kernel[2] = np.outer(kernel[2, :, 0], kernel[2, 0])  # of rank one
    whole = {p: jnp.asarray(x, jnp.float32) for p, x in whole.items()}
    factors, error_K = thinned(whole, door.kernels, 2)
    assert isinstance(factors["down/kernel"], Thin) and factors["embed/table"].ndim == 3
    u, singular, v = np.linalg.svd(kernel, full_matrices=False)
    best = (u[..., :2] * singular[:, None, :2]) @ v[:, :2]
    np.testing.assert_allclose(dense(factors["down/kernel"]), best, atol=1e-5)
    squares = sum(
        (np.asarray(x).reshape(3, -1).astype(np.float64) ** 2).sum(1) for x in whole.values()
    )
    lost = np.sqrt((singular[:, 2:] ** 2).sum(1) / squares)
    np.testing.assert_allclose(error_K, lost, atol=1e-6)
    assert error_K[0] > 0.1 and error_K[2] < 1e-6
    rough = np.asarray(estimator.score(params, (), factors, batch, KEY))
    stood_for = {p: dense(x) for p, x in factors.items()}
    want = np.asarray(estimator.score(params, (), stood_for, batch, KEY))
    exact = np.asarray(estimator.score(params, (), whole, batch, KEY))
    close = 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(rough, want, atol=close)
    np.testing.assert_allclose(rough[2], exact[2], atol=close)  # full rank equals exact
    assert np.abs(rough[0] - exact[0]).max() > 100 * close
    for path, x in mean_query(factors).items():
        np.testing.assert_allclose(x[0], stood_for[path].mean(0), atol=1e-5)


def test_thin_queries_need_taps():
    with pytest.raises(ConfigError, match="need gradients by taps"):
        thinned({"a": jnp.ones((1, 3, 3))}, frozenset(), 2)
    with pytest.raises(ConfigError, match="low_rank is 0"):
        thinned({"a": jnp.ones((1, 3, 3))}, frozenset({"a"}), 0)


def test_batches_that_are_scored_are_passed_over_if_they_are_the_same():
    _, _, _, prepared = made(gradient_cosine)
    marks = {i: checksum(b) for i, b in enumerate(data()[0][:2])}
    assert [p.batch for p in streamed(gradient_cosine, prepared, scored=marks.get)] == [2]
    marks[1] = "0" * 16
    with pytest.raises(StateError, match="batch 1 is another one than was scored"):
        streamed(gradient_cosine, prepared, scored=marks.get)


def test_what_is_not_finite_is_named():
    estimator, params, state, prepared = made(gradient_cosine)
    bad = {**prepared, "down/kernel": prepared["down/kernel"].at[0, 0, 0].set(jnp.nan)}
    with pytest.raises(NotFinite, match=r"batch 0, row 0, document \(segment\) 1") as found:
        streamed(gradient_cosine, bad)
    assert (found.value.index, found.value.row, found.value.segment) == (0, 0, 1)
    with pytest.raises(DataError, match=r"query 1 of 1: its group has no document"):
        empty = data()[1][0]._replace(loss_mask_BT=np.zeros((3, T), bool))
        prepare_means(estimator, params, state, [[empty]], KEY)


def packed_with(token):
    """Two batches of two rows of documents without a token, but for one: batch 1, row 1, third."""
    rows = [[np.array([1, 2, 1]), np.array([3, 2, 4]), np.array([4, 1, 3, 2])] for _ in range(2)]
    fine = tiny.pack(rows, 12)
    rows[1][2] = np.array([4, 1, token, 2])
    return [fine, tiny.pack(rows, 12)]


@pytest.mark.parametrize(
    ("objective", "make_params"),
    [
        (Objective(tiny.sequence_loss), tiny.sequence_params),
        pytest.param(tapped_tiny.TAPPED, tapped_tiny.make_params, marks=pytest.mark.slow),
    ],
)
def test_a_broken_document_is_told_from_the_others_of_its_row(objective, make_params):
    """Both models average over the row with weights that are 0 at other documents' NaN."""
    params, documents = make_params(KEY), packed_with(5)
    estimator = gradient_dot(objective, Scope(max_segments=4, chunk=2))
    prepared = estimator.queries(params, (), documents[:1], KEY)
    params["embed"] = jax.tree.map(lambda x: x.at[5].set(jnp.nan), params["embed"])
    scores = np.asarray(estimator.score(params, (), prepared, documents[1], KEY))
    assert np.isnan(scores[:, 1, 0]).any()  # the first document's too
    said = r"batch 1, row 1, document \(segment\) 3: score is not finite \(1 such in the batch\)"
    with pytest.raises(NotFinite, match=said) as found:
        list(stream(estimator, params, (), prepared, documents, KEY))
    assert (found.value.index, found.value.row, found.value.segment) == (1, 1, 3)
    with pytest.raises(NotFinite, match=said):
        score(estimator, params, (), [documents[0]], documents, KEY)


def test_a_self_influence_that_is_not_finite_is_named():
    """A gradient of 1e25 has scores for other queries, but no square in float32."""

    def steep(params, batch, key):
        return tiny.mlp_loss(params, batch, key) * jnp.where(batch.tokens_BT == 5, 1e25, 1)

    params, documents = tiny.mlp_params(KEY), packed_with(5)
    estimator = gradient_dot(Objective(steep), Scope(max_segments=4))
    prepared = estimator.queries(params, (), documents[:1], KEY)
    assert len(list(stream(estimator, params, (), prepared, documents, KEY))) == 2
    said = r"batch 1, row 1, document \(segment\) 3: self-influence is not finite \(1 such"
    with pytest.raises(NotFinite, match=said):
        list(stream(estimator, params, (), prepared, documents, KEY, self_influence=True))
