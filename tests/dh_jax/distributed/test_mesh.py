"""The mesh: axes from a config, rows where they belong, and which rows a process reads."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dh_jax.batch import Batch, TopKLogits
from dh_jax.config import MeshConfig
from dh_jax.distributed import mesh as meshes
from dh_jax.errors import ConfigError

V, B, T = 264, 8, 40
MESHES = {
    "data": MeshConfig("data", data=-1, fsdp=1),
    "fsdp": MeshConfig("fsdp", data=1, fsdp=-1),
    "both": MeshConfig("both", data=2, fsdp=4),
    "all": MeshConfig("all", data=2, fsdp=2, tensor=2),
    "sequence": MeshConfig("sequence", fsdp=2, sequence=4),
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
    ("sizes", "shape"),
    [
        ((1, 1, 1, 1), (1, 1, 1, 1)),
        ((-1, 1, 1, 1), (8, 1, 1, 1)),
        ((1, -1, 1, 1), (1, 8, 1, 1)),
        ((2, -1, 1, 2), (2, 2, 1, 2)),
        ((-1, 4, 1, 1), (2, 4, 1, 1)),
        ((1, 2, 1, -1), (1, 2, 1, 4)),
        ((2, 2, 1, 1), (2, 2, 1, 1)),
        ((1, -1, 2, 2), (1, 2, 2, 2)),
    ],
)
def test_minus_one_takes_what_is_left(
    sizes: tuple[int, int, int, int], shape: tuple[int, int, int, int]
) -> None:
    mesh = meshes.make_mesh(MeshConfig("m", *sizes))
    assert mesh.axis_names == meshes.AXES == ("data", "fsdp", "sequence", "tensor")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((4, 2, 1, 2), "needs 16 devices, there are 8.*device_count=16"),
        ((16, -1, 1, 1), "needs 16 devices, there are 8"),
        ((3, -1, 1, 1), "3 does not divide the 8 devices"),
        ((-1, -1, 1, 1), "at most one"),
        ((1, 1, 1, 0), "positive"),
    ],
)
def test_impossible_meshes_are_refused_with_the_cure(
    sizes: tuple[int, int, int, int], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        meshes.make_mesh(MeshConfig("m", *sizes))


def stand_in(sizes: tuple[int, int, int, int], processes: int) -> SimpleNamespace:
    """A mesh of devices on several processes, in the order that JAX lists them: two processes run
    for real in test_processes, the layouts of many cannot here."""
    count = int(np.prod(sizes))
    devices = [SimpleNamespace(process_index=i * processes // count) for i in range(count)]
    shape = dict(zip(meshes.AXES, sizes, strict=True))
    return SimpleNamespace(devices=np.array(devices).reshape(sizes), shape=shape)


@pytest.mark.parametrize(
    ("sizes", "processes", "shards"),
    [
        ((8, 1, 1, 1), 1, [(0, 1)]),
        ((8, 1, 1, 1), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 4, 1, 1), 2, [(0, 2), (1, 2)]),
        ((1, 4, 1, 2), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 1, 1, 4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # pairs share a row
        ((1, 1, 1, 8), 4, [(0, 1)] * 4),
        ((1, 2, 4, 1), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # as do parts of one
        ((2, 2, 1, 2), 8, [(0, 4), (0, 4), (1, 4), (1, 4), (2, 4), (2, 4), (3, 4), (3, 4)]),
    ],
)
def test_processes_that_share_rows_read_the_same_shard(
    sizes: tuple[int, int, int, int], processes: int, shards: list[tuple[int, int]]
) -> None:
    mesh = stand_in(sizes, processes)
    assert [meshes.loader_shard(mesh, i) for i in range(processes)] == shards  # type: ignore[arg-type]


def test_rows_that_no_process_has_a_part_of_its_own_of_are_refused() -> None:
    mesh = stand_in((2, 1, 1, 3), 3)  # the second process lies across both rows
    with pytest.raises(ConfigError, match="splits rows unevenly over 3 processes"):
        meshes.loader_shard(mesh, 0)  # type: ignore[arg-type]


def test_a_batch_on_the_mesh_keeps_its_values_and_splits_its_rows() -> None:
    batch = some_batch()
    for config, whole in itertools.product(MESHES.values(), (False, True)):
        mesh = meshes.make_mesh(config)
        placed = meshes.to_device(batch, mesh, whole=whole)
        assert placed.teacher is None
        for ours, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
            split = config.sequence > 1 and ours.ndim > 1
            tokens = ("sequence",) if split else ()
            assert ours.sharding.spec == PartitionSpec(("data", "fsdp"), *tokens)
            share = ours.addressable_shards[3].data
            assert share.shape[0] == B // meshes.row_ways(mesh)
            ways = meshes.token_ways(mesh) if split else meshes.row_ways(mesh)
            assert ours.size // share.size == ways
        teacher = TopKLogits(*(np.ones((B, T, 2), np.float32),) * 2, np.ones((B, T), np.float32))
        placed = meshes.to_device(batch._replace(teacher=teacher), mesh)
        assert placed.teacher is not None and placed.teacher.log_tail_BT.shape == (B, T)


def test_rows_that_do_not_divide_over_the_devices_are_refused() -> None:
    batch = jax.tree.map(lambda x: x[:6], some_batch())
    with pytest.raises(ConfigError, match="6 rows does not divide over 8 devices"):
        meshes.to_device(batch, meshes.make_mesh(MESHES["data"]))


def test_tokens_that_do_not_divide_over_the_devices_are_refused() -> None:
    batch = jax.tree.map(lambda x: x[:, :38] if x.ndim > 1 else x, some_batch())
    with pytest.raises(ConfigError, match=r"38 tokens .* mesh.sequence 4; .* multiple of 4"):
        meshes.to_device(batch, meshes.make_mesh(MESHES["sequence"]))


def test_replicate_puts_the_whole_array_on_every_device() -> None:
    mesh = meshes.make_mesh(MESHES["both"])
    whole = meshes.replicate({"x": jnp.arange(8.0)}, mesh)["x"]
    assert whole.sharding.is_fully_replicated and len(whole.addressable_shards) == 8


def test_to_host_gives_whole_arrays_of_any_sharding() -> None:
    mesh = meshes.make_mesh(MESHES["all"])
    table = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    for spec in (PartitionSpec(), PartitionSpec("fsdp", "tensor"), PartitionSpec(("data", "fsdp"))):
        placed = meshes.place(table, NamedSharding(mesh, spec))
        np.testing.assert_array_equal(meshes.to_host({"x": placed})["x"], table)
