"""Gradients of documents in packed rows against those of lone documents, plainly and by taps."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dh_jax.config import ModelConfig
from dh_jax.errors import ConfigError
from dh_jax.functions import TappedLayer
from dh_jax.influence import per_document as doors
from dh_jax.influence.gradients import select
from dh_jax.influence.objective import Objective, Scope
from dh_jax.influence.sketch import Sketch, places
from dh_jax.influence.taps import complete_layers
from dh_jax.influence.tiles import map_documents
from dh_jax.models import decoder
from tests.dh_jax.influence import tapped_tiny, tiny

KEY = jax.random.PRNGKey(5)
T, S = 12, 4
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
DOORS = {"plain": (doors.plain, tapped_tiny.PLAIN), "tapped": (doors.tapped, tapped_tiny.TAPPED)}


def rows(seed=0, count=5):
    documents = tiny.random_rows(np.random.default_rng(seed), count, T)
    return documents, tiny.pack(documents, T)


def scope(dtype="float32", reduction="sum", chunk=2, parameters=tapped_tiny.SCOPED):
    return Scope(parameters, S, reduction, chunk, dtype)


@functools.cache
def door(name, dtype="float32", reduction="sum", chunk=2):
    make, objective = DOORS[name]
    functions = make(objective, scope(dtype, reduction, chunk))
    return functions._replace(gradients=jax.jit(functions.gradients))


@functools.cache
def lone_gradient(loss_fn, reduction):
    @jax.jit
    def gradient(params, batch):
        def total(params):
            loss_BT = loss_fn(params, batch, KEY)
            count = batch.loss_mask_BT.sum().clip(min=1)
            return loss_BT.sum() / (count if reduction == "mean" else 1)

        return select(jax.grad(total)(params)).blocks

    return gradient


def lone_gradients(loss_fn, params, documents, length, reduction="sum"):
    """Reverse-mode gradient of each document in a row of its own: blocks of (B, S, *shape)."""
    gradient = lone_gradient(loss_fn, reduction)
    zero = {n: np.zeros_like(b) for n, b in select(params).blocks.items()}
    each = [
        [gradient(params, tiny.pack([[d]], length)) for d in row] + [zero] * (S - len(row))
        for row in documents
    ]
    return {n: np.stack([[g[n] for g in row] for row in each]) for n in zero}


def flat(blocks, names):
    return np.concatenate(
        [np.asarray(blocks[n], np.float64).reshape(*blocks[n].shape[:2], -1) for n in names], -1
    )


def relative_error(got, want):
    names = sorted(got)
    a, b = flat(got, names), flat(want, names)
    size = np.linalg.norm(b, axis=-1)
    assert (size > 0).sum() >= 8
    assert (np.linalg.norm(a, axis=-1)[size == 0] == 0).all()
    return (np.linalg.norm(a - b, axis=-1) / np.where(size > 0, size, 1)).max()


@pytest.mark.parametrize(("dtype", "reduction"), [("float32", "mean"), ("float64", "sum")])
@pytest.mark.parametrize("way", DOORS)
def test_documents_of_packed_rows_have_the_gradients_of_lone_ones(way, reduction, dtype):
    with jax.enable_x64(dtype == "float64"):
        params = tapped_tiny.make_params(KEY, jnp.dtype(dtype))
        documents, batch = rows()
        got = door(way, dtype, reduction).gradients(params, batch, KEY)
        assert all(g.dtype == dtype for g in got.values())
        want = lone_gradients(tapped_tiny.loss, params, documents, T, reduction)
        assert set(want) - set(got) == {"head/kernel"}
        assert relative_error(got, want) < TOLERANCE[dtype]


CONFIG = ModelConfig(layers=2, width=16, heads=2, kv_heads=1, mlp_width=24, tied=True)


@contextmanager
def real_decoder(config, dtype, monkeypatch):
    """Graph and parameters, in float64 too, where the decoder's own float32 stands in the way."""
    if dtype == "float64":
        # Its norms and logits are float32 by design: here that name means float64.
        monkeypatch.setattr(jnp, "float32", jnp.float64)
        monkeypatch.setattr(decoder, "validate_model", lambda config: None)
        config = dataclasses.replace(config, dtype="float64")
    with jax.enable_x64(dtype == "float64"):
        graph, params = decoder.build(config, tiny.VOCAB, KEY)
        yield graph, jax.tree.map(lambda x: 5 * x.astype(dtype), params)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_the_real_decoder_too(dtype, monkeypatch):
    with real_decoder(CONFIG, dtype, monkeypatch) as (graph, params):
        loss = decoder.loss_fn(graph)
        documents, batch = rows(1)
        plain = doors.plain(Objective(loss), Scope(max_segments=S, dtype=dtype, chunk=2))
        got = jax.jit(plain.gradients)(params, batch, KEY)
        want = lone_gradients(loss, params, documents, T)
        assert relative_error(got, want) < TOLERANCE[dtype]


SKETCH = Sketch(16, seed=3)


def literal_sketch(g):
    """Entry by entry into its place."""
    out = np.zeros((5, S, SKETCH.size))
    for path, x in g.items():
        flat = x.reshape(5, S, -1)
        place, sign = places(SKETCH, path, jnp.arange(flat.shape[-1]))
        for entry, (p, s) in enumerate(zip(np.asarray(place), np.asarray(sign), strict=True)):
            out[..., p] += s * flat[..., entry]
    return out


@pytest.mark.parametrize("way", DOORS)
def test_norms_products_and_sums_are_those_of_the_gradients(way):
    with jax.enable_x64(True):
        params = tapped_tiny.make_params(KEY, jnp.float64)
        documents, batch = rows(2)
        g = lone_gradients(tapped_tiny.loss, params, documents, T)
        del g["head/kernel"]
        rng = np.random.default_rng(3)
        K = 2 if way == "plain" else 6  # few vectors go by tokens, many by documents
        vectors = {n: jnp.asarray(rng.normal(size=(K, *x.shape[2:]))) for n, x in g.items()}
        many = {n: jnp.asarray(rng.normal(size=(S + 1, *x.shape[2:]))) for n, x in g.items()}
        weights = {n: rng.normal(size=(K, *x.shape[:2])) for n, x in g.items()}
        d = door(way, "float64")

        @jax.jit
        def measured(params):
            return (
                d.squares(params, batch, KEY),
                d.products_each(params, vectors, batch, KEY),
                d.products(params, vectors, batch, KEY),
                d.products(params, many, batch, KEY),  # plainly by gradients, not along vectors
                d.combine(params, weights, batch, KEY),
                d.sketched(SKETCH, params, batch, KEY),
            )

        squares, each, total, total_of_many, sums, sketches = measured(params)
        want_total = want_of_many = 0
        for n, x in g.items():
            np.testing.assert_allclose(squares[n], (x**2).reshape(5, S, -1).sum(-1), atol=1e-10)
            inner = np.tensordot(x, np.moveaxis(vectors[n], 0, -1), axes=x.ndim - 2)
            np.testing.assert_allclose(each[n], inner, atol=1e-10)
            want_total = want_total + inner
            want_of_many += np.tensordot(x, np.moveaxis(many[n], 0, -1), axes=x.ndim - 2)
            np.testing.assert_allclose(sums[n], np.tensordot(weights[n], x, 2), atol=1e-10)
        np.testing.assert_allclose(total, want_total, atol=1e-10)
        np.testing.assert_allclose(total_of_many, want_of_many, atol=1e-10)
        np.testing.assert_allclose(sketches, literal_sketch(g), atol=1e-5)  # signs are float32


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 7),
)
def test_tiles_form_every_documents_gradient_once(lengths, seed):
    length, most = 64, 8  # one shape, so that examples share their compilation
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    ids = np.pad(ids, (0, length - len(ids)))[None].astype(np.int32)
    rng = np.random.default_rng(seed)
    a, d = rng.normal(size=(1, length, 1, 2)), rng.normal(size=(1, length, 1, 3))
    d[ids == 0] = 0
    got = np.asarray(_mapped(a.astype("f4"), d.astype("f4"), ids))
    want = np.zeros((most, 2, 3))
    for s in range(len(lengths)):
        own = ids[0] == s + 1
        want[s] = a[0, own, 0].T @ d[0, own, 0]
    np.testing.assert_allclose(got[0], want, atol=1e-5)


@jax.jit
def _mapped(a, d, ids):
    return map_documents(a, d, ids, 8, lambda g: g)


# --- scanned layers, by hand -----------------------------------------------------------------


@pytest.mark.slow  # test_decoder_taps.py has the real decoder's scanned layers
def test_scanned_layers_give_what_unscanned_ones_give():
    """The tiny model's two `up` layers as one stacked layer, through the same functions."""

    def stack(params):
        two = [params["layers"][str(i)] for i in range(2)]
        return {k: v for k, v in params.items() if k != "layers"} | {
            "layers": jax.tree.map(lambda *x: jnp.stack(x), *two)
        }

    def unstack(params):
        each = {str(i): jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(2)}
        return params | {"layers": each}

    def both(name):
        return [f"layers/{i}/{name}" for i in range(2)]

    def tapped(params, taps, batch, key):
        apart = {n: t for n, t in taps.items() if n == "embed"}
        for name in ("norm", "up", "down"):
            if f"layers/{name}" in taps:
                apart |= dict(zip(both(name), taps[f"layers/{name}"], strict=True))
        loss_BT, kept = tapped_tiny.tapped(unstack(params), apart, batch, key)
        for name in ("norm", "up", "down"):
            if f"layers/{name}" in taps:
                kept[f"layers/{name}"] = jnp.stack([kept.pop(n) for n in both(name)])
        return loss_BT, kept

    def zero_taps(params, batch):
        apart = tapped_tiny.zero_taps(unstack(params), batch)
        stacked = {
            f"layers/{name}": jnp.stack([apart[n] for n in both(name)]) for name in ("norm", "up")
        }
        return stacked | {"embed": apart["embed"]}

    layers = {
        "embed": TappedLayer("embedding", "embed/table"),
        "layers/norm": TappedLayer("norm", "layers/norm/scale", layers=2),
        "layers/up": TappedLayer("linear", "layers/up/kernel", "layers/up/bias", layers=2),
    }
    objective = Objective(
        lambda params, batch, key: tapped_tiny.loss(unstack(params), batch, key),
        tapped=tapped,
        layers=layers,
        zero_taps=zero_taps,
    )
    params = tapped_tiny.make_params(KEY)
    _, batch = rows(4)
    wide_scope = scope(parameters="layers|embed")
    by_taps, by_loss = (make(objective, wide_scope) for make in (doors.tapped, doors.plain))
    stacked = stack(params)
    got, want = (jax.jit(d.gradients)(stacked, batch, KEY) for d in (by_taps, by_loss))
    assert got["layers/up/kernel"].shape == (5, S, 2, tapped_tiny.WIDTH, tapped_tiny.INNER)
    assert relative_error(got, want) < 1e-5
    rng = np.random.default_rng(0)
    vectors = {n: rng.normal(size=(3, *g.shape[2:])).astype("f4") for n, g in want.items()}
    weights = {n: rng.normal(size=(3, *g.shape[:2])).astype("f4") for n, g in want.items()}
    for f, more in (("squares", ()), ("products_each", (vectors,)), ("combine", (weights,))):
        one, two = (jax.jit(getattr(d, f))(stacked, *more, batch, KEY) for d in (by_taps, by_loss))
        for n in two:
            np.testing.assert_allclose(one[n], two[n], rtol=1e-4, atol=1e-4)


# --- what is covered -------------------------------------------------------------------------


def test_coverage_counts_what_is_tapped_and_a_tied_table_is_found_out():
    _, batch = rows(5)
    untied = tapped_tiny.make_params(KEY)
    sizes = {n: b.size for n, b in select(untied).blocks.items()}
    share = 1 - sizes["head/kernel"] / sum(sizes.values())
    assert DOORS["tapped"][0](tapped_tiny.TAPPED, scope()).coverage(untied) == pytest.approx(share)
    kept, wrong = complete_layers(tapped_tiny.TAPPED, untied, batch, KEY)
    assert kept == tapped_tiny.LAYERS and wrong == {}
    tied = tapped_tiny.make_params(KEY, tied=True)
    kept, wrong = complete_layers(tapped_tiny.TAPPED, tied, batch, KEY)
    assert set(tapped_tiny.LAYERS) - set(kept) == {"embed"} and list(wrong) == ["embed/table"]
    honest = tapped_tiny.TAPPED._replace(layers=kept)
    sizes = {n: b.size for n, b in select(tied).blocks.items()}
    got = doors.tapped(honest, scope()).coverage(tied)
    assert got == pytest.approx(1 - sizes["embed/table"] / sum(sizes.values()))


def test_what_cannot_be_tapped_is_refused():
    params = tapped_tiny.make_params(KEY)
    with pytest.raises(ConfigError, match="needs taps: give Objective tapped"):
        doors.tapped(tapped_tiny.PLAIN, scope())
    with pytest.raises(ConfigError, match="'head' matches no tensor of 7 tapped layers"):
        doors.tapped(tapped_tiny.TAPPED, scope(parameters="head"))
    strange = tapped_tiny.TAPPED._replace(layers={"x": TappedLayer("conv", "x/kernel")})
    with pytest.raises(ConfigError, match="'x' is of kind 'conv'"):
        doors.tapped(strange, scope())
    absent = tapped_tiny.TAPPED._replace(layers={"embed": TappedLayer("embedding", "e/table")})
    with pytest.raises(ConfigError, match="'e/table', which is no parameter"):
        doors.tapped(absent, Scope()).coverage(params)
