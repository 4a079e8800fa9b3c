"""The device mesh: named axes, which rows a process reads, and how batches reach devices.

Axes, the outermost first: ``data`` (rows are split, parameters repeated), ``fsdp`` (rows and
parameters split), ``sequence`` (the tokens of each row split, parameters repeated), ``tensor``
(heads, feed-forward and vocabulary split; rows repeated). What of a parameter or an activation is
split over which axis is in `dh_jax.distributed.placement`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dh_jax.batch import Batch
from dh_jax.config import MeshConfig
from dh_jax.errors import ConfigError

AXES = ("data", "fsdp", "sequence", "tensor")
ROWS = ("data", "fsdp")  # the axes that rows are split over


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh over as many of the first devices as its sizes say; an axis of -1 takes what is left.

    Raises:
        ConfigError: there are not enough devices, or the sizes make no sense.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    count = jax.device_count()
    if list(sizes.values()).count(-1) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
        raise ConfigError(f"mesh sizes {sizes}: each must be positive, and at most one may be -1")
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if -1 in sizes.values() and fixed <= count and count % fixed:
        raise ConfigError(
            f"mesh sizes {sizes}: {fixed} does not divide the {count} devices, so -1 would leave "
            "some idle; give all sizes, or one that divides"
        )
    sizes = {axis: max(count // fixed, 1) if n == -1 else n for axis, n in sizes.items()}
    needed = math.prod(sizes.values())
    if needed > count:
        raise ConfigError(
            f"mesh {sizes} needs {needed} devices, there are {count}; take mesh=single, "
            f"or on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    if needed < count and jax.process_count() > 1:
        raise ConfigError(
            f"mesh {sizes} uses {needed} of {count} devices of {jax.process_count()} processes; "
            "all must take part: set one of the sizes to -1"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=jax.devices()[:needed],
    )


def row_ways(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are split; 1 on no mesh."""
    return math.prod(mesh.shape.get(axis, 1) for axis in ROWS)


def token_ways(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the tokens of a batch are split; 1 on no mesh."""
    return row_ways(mesh) * mesh.shape.get("sequence", 1)


def loader_shard(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(index, count) of the rows that a process feeds: the ``shard`` of `get_loader`.

    By place on the axes that split rows, never by the number of the process: processes that
    differ on the other axes alone hold the same rows, or parts of them, and must read the same.

    Args:
        mesh: of `make_mesh`.
        process: default: this one.

    Raises:
        ConfigError: the mesh does not deal rows to processes in equal, separate parts.
    """
    process = jax.process_index() if process is None else process
    held: dict[int, set[int]] = {}  # process -> the parts of the rows on its devices
    for place, device in np.ndenumerate(mesh.devices):
        part = place[0] * mesh.devices.shape[1] + place[1]
        held.setdefault(device.process_index, set()).add(part)
    shards = sorted({tuple(sorted(parts)) for parts in held.values()})
    if sum(map(len, shards)) != row_ways(mesh) or len(set(map(len, shards))) > 1:
        raise ConfigError(
            f"mesh {dict(mesh.shape)} splits rows unevenly over {len(held)} processes; take a "
            "tensor and a sequence size that divide a process's devices, or are multiples of them"
        )
    return shards.index(tuple(sorted(held[process]))), len(shards)


def batch_sharding(mesh: Mesh | AbstractMesh, dimensions: int = 1) -> NamedSharding:
    """Rows split over ``data`` and ``fsdp``, their tokens (of two dimensions or more) over
    ``sequence``."""
    if dimensions > 1 and mesh.shape.get("sequence", 1) > 1:
        return NamedSharding(mesh, PartitionSpec(ROWS, "sequence"))
    return NamedSharding(mesh, PartitionSpec(ROWS))


def to_device(batch: Batch, mesh: Mesh, *, whole: bool = False) -> Batch:
    """Rows on this host as one global batch, split over the mesh.

    Args:
        batch: this host's rows, from a loader with the shard of `loader_shard`.
        mesh: of `make_mesh`.
        whole: every host has all rows of the global batch, and places its part of them.

    Raises:
        ConfigError: the global rows, or the tokens of a row, do not divide evenly over the mesh.
    """
    B, T = batch.tokens_BT.shape
    rows = B * (1 if whole else loader_shard(mesh)[1])
    if rows % row_ways(mesh):
        raise ConfigError(
            f"a batch of {rows} rows does not divide over {row_ways(mesh)} devices; "
            f"take a multiple of {row_ways(mesh)}"
        )
    if T % (ways := mesh.shape["sequence"]):
        raise ConfigError(
            f"rows of {T} tokens do not divide over mesh.sequence {ways}; "
            f"take a multiple of {ways} for max_length"
        )
    shardings = jax.tree.map(lambda x: batch_sharding(mesh, x.ndim), batch)
    if whole:
        return place(batch, shardings)

    def one(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
        # Said, since a process has its rows whole, also where only a part of them is for it.
        shape = (rows, *local.shape[1:])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    placed: Batch = jax.tree.map(one, batch, shardings)
    return placed


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, each on its devices; nothing crosses the network."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(array: Any, sharding: NamedSharding) -> jax.Array:
        local = np.asarray(array)
        return jax.make_array_from_callback(local.shape, sharding, _slices(local))

    return jax.tree.map(one, tree, shardings)


def _slices(local: np.ndarray) -> Callable[[Any], np.ndarray]:
    return lambda index: local[index]


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every array whole on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, whole)
    return jax.jit(lambda x: x, out_shardings=whole)(tree)


def to_host(tree: Any) -> Any:
    """Arrays of any sharding, whole, as NumPy on every process; call it on all of them.

    One array at a time, so beside the result no more than one is gathered. For the tensors of a
    whole model take them one by one: ``for path, x in leaves: write(path, to_host(x))``.
    """

    def one(array: Any) -> np.ndarray:
        if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(one, tree)
