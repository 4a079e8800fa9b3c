"""The decoder: right (three independent references), isolated by document, differentiable."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dh_jax.batch import Batch
from dh_jax.config import ModelConfig, config_folder, typed, validate_model
from dh_jax.errors import ConfigError
from dh_jax.functions import masked_mean
from dh_jax.models import decoder
from tests.dh_jax.models.model_cases import LLAMA as CONFIG
from tests.dh_jax.models.model_cases import V, by_path, pack, words

KEY = jax.random.key(7)


@cache
def model(tied: bool = True, dtype: str = "float32", layers: int = 2) -> tuple[Any, Any]:
    config = dataclasses.replace(CONFIG, tied=tied, dtype=dtype, layers=layers)
    return decoder.build(config, V, KEY)


jitted_loss = cache(lambda chunk: jax.jit(decoder.loss_fn(model()[0], chunk=chunk)))


def losses(batch: Batch, chunk: int = 1024) -> np.ndarray:
    return np.asarray(jitted_loss(chunk)(model()[1], batch, KEY))


# --- isolation -------------------------------------------------------------------------------


def cut(rng: np.random.Generator, length: int, pieces: int) -> list[np.ndarray]:
    """``length`` random tokens as up to ``pieces`` documents."""
    if not length:
        return []
    at: Any = np.unique(rng.integers(1, length, pieces - 1)) if length > 1 else []
    return np.split(words(rng, length), at)


LENGTH = 300  # three blocks of queries, and eleven chunks of targets


@pytest.mark.optimised
@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_neighbours_never_change_a_documents_losses_by_one_bit(data: Any, seed: int) -> None:
    before = data.draw(st.integers(0, LENGTH - 2), label="tokens before")
    own = data.draw(st.integers(2, LENGTH - before), label="tokens of the document")
    after = data.draw(st.integers(0, LENGTH - before - own), label="tokens after")
    rng = np.random.default_rng(seed)
    document = words(rng, own)
    seen = []
    for _ in range(3):  # other neighbours each time: content, number, lengths, padding
        left = cut(rng, before, data.draw(st.integers(1, 6), label="documents before"))
        right = cut(rng, after, data.draw(st.integers(1, 6), label="documents after"))
        after = data.draw(st.integers(0, after), label="tokens after, next time")
        batch = pack([[*left, document, *right], cut(rng, LENGTH, 3)], LENGTH)
        assert batch.positions_BT[0, before] == 0
        seen.append(losses(batch, chunk=56)[0, before : before + own])
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[2])
    assert (seen[0][:-1] > 0).all()


def test_a_token_does_change_later_losses_of_its_own_document_and_no_earlier_ones() -> None:
    rng = np.random.default_rng(0)
    first, second = words(rng, 150), words(rng, 140)
    changed = first.copy()
    changed[40] = (changed[40] + 1) % V
    a = losses(pack([[first, second]], LENGTH))[0]
    b = losses(pack([[changed, second]], LENGTH))[0]
    assert (a[40:149] != b[40:149]).mean() > 0.95
    np.testing.assert_array_equal(a[:39], b[:39])  # 39 predicts the changed token
    np.testing.assert_array_equal(a[150:], b[150:])


def test_a_packed_row_equals_its_documents_alone() -> None:
    rng = np.random.default_rng(1)
    documents = [words(rng, n) for n in (1, 130, 64, 2, 90)]
    together = losses(pack([documents], LENGTH))[0]
    start = 0
    for document in documents:
        alone = losses(pack([[document]], LENGTH))[0, : len(document)]
        np.testing.assert_allclose(together[start : start + len(document)], alone, atol=1e-5)
        start += len(document)
    assert not together[start:].any()  # padding costs nothing


# --- references ------------------------------------------------------------------------------


def literal_logits(params: Any, config: ModelConfig, tokens: list[int]) -> np.ndarray:
    """One document, float64, a loop over every token, head and earlier token."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    h = config.width // config.heads
    group = config.heads // config.kv_heads

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / math.sqrt((x**2).mean() + config.norm_epsilon) * scale

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        out = x.copy()
        for i in range(h // 2):
            angle = position * config.rope_theta ** (-2 * i / h)
            pair = complex(x[i], x[i + h // 2]) * np.exp(1j * angle)
            out[i], out[i + h // 2] = pair.real, pair.imag
        return out

    xs = [p["embed"]["embedding"][t] for t in tokens]
    for i in range(config.layers):
        layer = p["layers"][str(i)]
        a, m = layer["attention"], layer["mlp"]
        ys = [norm(x, layer["attention_norm"]["scale"]) for x in xs]
        for t in range(len(xs)):
            heads = []
            for head in range(config.heads):
                own = slice(head * h, head * h + h)
                shared = slice(head // group * h, head // group * h + h)
                q = turn((ys[t] @ a["query"]["kernel"])[own], t)
                keys = [turn((ys[s] @ a["key"]["kernel"])[shared], s) for s in range(t + 1)]
                values = [(ys[s] @ a["value"]["kernel"])[shared] for s in range(t + 1)]
                weights = [math.exp(q @ k / math.sqrt(h)) for k in keys]
                heads.append(np.average(values, axis=0, weights=weights))
            xs[t] = xs[t] + np.concatenate(heads) @ a["out"]["kernel"]
            y = norm(xs[t], layer["mlp_norm"]["scale"])
            gate = y @ m["gate"]["kernel"]
            swish = gate / (1 + np.exp(-gate))
            xs[t] = xs[t] + (swish * (y @ m["up"]["kernel"])) @ m["down"]["kernel"]
    head = p["embed"]["embedding"].T if config.tied else p["head"]["kernel"]
    return np.stack([norm(x, p["final_norm"]["scale"]) @ head for x in xs])


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_losses_equal_a_literal_float64_loop(tied: bool) -> None:
    graph, params = model(tied)
    rng = np.random.default_rng(2)
    documents = [words(rng, 11), words(rng, 17)]
    batch = pack([documents], 32)
    logits = jax.jit(decoder.logits_fn(graph))(params, batch)[0]
    loss = jax.jit(decoder.loss_fn(graph))(params, batch, KEY)[0]
    assert logits.dtype == loss.dtype == np.float32
    start = 0
    for document in documents:
        config = dataclasses.replace(CONFIG, tied=tied)
        wanted = literal_logits(params, config, document.tolist())
        assert np.abs(wanted).max() > 1
        end = start + len(document)
        np.testing.assert_allclose(logits[start:end], wanted, atol=1e-5)
        pairs = zip(wanted[:-1], document[1:], strict=True)
        nats = [math.log(np.exp(row).sum()) - row[target] for row, target in pairs]
        np.testing.assert_allclose(loss[start : end - 1], nats, atol=1e-5)
        start = end


@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_transformers_llama(tied: bool) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    _, params = model(tied)
    theirs_config = LlamaConfig(
        vocab_size=V, hidden_size=CONFIG.width, intermediate_size=CONFIG.mlp_width,
        num_hidden_layers=CONFIG.layers, num_attention_heads=CONFIG.heads,
        num_key_value_heads=CONFIG.kv_heads, rms_norm_eps=CONFIG.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        tie_word_embeddings=tied,
    )  # fmt: skip
    theirs_config._attn_implementation = "eager"
    theirs = LlamaForCausalLM(theirs_config).eval()
    names = {"embed/embedding": "model.embed_tokens.weight", "head/kernel": "lm_head.weight"}
    names["final_norm/scale"] = "model.norm.weight"
    letters = {"query": "q", "key": "k", "value": "v", "out": "o"}
    for i in range(CONFIG.layers):
        here, there = f"layers/{i}", f"model.layers.{i}"
        names[f"{here}/attention_norm/scale"] = f"{there}.input_layernorm.weight"
        names[f"{here}/mlp_norm/scale"] = f"{there}.post_attention_layernorm.weight"
        for ours, other in letters.items():
            names[f"{here}/attention/{ours}/kernel"] = f"{there}.self_attn.{other}_proj.weight"
        for ours in ("gate", "up", "down"):
            names[f"{here}/mlp/{ours}/kernel"] = f"{there}.mlp.{ours}_proj.weight"
    rng = np.random.default_rng(3)
    # Scales other than one, so that a norm in the wrong place would show.
    params = jax.tree.map(
        lambda x: x if x.ndim > 1 else jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32),
        params,
    )
    weights = {
        names[name]: torch.from_numpy(np.array(leaf.T if name.endswith("kernel") else leaf))
        for name, leaf in by_path(params).items()
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if tied else set())
    document = words(rng, 200)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(document)[None]).logits[0].numpy()
    batch = pack([[document]], 200)
    logits = np.asarray(jax.jit(decoder.logits_fn(model(tied)[0]))(params, batch))[0]
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


# --- the loss --------------------------------------------------------------------------------


def some_batch(length: int = 50) -> Batch:
    rng = np.random.default_rng(4)
    return pack([[words(rng, 20), words(rng, 25)], [words(rng, 50)], [words(rng, 7)]], length)


@pytest.mark.parametrize("chunk", [1, 30, 33, 149])
def test_loss_in_chunks_equals_loss_at_once(chunk: int) -> None:
    batch = some_batch()
    np.testing.assert_allclose(losses(batch, chunk), losses(batch, 150), atol=1e-6)
    assert not losses(batch, chunk)[~batch.loss_mask_BT].any()


def test_no_table_of_all_tokens_by_vocabulary_is_held_even_backwards(monkeypatch: Any) -> None:
    graph, params = model(layers=1)
    batch = some_batch()

    def largest(chunk: int | None) -> int:
        """Elements of the largest array whose last axis is the vocabulary."""
        loss = decoder.loss_fn(graph, chunk)
        step = jax.jit(jax.grad(lambda p: loss(p, batch, KEY).sum()))
        shapes = re.findall(rf"tensor<([\dx]+)x{V}xf32>", step.lower(params).as_text())
        return max(math.prod(int(n) for n in shape.split("x")) * V for shape in shapes)

    assert largest(150) == 150 * V
    assert largest(30) == 30 * V
    monkeypatch.setattr(decoder, "LOSS_TABLE", 60 * V)
    assert largest(None) == 60 * V


def test_gradient_is_finite_with_rows_of_padding_only() -> None:
    graph, params = model(layers=1)
    loss = decoder.loss_fn(graph)
    value_and_gradient = jax.jit(
        jax.value_and_grad(lambda p, b: masked_mean(loss(p, b, KEY), b.loss_mask_BT))
    )
    for batch in (pack([[words(np.random.default_rng(5), 9)], []], 16), pack([[], []], 16)):
        leaves = jax.tree.leaves(value_and_gradient(params, batch))
        assert all(np.isfinite(x).all() for x in leaves)
        assert any(np.any(x) for x in leaves) == bool(batch.loss_mask_BT.any())


def test_forward_mode_agrees_with_reverse_mode_and_per_row_gradients_with_their_sum() -> None:
    graph, params = model(layers=1)
    loss = decoder.loss_fn(graph, chunk=30)
    batch = some_batch()
    rng = np.random.default_rng(6)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)

    def total(params: Any, batch: Batch) -> jax.Array:
        return loss(params, batch, KEY).sum()

    forward = jax.jit(lambda p, d: jax.jvp(lambda p: total(p, batch), (p,), (d,))[1])
    per_row = jax.jit(jax.vmap(jax.grad(total), in_axes=(None, 0)))
    reverse = jax.jit(jax.grad(total))(params, batch)
    dots = jax.tree.map(lambda g, d: np.vdot(np.float64(g), np.float64(d)), reverse, direction)
    np.testing.assert_allclose(forward(params, direction), sum(jax.tree.leaves(dots)), rtol=1e-4)
    rows = per_row(params, jax.tree.map(lambda x: x[:, None], batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.sum(0), b, atol=2e-4), rows, reverse)


def test_bfloat16_activations_keep_float32_parameters_gradients_and_loss() -> None:
    graph, params = model(dtype="bfloat16", layers=1)
    batch = some_batch()
    loss = decoder.loss_fn(graph)
    step = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, KEY).sum()))
    assert {x.dtype for x in jax.tree.leaves((params, step(params)))} == {jnp.dtype("float32")}
    plain, same_params = model(layers=1)
    jax.tree.map(np.testing.assert_array_equal, params, same_params)
    exact = np.asarray(jax.jit(decoder.loss_fn(plain))(params, batch, KEY))
    rounded = np.asarray(jax.jit(loss)(params, batch, KEY))
    assert 0 < np.abs(exact - rounded).max() < 0.3


def test_a_token_outside_the_vocabulary_gives_nan_rather_than_another_token() -> None:
    assert np.isnan(losses(pack([[np.array([1, V, 2, 3])]], 4))[0, :3]).all()


def test_training_step_lowers_for_gpu_and_tpu() -> None:
    graph, params = model(dtype="bfloat16", layers=1)
    loss = decoder.loss_fn(graph, chunk=30)
    step = jax.jit(jax.grad(lambda p, b: loss(p, b, jax.random.key(0)).sum()))
    exported = jax.export.export(step, platforms=["cuda", "tpu"])(params, some_batch())
    assert exported.platforms == ("cuda", "tpu")


# --- shapes and sizes ------------------------------------------------------------------------


SIZES = {
    "tiny": (4096, 1_078_144),
    "small": (8192, 10_152_640),
    "smollm2_135m": (49152, 134_515_008),
}


@pytest.mark.parametrize("name", SIZES)
def test_shipped_models_have_their_size(name: str) -> None:
    vocab_size, count = SIZES[name]
    config = typed(ModelConfig, OmegaConf.load(config_folder() / "model" / f"{name}.yaml"))
    assert decoder.count_parameters(decoder.abstract_params(config, vocab_size)) == count


def test_parameters_are_a_plain_dictionary_with_readable_paths() -> None:
    _, params = model(tied=False)
    paths = {name: leaf.shape for name, leaf in by_path(params).items()}
    layer = {
        "attention/query/kernel": (24, 24), "attention/key/kernel": (24, 8),
        "attention/value/kernel": (24, 8), "attention/out/kernel": (24, 24),
        "mlp/gate/kernel": (24, 40), "mlp/up/kernel": (24, 40), "mlp/down/kernel": (40, 24),
        "attention_norm/scale": (24,), "mlp_norm/scale": (24,),
    }  # fmt: skip
    wanted = {f"layers/{i}/{name}": shape for i in range(2) for name, shape in layer.items()}
    wanted |= {"embed/embedding": (V, 24), "final_norm/scale": (24,), "head/kernel": (24, V)}
    assert paths == wanted
    assert "head" not in model(tied=True)[1]
    abstract = decoder.abstract_params(dataclasses.replace(CONFIG, tied=False), V)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.shape == b.shape, params, abstract)))


def test_initialisation_follows_the_key_and_the_stated_scales() -> None:
    config = ModelConfig(width=128, layers=2, kv_heads=4, mlp_width=128)
    (_, a), (_, b), (_, c) = (decoder.build(config, 128, jax.random.key(k)) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    kernels_a, kernels_c = ([x for x in jax.tree.leaves(p) if x.ndim > 1] for p in (a, c))
    assert all((x != y).any() for x, y in zip(kernels_a, kernels_c, strict=True))
    assert len({float(x[0, 0]) for x in kernels_a}) == len(kernels_a)
    layer = a["layers"]["1"]
    plain = (a["embed"]["embedding"], layer["attention"]["query"]["kernel"])
    residual = (layer["attention"]["out"]["kernel"], layer["mlp"]["down"]["kernel"])
    np.testing.assert_allclose([np.std(x) for x in plain], 0.02, rtol=0.03)
    np.testing.assert_allclose([np.std(x) for x in residual], 0.02 / math.sqrt(2 * 2), rtol=0.03)


def test_flops_are_three_times_what_xla_counts_forward() -> None:
    config = ModelConfig(width=64, layers=2, mlp_width=256)
    graph = decoder.abstract_graph(config, 512)
    params = decoder.abstract_params(config, 512)
    batch = pack([[np.arange(100)]], 128)  # one block of queries: the square, as the formula has
    analysis: Any = jax.jit(decoder.logits_fn(graph)).lower(params, batch).compile().cost_analysis()
    counted = 3 * analysis["flops"] / 128
    assert decoder.flops_per_token(config, 512, 128) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ("heads=4 kv_heads=3 width=64", "kv_heads 3"),
        ("heads=5 kv_heads=5 width=64", "width 64"),
        ("heads=4 kv_heads=2 width=12", "head_width is 3"),
        ("layers=0", "layers is 0"),
        ("head_width=0", "head_width is 0"),
        ("norm_epsilon=0.0", "norm_epsilon is 0.0"),
        ("dtype=float8", "'float8'"),
    ],
)
def test_impossible_shapes_are_refused_by_name(changes: str, named: str) -> None:
    config = typed(ModelConfig, dataclasses.asdict(CONFIG), changes.split())
    with pytest.raises(ConfigError, match=named) as caught:
        validate_model(config)
    assert "\n" not in str(caught.value)
