"""What of a run is in a checkpoint, and how it goes on: on any mesh, with any number of hosts."""

from __future__ import annotations

import warnings
from typing import Any

from jax.sharding import Mesh

from dh_jax.data.elastic import loader_states
from dh_jax.data.loader import Loader
from dh_jax.distributed.agreement import of_all_shards
from dh_jax.distributed.checkpoint import Checkpoints, Restored
from dh_jax.distributed.mesh import loader_shard
from dh_jax.sampling import Samplers


def save_run(
    checkpoints: Checkpoints,
    step: int,
    arrays: Any,
    loader: Loader,
    samplers: Samplers | None,
    mesh: Mesh,
) -> None:
    """Begin to write a checkpoint; ``arrays`` may be donated when this returns.

    Loaders have a state for each shard of rows; samplers have the same on every host.
    """
    host: dict[str, Any] = {"loaders": of_all_shards(loader.get_state(), mesh)}
    if samplers is not None:
        host["samplers"] = samplers.get_state()
    checkpoints.save(step, arrays, host)


def restore_run(
    checkpoints: Checkpoints, like: Any, loader: Loader, samplers: Samplers | None, mesh: Mesh
) -> Restored:
    """Read the newest intact checkpoint and set loader and samplers to it.

    Raises:
        StateError: see `Checkpoints.restore`; or the states are of other data.
    """
    restored = checkpoints.restore(like)
    index, count = loader_shard(mesh)
    states, again = loader_states(restored.host["loaders"], count)
    loader.set_state(states[index])
    if again and index == 0:
        warnings.warn(
            f"from {len(restored.host['loaders'])} to {count} hosts: up to {again} documents of "
            "this pass are seen a second time, since streams are cut anew; none is lost",
            stacklevel=2,
        )
    if samplers is not None:
        samplers.set_state(restored.host["samplers"])
    return restored
