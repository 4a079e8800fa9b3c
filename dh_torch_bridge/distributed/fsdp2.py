"""A model spread over the mesh: copies (DDP), or a share for each rank, block by block (FSDP2)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dh_jax.config import DistributedConfig
from dh_jax.errors import ConfigError
from dh_torch_bridge.distributed.mesh import pick_device


def distribute(model: nn.Module, config: DistributedConfig, mesh: DeviceMesh | None) -> nn.Module:
    """Move a model to this rank's device and spread it over the mesh.

    Make the optimizer afterwards: FSDP2 replaces the parameters. Both strategies *average*
    gradients over the data-parallel ranks, so a loss that is a sum over this rank's tokens
    divided by the global count is multiplied by the number of ranks.

    Args:
        model: whole on every rank; the first rank's parameters and buffers are given to all.
        config: ``fsdp2`` shards each block of the model's outermost `nn.ModuleList` and then
            the rest, so that at most one block's parameters are gathered at a time.
        mesh: from `make_mesh`.

    Raises:
        ConfigError: fsdp2 finds no blocks in the model.
    """
    device = pick_device(config)
    model = model.to(device)
    if mesh is None:
        return model
    if config.strategy == "ddp":
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=mesh.get_group("replicate"),
        )
    with torch.no_grad():  # FSDP2 itself trusts that all ranks hold the same numbers
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0)
    for module in (*blocks_of(model), model):
        fully_shard(
            module,
            mesh=mesh if mesh["replicate"].size() > 1 else mesh["shard"],
            reshard_after_forward=config.reshard_after_forward,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=_dtype(config.param_dtype), reduce_dtype=_dtype(config.reduce_dtype)
            ),
        )
    return model


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
