"""Taps: activations and cotangents make up the very gradients of `jax.grad`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.config import ModelConfig
from dh_jax.errors import ConfigError
from dh_jax.functions import TappedLayer
from dh_jax.models import decoder
from dh_jax.models.tapped import tapped_layers, tapped_loss_fn, zero_taps
from tests.dh_jax.models.model_cases import FAMILIES, LLAMA, V, build, by_path, packed_rows

KEY = jax.random.key(0)
ONE = {name: dataclasses.replace(config, layers=1) for name, config in FAMILIES.items()}
CASES = {  # every kind of layer, and every way to go through them
    "qwen3": ONE["qwen3"],
    "scanned qwen2": dataclasses.replace(FAMILIES["qwen2"], scan_layers=True),
    "scanned, again backwards": dataclasses.replace(
        LLAMA, scan_layers=True, remat="nothing_saveable", tied=False
    ),
    "ternary, again backwards": dataclasses.replace(
        ONE["llama"], linear="ternary", remat="dots_with_no_batch_dims_saveable"
    ),
}


def gradients(layer: TappedLayer, a: Any, g: Any, weight: Any) -> dict[str, np.ndarray]:
    """A layer's gradients from its activations and cotangents, by the definition."""
    if layer.layers:
        each = [gradients(layer._replace(layers=None), *x) for x in zip(a, g, weight, strict=True)]
        return {name: np.stack([e[name] for e in each]) for name in each[0]}
    a, g = np.asarray(a), np.asarray(g, np.float64)
    if layer.kind == "embedding":
        table = np.zeros(weight.shape)
        np.add.at(table, a.reshape(-1), g.reshape(-1, g.shape[-1]))
        return {layer.weight: table}
    if layer.kind == "norm":
        return {layer.weight: (a * g).reshape(-1, g.shape[-1]).sum(0)}
    assert layer.kind == "linear"
    found = {layer.weight: np.einsum("bti,bto->io", a, g)}
    if layer.bias:
        found[layer.bias] = g.sum((0, 1))
    return found


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow if c.startswith("ternary") else ()) for c in CASES],
)
def test_activations_and_cotangents_make_up_the_gradient(case: str) -> None:
    config = CASES[case]
    graph, params = build(config)
    batch = packed_rows()
    tapped = tapped_loss_fn(graph, chunk=60 if config.tied else 150)

    plain = decoder.loss_fn(graph, chunk=60 if config.tied else 150)

    def total(params: Any, taps: Any) -> Any:
        loss_BT, activations = tapped(params, taps, batch, KEY)
        return loss_BT.sum(), (loss_BT, activations, plain(params, batch, KEY))

    both = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (wanted, cotangents), (loss_BT, activations, plain_BT) = both(
        params, zero_taps(graph, params, batch)
    )
    np.testing.assert_allclose(loss_BT, plain_BT, rtol=1e-5, atol=1e-6)
    layers = tapped_layers(graph, params)
    assert layers.keys() == cotangents.keys() == activations.keys()
    wanted, found = by_path(wanted), {}
    for name, layer in layers.items():
        weight = by_path(params)[layer.weight]
        found |= gradients(layer, activations[name], cotangents[name], weight)
    # The rest of the parameters is the head; a tied table's gradient is in part the head's.
    assert wanted.keys() - found.keys() == (set() if config.tied else {"head/kernel"})
    for name, gradient in found.items():
        if not (config.tied and name == "embed/embedding"):
            size = np.abs(wanted[name]).max()
            assert size > 0
            np.testing.assert_allclose(gradient, wanted[name], atol=2e-5 * size, err_msg=name)


def test_a_subset_is_tapped_and_nothing_else_kept() -> None:
    graph, params = build(LLAMA)
    batch = packed_rows()
    names = ["layers/1/mlp/up", "final_norm"]
    taps = zero_taps(graph, params, batch, names)
    assert {n: t.shape for n, t in taps.items()} == {names[0]: (3, 50, 40), names[1]: (3, 50, 24)}
    _, activations = tapped_loss_fn(graph)(params, taps, batch, KEY)
    assert sorted(activations) == sorted(names)
    with pytest.raises(ConfigError, match=r"no operation 'layers/1/mlp/upp'.*'layers/1/mlp/up'"):
        zero_taps(graph, params, batch, ["layers/1/mlp/upp"])


def test_cotangents_of_rows_mapped_one_by_one_are_those_of_the_batch() -> None:
    graph, params = build(dataclasses.replace(LLAMA, layers=1))
    batch = packed_rows()
    tapped = tapped_loss_fn(graph)

    def of(batch: Any) -> Any:
        taps = zero_taps(graph, params, batch)
        return jax.grad(lambda t: tapped(params, t, batch, KEY)[0].sum())(taps)

    together = jax.jit(of)(batch)
    rows = jax.jit(jax.vmap(of))(jax.tree.map(lambda x: x[:, None], batch))
    for name, cotangent in together.items():
        np.testing.assert_allclose(rows[name][:, 0], cotangent, atol=1e-5, err_msg=name)


def test_bfloat16_taps_have_the_type_of_what_they_are_added_to() -> None:
    graph, params = build(ModelConfig(width=8, layers=1, heads=2, mlp_width=8, dtype="bfloat16"))
    batch = packed_rows()
    taps = zero_taps(graph, params, batch)
    assert {t.dtype for t in taps.values()} == {jnp.dtype("bfloat16")}
    loss_BT, _ = tapped_loss_fn(graph)(params, taps, batch, KEY)
    assert loss_BT.dtype == jnp.float32


def test_layers_are_described_without_arrays() -> None:
    config = dataclasses.replace(FAMILIES["qwen2"], scan_layers=True)
    graph, shapes = decoder.abstract_graph(config, V), decoder.abstract_params(config, V)
    layers = tapped_layers(graph, shapes)
    assert layers["layers/attention/key"] == TappedLayer(
        "linear", "layers/attention/key/kernel", "layers/attention/key/bias", 2
    )
    assert layers["embed"] == TappedLayer("embedding", "embed/embedding")
    assert layers["final_norm"] == TappedLayer("norm", "final_norm/scale")
    assert {x.weight for x in layers.values()} <= by_path(shapes).keys()
