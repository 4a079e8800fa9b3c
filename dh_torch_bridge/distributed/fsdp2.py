"""A model spread over the data-parallel ranks: copies (DDP), or a share for each rank, block by
block (FSDP2), with what goes with shares: precision, recomputation and host memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils.checkpoint import checkpoint

from dh_jax.config import DistributedConfig
from dh_jax.errors import ConfigError


def shard_blocks(model: nn.Module, config: DistributedConfig, mesh: DeviceMesh) -> None:
    """Shard each block and then the rest, so that at most one block is gathered at a time.

    With one data-parallel rank it still keeps the two precisions and the offloading that the
    config asks for, and else does nothing.

    Raises:
        ConfigError: there are no blocks in the model.
    """
    alone = mesh["replicate"].size() * mesh["shard"].size() == 1
    if alone and not (config.param_dtype or config.reduce_dtype or config.cpu_offload):
        return
    # Pinned memory needs a driver to pin it.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for module in (*blocks_of(model), model):
        fully_shard(
            module,
            mesh=mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"],
            # What is left over, table and head, is needed again as soon as the backward begins.
            reshard_after_forward=config.reshard_after_forward and module is not model,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=_dtype(config.param_dtype), reduce_dtype=_dtype(config.reduce_dtype)
            ),
            offload_policy=offload if config.cpu_offload else OffloadPolicy(),
        )


def recompute_blocks(model: nn.Module) -> None:
    """Let each block keep its inputs alone and compute the rest again in the backward.

    The forward is replaced and not the call, so that hooks that gather parameters run once.
    """
    for block in blocks_of(model):
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: what the model's outermost `nn.ModuleList` holds.

    Raises:
        ConfigError: there is none, so that one gather would bring the whole model.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    blocks = [
        block
        for name, modules in lists.items()
        if not any(name.startswith(f"{outer}.") for outer in lists)
        for block in modules
        if block is not None  # another pipeline stage has it
    ]
    if not blocks:
        raise ConfigError(
            f"distributed=fsdp2 finds no nn.ModuleList of blocks in {type(model).__name__}; "
            "keep the layers in one, or take distributed=ddp"
        )
    return blocks


def _dtype(name: str | None) -> torch.dtype | None:
    dtype: torch.dtype | None = getattr(torch, name) if name else None
    return dtype
