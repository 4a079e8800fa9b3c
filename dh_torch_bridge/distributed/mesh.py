"""The mesh of torch ranks: named axes, the device of a rank, and which rows it reads.

Axes: ``replicate`` (groups that each hold the whole model) and ``shard`` (ranks among which a
group splits it). Rows are split over both, so they count as data-parallel ranks together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dh_jax.config import DistributedConfig, find_yaml, suggest, typed
from dh_jax.errors import ConfigError

AXES = ("replicate", "shard")
STRATEGIES = ("single", "ddp", "fsdp2")
BACKENDS = ("auto", "nccl", "gloo")
DTYPES = ("float32", "bfloat16", "float16")


def load_distributed_config(
    config: str | Path | DistributedConfig | Mapping[str, Any], overrides: Sequence[str] = ()
) -> DistributedConfig:
    """Read a config: a shipped name (``"fsdp2"``), a YAML file, a mapping, or one already typed.

    Raises:
        ConfigError: the name, a key or a value is wrong; the message names it and the cure.
    """
    raw: Any = config
    if isinstance(config, str | Path):
        raw = OmegaConf.load(find_yaml("distributed", config))
    return validate(typed(DistributedConfig, raw, overrides, where="distributed"))


def validate(config: DistributedConfig) -> DistributedConfig:
    """Check every rule that does not depend on the number of ranks.

    Raises:
        ConfigError: a rule is broken; names the value and what is allowed.
    """
    for key, allowed in (
        ("strategy", STRATEGIES),
        ("backend", BACKENDS),
        ("param_dtype", (*DTYPES, None)),
        ("reduce_dtype", (*DTYPES, None)),
    ):
        value = getattr(config, key)
        if value not in allowed:
            known = [name or "null" for name in allowed]
            raise ConfigError(
                f"distributed.{key} is {value!r}{suggest(value, known)}; "
                f"allowed: {', '.join(known)}"
            )
    sizes = [config.replicate, config.shard]
    if sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise ConfigError(
            f"{_spelt(config)}: each must be positive, and at most one may be -1 (what is left)"
        )
    if config.strategy == "single" and sizes != [1, 1]:
        raise ConfigError(f"{_spelt(config)}: single is one process; set both to 1")
    if config.strategy == "ddp" and config.shard != 1:
        raise ConfigError(f"{_spelt(config)}: ddp splits no model; set shard=1, or take fsdp2")
    if config.strategy != "fsdp2" and (config.param_dtype or config.reduce_dtype):
        raise ConfigError(
            f"distributed.param_dtype={config.param_dtype} reduce_dtype={config.reduce_dtype}: "
            f"only fsdp2 keeps two precisions; set both to null for {config.strategy} "
            "(model.dtype=bfloat16 computes in bfloat16)"
        )
    return config


def mesh_sizes(config: DistributedConfig, ranks: int) -> tuple[int, int]:
    """Sizes of ``replicate`` and ``shard`` over so many ranks, with -1 filled in.

    Raises:
        ConfigError: they do not fit the number of ranks.
    """
    fixed = abs(config.replicate * config.shard)  # at most one of them is -1
    if ranks % fixed or (fixed != ranks and -1 not in (config.replicate, config.shard)):
        if config.strategy == "single":
            cure = "take distributed=ddp or distributed=fsdp2, or start one process"
        else:
            cure = f"start torchrun with --nproc-per-node {fixed}, or set one of them to -1"
            if -1 in (config.replicate, config.shard):
                divisors = [str(n) for n in range(1, ranks + 1) if ranks % n == 0]
                cure = f"take one of {', '.join(divisors)}, or a multiple of {fixed} ranks"
        raise ConfigError(f"{_spelt(config)} does not fit {ranks} ranks; {cure}")
    left = ranks // fixed
    return (
        left if config.replicate == -1 else config.replicate,
        left if config.shard == -1 else config.shard,
    )


def pick_device(config: DistributedConfig) -> torch.device:
    """This rank's device: its GPU under nccl (or auto, where there is one), else the CPU.

    Raises:
        ConfigError: this machine has too few GPUs.
    """
    gpus = torch.cuda.device_count()
    if config.backend == "gloo" or (config.backend == "auto" and not gpus):
        return torch.device("cpu")
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > gpus:
        raise ConfigError(
            f"{needed} ranks need {needed} GPUs, this machine has {gpus}; "
            f"start torchrun with --nproc-per-node {max(gpus, 1)}, "
            "or set distributed.backend=gloo (CPU)"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def make_mesh(config: DistributedConfig) -> DeviceMesh | None:
    """The mesh of all ranks; None for ``single``. Starts the process group if there is none.

    Raises:
        ConfigError: the sizes do not fit the ranks, a GPU is missing, or there is no torchrun.
    """
    validate(config)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if config.strategy != "single" and not dist.is_initialized() and "RANK" not in os.environ:
        raise ConfigError(
            f"distributed.strategy={config.strategy} needs ranks; start with "
            "torchrun --nproc-per-node N -m ..., or take distributed=single"
        )
    sizes = mesh_sizes(config, dist.get_world_size() if dist.is_initialized() else ranks)
    device = pick_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.strategy == "single":
        return None
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return init_device_mesh(device.type, sizes, mesh_dim_names=AXES)


def data_shard(mesh: DeviceMesh | None) -> tuple[int, int]:
    """(data-parallel rank, size): the ``shard`` of `get_loader`.

    By place on the data axes, never by global rank: ranks that differ on another axis only (say
    tensor parallel) must read the same rows.
    """
    if mesh is None:
        return 0, 1
    rank, size = 0, 1
    for axis in AXES:
        rank = rank * mesh[axis].size() + mesh.get_local_rank(axis)
        size *= mesh[axis].size()
    return rank, size


def sum_over_data(tensor: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """Add up a tensor over all data-parallel ranks, in place."""
    if mesh is not None:
        for axis in AXES:
            dist.all_reduce(tensor, group=mesh.get_group(axis))
    return tensor


def _spelt(config: DistributedConfig) -> str:
    return f"distributed replicate={config.replicate} shard={config.shard} ({config.strategy})"
