"""The same training on any mesh: losses over twenty steps, and checkpoints from mesh to mesh."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dh_jax.batch import Batch
from dh_jax.config import MeshConfig, ModelConfig, TrainingConfig
from dh_jax.distributed.checkpoint import Checkpoints
from dh_jax.distributed.mesh import make_mesh, place, to_device
from dh_jax.distributed.placement import on_mesh, param_shardings
from dh_jax.functions import LossFn
from dh_jax.influence.optimizer import InfluenceAwareOptimizer
from dh_jax.mixing.policy import uniform
from dh_jax.models import decoder
from dh_jax.step import make_optimizer, make_step
from tests.dh_jax.distributed import float64_model

V, B, T, STEPS, HALF = 256, 8, 24, 20, 10
MESHES = {  # data, fsdp, sequence, tensor
    "1": (1, 1, 1, 1), "8x1": (8, 1, 1, 1), "4x2": (4, 2, 1, 1), "2x2x2": (2, 2, 1, 2),
    "sequence": (2, 2, 2, 1),
}  # fmt: skip
KEY = jax.random.key(0)
TRAINING = TrainingConfig(steps=STEPS, learning_rate=1e-2, warmup=2)


def batch_of(step: int) -> Batch:
    """Random rows whose counts of targets differ: a mean of per-device means would be wrong."""
    rng = np.random.default_rng(step)
    tokens, targets = rng.integers(0, V, (2, B, T), dtype=np.int32)
    segments = np.sort(rng.integers(0, 4, (B, T), dtype=np.int32), axis=1)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    mask = (segments > 0) & (np.arange(B)[:, None] * 3 > np.arange(T))
    return Batch(tokens, targets, mask, segments, positions, np.arange(B, dtype=np.int32) % 2)


class Trainer:
    """The library's step on one mesh, from the same start on every mesh."""

    def __init__(self, sizes: tuple[int, int, int, int], loss_fn: LossFn, params: Any):
        self.mesh = make_mesh(MeshConfig("test", *sizes))
        optimizer = InfluenceAwareOptimizer(
            make_optimizer(TRAINING), uniform(), source_names=["a", "b"], weights=[0.5, 0.5]
        )
        params = place(params, param_shardings(params, self.mesh))
        shardings = param_shardings(jax.eval_shape(optimizer.init, params), self.mesh)
        state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        self.start = params, state
        self.step = make_step(
            on_mesh(loss_fn, self.mesh),
            optimizer,
            2,
            (
                param_shardings(params, self.mesh),
                shardings,
                NamedSharding(self.mesh, PartitionSpec()),
            ),
        )

    def run(self, first: int, last: int, start: Any = None) -> tuple[list[float], Any]:
        """Losses of steps ``first + 1`` to ``last``, and parameters and state behind them."""
        params, state = jax.tree.map(jnp.copy, self.start if start is None else start)
        losses = []
        for number in range(first, last):
            batch = to_device(batch_of(number), self.mesh)
            params, state, metrics = self.step(params, state, batch, KEY)
            losses.append(float(metrics.loss))
        return losses, (params, state)


@cache
def trainer(name: str) -> Trainer:
    config = ModelConfig(width=128, layers=2, heads=2, kv_heads=2, mlp_width=128)
    graph, params = decoder.build(config, V, KEY)
    return Trainer(MESHES[name], decoder.loss_fn(graph, chunk=80), params)  # three chunks


@cache
def uninterrupted(name: str) -> list[float]:
    return trainer(name).run(0, STEPS)[0]


@pytest.mark.parametrize("name", [name for name in MESHES if name != "1"])
def test_twenty_steps_on_eight_devices_are_those_of_one(name: str) -> None:
    alone = uninterrupted("1")
    assert len(set(alone)) == STEPS and np.isfinite(alone).all()
    np.testing.assert_allclose(uninterrupted(name), alone, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", [name for name in MESHES if name != "1"])
def test_parameters_and_moments_keep_their_places_and_nothing_is_compiled_twice(name: str) -> None:
    on_eight = trainer(name)
    _, behind = on_eight.run(0, 3)
    wanted = param_shardings(behind, on_eight.mesh)
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), behind, wanted)
        )
    )
    split = [x for x in jax.tree.leaves(behind) if not x.sharding.is_fully_replicated]
    assert bool(split) == (name != "8x1")
    assert on_eight.step.func._cache_size() == 1  # type: ignore[attr-defined]


@pytest.mark.slow
def test_in_float64_the_losses_agree_to_nine_digits() -> None:
    with jax.enable_x64(True):
        params = float64_model.build(V, 128, 256, 1, KEY)
        losses = {
            name: Trainer(sizes, float64_model.loss_fn, params).run(0, STEPS)[0]
            for name, sizes in MESHES.items()
        }
    alone = losses.pop("1")
    assert abs(alone[-1] - alone[0]) > 1e-3
    for name, found in losses.items():
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("source", MESHES)
def test_a_checkpoint_of_any_mesh_goes_on_on_every_other(source: str, tmp_path: Path) -> None:
    _, behind = trainer(source).run(0, HALF)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(HALF, behind, {"mesh": source})
        for target in MESHES:
            onto = trainer(target)
            restored = checkpoints.restore(onto.start)
            assert restored.step == HALF and restored.host == {"mesh": source}
            for ours, theirs, like in zip(
                *map(jax.tree.leaves, (restored.arrays, behind, onto.start)), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs)
                assert ours.sharding.is_equivalent_to(like.sharding, ours.ndim)
            losses, _ = onto.run(HALF, STEPS, restored.arrays)
            if source == target:
                assert losses == uninterrupted(target)[HALF:]
            np.testing.assert_allclose(losses, uninterrupted("1")[HALF:], rtol=0, atol=5e-5)
