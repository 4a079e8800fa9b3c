"""Adapters: nothing changes at first, merging changes nothing, files keep them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dh_jax.config import LoraConfig
from dh_jax.errors import ConfigError
from dh_jax.models import decoder, lora
from tests.dh_jax.models.model_cases import LLAMA, build, by_path, packed_rows

KEY = jax.random.key(1)
CONFIG = LoraConfig(rank=3, alpha=6.0, targets="query$|mlp/up$")


@pytest.mark.parametrize("scan", [False, True])
def test_adapters_begin_as_nothing_merge_exactly_and_survive_their_file(
    scan: bool, tmp_path: Path
) -> None:
    graph, base = build(dataclasses.replace(LLAMA, scan_layers=scan))
    batch = packed_rows()
    plain = jax.jit(decoder.loss_fn(graph))
    adapted, adapters = lora.adapt(graph, base, CONFIG, KEY)
    loss: Any = lora.loss_fn(adapted, base)
    run = jax.jit(lambda loss, adapters: loss(adapters, batch, KEY))
    start = plain(base, batch, KEY)
    np.testing.assert_allclose(run(loss, adapters), start, atol=1e-6)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.1, x.shape)), adapters)
    moved = run(loss, adapters)
    assert np.abs(moved - start).max() > 0.01
    together = lora.merge(base, adapters, CONFIG)
    np.testing.assert_allclose(plain(together, batch, KEY), moved, atol=2e-5)
    apart = lora.merge(together, adapters, CONFIG, sign=-1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), apart, base)
    lora.save_adapters(tmp_path, adapters, CONFIG)
    back = lora.load_adapters(tmp_path, adapters, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    other = dataclasses.replace(CONFIG, alpha=CONFIG.alpha + 1)
    with pytest.raises(ConfigError, match=rf"lora_alpha is {CONFIG.alpha}.*model.lora.alpha="):
        lora.load_adapters(tmp_path, adapters, other)
    for whole, part in zip((base, adapters), lora.split(lora.combine(base, adapters)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, whole, part)


def test_targets_that_match_nothing_are_refused() -> None:
    graph, base = build(LLAMA)
    with pytest.raises(ConfigError, match="matches none of 14 linear layers"):
        lora.adapt(graph, base, LoraConfig(rank=1, targets="nothing"), KEY)
    names = by_path(lora.adapt(graph, base, CONFIG, KEY)[1])
    assert len(names) == 8 and "layers/1/mlp/up/lora_b" in names
