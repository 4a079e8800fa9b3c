"""What of a torch run is in a checkpoint, and how it goes on: on any number of ranks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from dh_jax.data.elastic import loader_states
from dh_torch_bridge.data import TorchLoader
from dh_torch_bridge.distributed.checkpoint import Checkpoints, Restored
from dh_torch_bridge.distributed.named import Model


def save_run(
    checkpoints: Checkpoints,
    step: int,
    model: Model,
    optimizer: torch.optim.Optimizer,
    loader: TorchLoader,
    schedule: LRScheduler | None = None,
    **host: Any,
) -> None:
    """Begin to write a checkpoint; training may go on when this returns. For all ranks.

    Args:
        step, model, optimizer: as `Checkpoints.save` has them.
        loader: its state is saved for every shard of rows, and the mixture's weights with it.
        schedule: of the learning rate.
        **host: further JSON-able values, for instance a mixture policy's state.
    """
    index, _ = loader.shard
    by_shard = {i: state for i, state in checkpoints.gather([index, loader.state_dict()])}
    host["loaders"] = [by_shard[i] for i in sorted(by_shard)]
    host["schedule"] = None if schedule is None else schedule.state_dict()
    checkpoints.save(step, model, optimizer, host)


def restore_run(
    checkpoints: Checkpoints,
    model: Model,
    optimizer: torch.optim.Optimizer,
    loader: TorchLoader,
    schedule: LRScheduler | None = None,
    step: int | None = None,
) -> Restored | None:
    """Read a checkpoint (the newest intact one) into all that `save_run` was given.

    Returns:
        Its step and host values; None if there is no checkpoint yet.

    Raises:
        StateError: see `Checkpoints.restore`; or the loader is of other data.
    """
    restored = checkpoints.restore(model, optimizer, step)
    if restored is None:
        return None
    index, count = loader.shard
    states, again = loader_states(restored.host["loaders"], count)
    loader.load_state_dict(states[index])
    if again and index == 0:
        warnings.warn(
            f"from {len(restored.host['loaders'])} to {count} data-parallel ranks: up to {again} "
            "documents of this pass are seen a second time, since streams are cut anew; none is "
            "lost",
            stacklevel=2,
        )
    if schedule is not None:
        schedule.load_state_dict(restored.host["schedule"])
    return restored
