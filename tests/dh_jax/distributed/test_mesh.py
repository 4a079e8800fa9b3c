"""The mesh: axes from a config, parameters and rows where they belong, the same loss anywhere."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dh_jax.batch import Batch, TopKLogits
from dh_jax.config import MeshConfig, ModelConfig
from dh_jax.distributed import mesh as meshes
from dh_jax.errors import ConfigError
from dh_jax.functions import masked_mean
from dh_jax.models import decoder

V, B, T = 264, 8, 40
KEY = jax.random.key(0)
MESHES = {
    "data": MeshConfig("data", data=-1, fsdp=1),
    "fsdp": MeshConfig("fsdp", data=1, fsdp=-1),
    "both": MeshConfig("both", data=2, fsdp=4),
}


def some_batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, V, (2, B, T), dtype=np.int32)
    segments = np.sort(rng.integers(0, 4, (B, T), dtype=np.int32), axis=1)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    # Unequal counts a row: a mean of per-device means would differ from the global mean.
    mask = (segments > 0) & (np.arange(B)[:, None] * 5 > np.arange(T))
    return Batch(tokens, targets, mask, segments, positions, np.arange(B, dtype=np.int32))


def test_simulated_devices_are_there() -> None:
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"),
    [
        (1, 1, (1, 1)),
        (-1, 1, (8, 1)),
        (1, -1, (1, 8)),
        (2, -1, (2, 4)),
        (-1, 4, (2, 4)),
        (2, 2, (2, 2)),
    ],
)
def test_minus_one_takes_what_is_left(data: int, fsdp: int, shape: tuple[int, int]) -> None:
    mesh = meshes.make_mesh(MeshConfig("m", data=data, fsdp=fsdp))
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("data", "fsdp", "said"),
    [
        (4, 4, "needs 16 devices, there are 8.*device_count=16"),
        (16, -1, "needs 16 devices, there are 8"),
        (3, -1, "3 does not divide the 8 devices"),
        (-1, -1, "at most one"),
        (0, 1, "positive"),
    ],
)
def test_impossible_meshes_are_refused_with_the_cure(data: int, fsdp: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        meshes.make_mesh(MeshConfig("m", data=data, fsdp=fsdp))


def test_parameters_split_their_largest_axis_that_divides_and_small_ones_repeat() -> None:
    params = {
        "wide": jnp.zeros((64, 1024)),
        "tall": jnp.zeros((1024, 64)),
        "odd": jnp.zeros((1023, 64)),
        "prime": jnp.zeros((257, 131)),
        "small": jnp.zeros((64,)),
    }
    mesh = meshes.make_mesh(MESHES["fsdp"])
    specs = jax.tree.map(lambda s: tuple(s.spec), meshes.param_shardings(params, mesh))
    assert specs["wide"] == (None, "fsdp")
    assert specs["tall"] == ("fsdp",)  # as jit spells it: no second compilation
    assert specs["odd"] == (None, "fsdp")
    assert not any(specs["prime"] + specs["small"])
    placed = jax.device_put(params, meshes.param_shardings(params, mesh))
    assert placed["wide"].addressable_shards[0].data.shape == (64, 128)


def test_a_batch_on_the_mesh_keeps_its_values_and_splits_its_rows() -> None:
    batch = some_batch()
    for config in MESHES.values():
        mesh = meshes.make_mesh(config)
        placed = meshes.to_device(batch, mesh)
        assert placed.teacher is None
        for ours, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
            assert ours.sharding.spec == PartitionSpec(("data", "fsdp"))
            assert ours.addressable_shards[3].data.shape[0] == 1
        teacher = TopKLogits(*(np.ones((B, T, 2), np.float32),) * 2, np.ones((B, T), np.float32))
        placed = meshes.to_device(batch._replace(teacher=teacher), mesh)
        assert placed.teacher is not None and placed.teacher.log_tail_BT.shape == (B, T)


def test_rows_that_do_not_divide_over_the_devices_are_refused() -> None:
    batch = jax.tree.map(lambda x: x[:6], some_batch())
    with pytest.raises(ConfigError, match="6 rows does not divide over 8 devices"):
        meshes.to_device(batch, meshes.make_mesh(MESHES["data"]))


@cache
def step_and_start() -> tuple[Any, Any]:
    config = ModelConfig(width=64, layers=1, mlp_width=256)
    graph, params = decoder.build(config, V, KEY)
    loss_fn = decoder.loss_fn(graph, chunk=160)  # two chunks

    def step(params: Any, batch: Batch) -> tuple[Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return masked_mean(loss_fn(params, batch, KEY), batch.loss_mask_BT)

        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient), value

    return jax.jit(step), params


@cache
def trained(name: str) -> tuple[list[float], Any]:
    """Losses of three steps on a mesh and the parameters after them."""
    step, params = step_and_start()
    mesh = meshes.make_mesh(MESHES.get(name, MeshConfig()))
    params = jax.device_put(params, meshes.param_shardings(params, mesh))
    batch, losses = meshes.to_device(some_batch(), mesh), []
    for _ in range(3):
        params, loss = step(params, batch)
        losses.append(float(loss))
    return losses, params


@pytest.mark.parametrize("name", MESHES)
def test_training_on_eight_devices_gives_the_losses_of_one(name: str) -> None:
    losses, _ = trained(name)
    alone, _ = trained("single")
    assert alone[2] < alone[0] - 0.1
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


@pytest.mark.parametrize("name", MESHES)
def test_parameters_keep_their_shardings_through_training(name: str) -> None:
    _, params = trained(name)
    wanted = meshes.param_shardings(params, meshes.make_mesh(MESHES[name]))
    kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, wanted)
    assert all(jax.tree.leaves(kept))
    split = [x for x in jax.tree.leaves(params) if not x.sharding.is_fully_replicated]
    assert bool(split) == (name != "data")


def test_replicate_puts_the_whole_array_on_every_device() -> None:
    mesh = meshes.make_mesh(MESHES["both"])
    whole = meshes.replicate({"x": jnp.arange(8.0)}, mesh)["x"]
    assert whole.sharding.is_fully_replicated and len(whole.addressable_shards) == 8
