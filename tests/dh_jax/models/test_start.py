"""A run that starts from a folder and trains adapters alone."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.completion import complete, open_model
from dh_jax.config import LoraConfig, MeshConfig, ModelConfig, RunConfig, TrainingConfig
from dh_jax.distributed.mesh import make_mesh
from dh_jax.distributed.placement import param_shardings
from dh_jax.dryrun import abstract_step, step_bytes
from dh_jax.errors import ConfigError
from dh_jax.functions import as_argument, round_matrices
from dh_jax.models import decoder
from dh_jax.models.lora import split
from dh_jax.models.pretrained import save_pretrained
from dh_jax.models.start import abstract_start, resolve, start
from dh_jax.step import make_optimizer
from dh_jax.train import train
from tests.dh_jax.models.model_cases import build, by_path

SHAPE = ModelConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=16)


def test_adapters_train_beside_a_pretrained_base(
    make_config: Any, store: Path, tokenizer: Any, tmp_path: Path
) -> None:
    _, params = build(SHAPE, vocab_size=tokenizer.vocab_size)
    save_pretrained(tmp_path / "base", SHAPE, params, tokenizer)
    config = RunConfig(
        data=make_config(store=str(store)),
        model=ModelConfig(pretrained=str(tmp_path / "base"), lora=LoraConfig(rank=4, targets=".")),
        training=TrainingConfig(
            steps=60, batch_size=4, eval_rows=4, learning_rate=0.1, warmup=1, eval_interval=60
        ),
        out=str(tmp_path / "run"),
    )
    facts = train(config)
    assert facts["parameters"] < 4 * 7 * (16 + 16) * 2  # adapters alone
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    evals = [r["domains"] for r in map(json.loads, lines) if r["kind"] == "eval"]
    before, after = (sum(d["loss"] for d in domains.values()) for domains in (evals[0], evals[-1]))
    assert after < before
    # The checkpoint opens as a model that writes: the base with the trained adapters.
    opened = open_model(tmp_path / "run")
    _, adapters = split(opened.params)
    moved = [x for path, x in by_path(adapters).items() if path.endswith("lora_b")]
    assert len(moved) == 7 and all(np.abs(x).max() > 0 for x in moved)
    base, _ = split(opened.params)
    jax.tree.map(np.testing.assert_array_equal, base, params)
    (written,) = complete(opened, "def ", new_tokens=1)
    assert written.tokens == [1]


@pytest.mark.parametrize(("rank", "scan"), [(0, False), (2, False), (2, True)])
def test_what_a_dry_run_assumes_is_what_a_run_starts_with(rank: int, scan: bool) -> None:
    config = dataclasses.replace(SHAPE, lora=LoraConfig(rank=rank), scan_layers=scan)
    config = dataclasses.replace(config, dtype="bfloat16")
    real = start(config, 32, jax.random.key(0))
    mesh = make_mesh(MeshConfig(fsdp=8))
    planned = abstract_start(config, 32, mesh)

    def described(tree: Any) -> Any:
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert described(planned.params) == described(real.params)
    carried = [as_argument(each.loss_fn) for each in (planned, real)]
    assert described(jax.tree.leaves(carried[0])) == described(jax.tree.leaves(carried[1]))
    assert bool(jax.tree.leaves(carried[0])) == bool(rank)


@pytest.mark.parametrize("scan", [False, True])
def test_a_drawn_model_is_the_same_on_a_mesh_and_never_whole_on_a_device(scan: bool) -> None:
    config = dataclasses.replace(SHAPE, width=128, layers=6, mlp_width=512, scan_layers=scan)
    mesh, first = make_mesh(MeshConfig(fsdp=8)), jax.devices()[0]

    def on_first() -> int:
        there = [x for x in jax.live_arrays() if first in x.sharding.device_set]
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in there)

    alone = jax.tree.map(np.asarray, start(config, 512, jax.random.key(0)).params)
    before, held = on_first(), []

    def shardings(params: Any) -> Any:
        held.append(on_first() - before)  # with the part that is still to be placed
        return param_shardings(params, mesh)

    params = start(config, 512, jax.random.key(0), shardings).params
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    for x, place in zip(
        *map(jax.tree.leaves, (params, param_shardings(params, mesh))), strict=True
    ):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    whole = sum(x.nbytes for x in jax.tree.leaves(alone))
    assert len(held) == 8 and max(held) < whole / 2


def test_vectors_of_scanned_layers_are_no_matrices() -> None:
    """They are stacked to two axes, but neither decay nor are rounded, as where they lie alone."""
    optimizer = make_optimizer(TrainingConfig(weight_decay=0.5, warmup=0, learning_rate=0.1))
    for scan in (False, True):
        config = dataclasses.replace(SHAPE, scan_layers=scan, qkv_bias=True)
        _, params = decoder.build(config, 32, jax.random.key(0))
        params = jax.tree.map(lambda x: x + 1, params)  # biases begin at 0
        zero = jax.tree.map(jnp.zeros_like, params)
        moved, _ = optimizer.update(zero, optimizer.init(params), params)
        rounded = round_matrices(params, jnp.bfloat16)
        for path, x in jax.tree_util.tree_leaves_with_path(moved):
            is_vector = path[-1].key in ("scale", "bias")
            assert bool(jnp.any(x != 0)) != is_vector, path
        for path, x in jax.tree_util.tree_leaves_with_path(rounded):
            is_vector = path[-1].key in ("scale", "bias")
            assert x.dtype == (jnp.float32 if is_vector else jnp.bfloat16), path


def test_adapters_are_priced_as_adapters() -> None:
    """The frozen base costs its bytes once; full training has gradients and moments beside it."""
    shape = dataclasses.replace(SHAPE, width=256, mlp_width=1024, heads=4, kv_heads=4)
    mesh = make_mesh(MeshConfig())

    def memory(rank: int) -> int:
        model = dataclasses.replace(shape, lora=LoraConfig(rank=rank))
        step, arguments = abstract_step(
            model, TrainingConfig(batch_size=1), mesh, vocab_size=512, row_length=32
        )
        return step_bytes(step.lower(*arguments).compile())

    base = 4 * decoder.count_parameters(decoder.abstract_params(shape, 512))
    assert base < memory(rank=2) < 1.5 * base
    assert memory(rank=0) > 3 * base


@pytest.mark.parametrize("config", [ModelConfig(pretrained=""), ModelConfig(pretrained="nowhere")])
def test_a_start_from_no_folder_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"model\.pretrained is empty|nowhere"):
        resolve(config)


def test_a_shape_beside_that_of_a_folder_is_refused(tmp_path: Path) -> None:
    _, params = build(SHAPE)
    save_pretrained(tmp_path, SHAPE, params)
    with pytest.raises(ConfigError, match=r"model\.layers is 7.*has 1; take model=pretrained"):
        resolve(ModelConfig(pretrained=str(tmp_path), layers=7))
