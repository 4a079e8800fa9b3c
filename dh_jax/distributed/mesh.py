"""The device mesh: named axes, where parameters live, and how batches reach devices.

Axes: ``data`` (rows are split, parameters repeated) and ``fsdp`` (rows and parameters split).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dh_jax.batch import Batch
from dh_jax.config import MeshConfig
from dh_jax.errors import ConfigError
from dh_jax.functions import Params

AXES = ("data", "fsdp")
SHARDED_FROM = 2**14  # elements; smaller arrays are repeated rather than split


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh over the first ``data * fsdp`` devices; an axis of -1 takes what is left.

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
            "some idle; give both sizes, or one that divides"
        )
    sizes = {axis: max(count // fixed, 1) if n == -1 else n for axis, n in sizes.items()}
    needed = math.prod(sizes.values())
    if needed > count:
        raise ConfigError(
            f"mesh {sizes} needs {needed} devices, there are {count}; take mesh=single, "
            f"or on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    return Mesh(np.array(jax.devices()[:needed]).reshape(tuple(sizes.values())), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over every axis."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def param_shardings(params: Params, mesh: Mesh) -> Params:
    """Sharding of each parameter: its largest axis that divides evenly over ``fsdp``."""
    ways = mesh.shape["fsdp"]

    def place(array: Any) -> NamedSharding:
        spec: list[str | None] = []  # in jit's own spelling: no trailing None
        fitting = [axis for axis in range(array.ndim) if array.shape[axis] % ways == 0]
        if ways > 1 and fitting and array.size >= SHARDED_FROM:
            longest = max(fitting, key=lambda axis: array.shape[axis])
            spec = [None] * longest + ["fsdp"]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, params)


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """This host's rows as its part of one global batch, split over the mesh.

    Raises:
        ConfigError: the global rows do not divide evenly over the mesh.
    """
    rows, devices = batch.tokens_BT.shape[0] * jax.process_count(), mesh.size
    if rows % devices:
        raise ConfigError(
            f"a batch of {rows} rows does not divide over {devices} devices; "
            f"take a multiple of {devices}"
        )
    sharding = batch_sharding(mesh)
    placed: Batch = jax.tree.map(
        lambda local: jax.make_array_from_process_local_data(sharding, local), batch
    )
    return placed


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every array whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
