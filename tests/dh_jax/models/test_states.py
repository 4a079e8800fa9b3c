"""States of chosen layers against what the next operations are known to have received."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from dh_jax.config import LoraConfig
from dh_jax.errors import ConfigError
from dh_jax.models import decoder, lora
from dh_jax.models.states import STATES, states_fn
from dh_jax.models.tapped import tapped_loss_fn, zero_taps
from tests.dh_jax.models.model_cases import FAMILIES, LLAMA, build, packed_rows


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_states_are_what_the_layers_behind_receive(family: str) -> None:
    config = FAMILIES[family]
    graph, params = build(config)
    batch = packed_rows()
    names = [f"layers/1/attention/{n}" for n in ("query", "out")] + ["layers/1/attention_norm"]
    if config.qk_norm:
        names += ["layers/1/attention/query_norm", "layers/1/attention/key_norm"]
    taps = zero_taps(graph, params, batch, names)
    _, received = jax.jit(tapped_loss_fn(graph))(params, taps, batch, jax.random.key(0))
    function = states_fn(graph, dict.fromkeys(STATES, -1) | {"hidden": 0})
    hidden_BTD, _, found = jax.jit(function)(params, batch)
    np.testing.assert_allclose(
        hidden_BTD, jax.jit(decoder.hidden_fn(graph))(params, batch)[0], rtol=1e-5, atol=1e-5
    )
    # The residual stream behind layer 0 is what layer 1 normalises.
    x = np.asarray(found["hidden"], np.float64)
    normal = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon)
    np.testing.assert_allclose(received["layers/1/attention_norm"], normal, rtol=2e-4, atol=2e-4)
    layer = params["layers"]["1"]["attention"]
    for name in ("query", "key", "value"):
        y = np.asarray(received["layers/1/attention/query"]) @ layer[name]["kernel"]
        y = y + layer[name].get("bias", 0.0)
        np.testing.assert_allclose(found[name].reshape(y.shape), y, rtol=1e-4, atol=1e-4)
    # Attention by its definition, from the rotated states, is what the last product receives.
    q, k, v = (np.asarray(found[n], np.float64) for n in ("rotated_query", "rotated_key", "value"))
    k, v = (np.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    same = batch.segment_ids_BT[:, :, None] == batch.segment_ids_BT[:, None]
    seen = (same & np.tri(q.shape[1], dtype=bool))[:, None]
    p = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    mixed = np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), v)
    out = np.asarray(received["layers/1/attention/out"])
    np.testing.assert_allclose(mixed.reshape(out.shape), out, rtol=1e-3, atol=1e-4)


def test_scanned_layers_show_the_same_and_no_state_of_all_layers_is_made() -> None:
    graph, params = build(LLAMA)
    batch = packed_rows()
    layers = {"value": 0, "hidden": 1}
    expected = jax.jit(states_fn(graph, layers))(params, batch)[2]
    scanned = dataclasses.replace(LLAMA, scan_layers=True, remat="nothing_saveable")
    graph = decoder.abstract_graph(scanned, 61)
    function = states_fn(graph, layers)
    params = decoder.stack_layers(params)
    found = jax.jit(function)(params, batch)[2]
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-5)
    B, T = batch.tokens_BT.shape
    made = [v.aval.shape for v in _values(jax.make_jaxpr(function)(params, batch).jaxpr)]
    assert (LLAMA.layers,) in made  # the numbers of layers, for one
    assert not [shape for shape in made if shape[:3] == (LLAMA.layers, B, T)]


def _values(jaxpr: Any) -> list[Any]:
    found = [v for eqn in jaxpr.eqns for v in eqn.outvars]
    for each in jax.tree.leaves([eqn.params for eqn in jaxpr.eqns]):
        inner = getattr(each, "jaxpr", each)
        if hasattr(inner, "eqns"):
            found += _values(inner)
    return found


def test_adapters_show_theirs_and_unknown_states_are_refused() -> None:
    graph, params = build(dataclasses.replace(LLAMA, layers=1))
    batch = packed_rows()
    adapted, adapters = lora.adapt(graph, params, LoraConfig(rank=2), jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    found = lora.states_fn(adapted, params, {"query": 0})(adapters, batch)[2]["query"]
    whole = lora.combine(params, adapters)
    expected = states_fn(adapted, {"query": 0})(whole, batch)[2]["query"]
    plain = states_fn(graph, {"query": 0})(params, batch)[2]["query"]
    np.testing.assert_array_equal(found, expected)
    assert np.abs(np.asarray(found - plain)).max() > 0.01
    with pytest.raises(ConfigError, match=r"no state 'querry' .did you mean 'query'"):
        states_fn(graph, {"querry": 0})
    with pytest.raises(ConfigError, match="layer 1 of a model of 1 layers; take 0 to 0"):
        states_fn(graph, {"query": 1})(params, batch)
