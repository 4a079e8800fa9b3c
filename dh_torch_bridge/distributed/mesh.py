"""The mesh of torch ranks: named axes, the device of a rank, and which rows it reads.

Axes, from the slowest links to the fastest: ``pipeline`` (layers are split), ``replicate``
(groups that each hold the whole model), ``shard`` (ranks among which a group splits it) and
``tensor`` (every matrix is split). Rows are split over ``replicate`` and ``shard``, so these
count as data-parallel ranks together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dh_jax.config import DistributedConfig, find_yaml, suggest, typed
from dh_jax.errors import ConfigError


class Sizes(NamedTuple):
    """Ranks along each axis, in the order of the mesh."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    tensor: int = 1


AXES = Sizes._fields
DATA_AXES = ("replicate", "shard")
STRATEGIES = ("single", "ddp", "fsdp2")
BACKENDS = ("auto", "nccl", "gloo")
DTYPES = ("float32", "bfloat16", "float16")
# Schedules of `torch.distributed.pipelining`: its name, and the stages of a rank (None: any).
SCHEDULES: dict[str, tuple[str, int | None]] = {
    "gpipe": ("GPipe", 1),
    "1f1b": ("1F1B", 1),
    "interleaved_1f1b": ("Interleaved1F1B", None),
    "interleaved_zero_bubble": ("InterleavedZeroBubble", None),
    "zbv": ("ZBVZeroBubble", 2),
}
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv")


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
        ("schedule", tuple(SCHEDULES)),
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
    sizes = [getattr(config, axis) for axis in AXES]
    if sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise ConfigError(
            f"{_spelt(config)}: each must be positive, and at most one may be -1 (what is left)"
        )
    if config.strategy == "single" and sizes != [1] * len(AXES):
        raise ConfigError(f"{_spelt(config)}: single is one process; set all to 1")
    if config.strategy == "ddp" and sizes != [*Sizes(replicate=config.replicate)]:
        raise ConfigError(f"{_spelt(config)}: ddp splits no model; set shard=1, or take fsdp2")
    if config.strategy != "fsdp2" and (config.param_dtype or config.reduce_dtype):
        raise ConfigError(
            f"distributed.param_dtype={config.param_dtype} reduce_dtype={config.reduce_dtype}: "
            f"only fsdp2 keeps two precisions; set both to null for {config.strategy} "
            "(model.dtype=bfloat16 computes in bfloat16)"
        )
    if config.strategy != "fsdp2" and config.cpu_offload:
        raise ConfigError(
            f"distributed.cpu_offload=true: only fsdp2 moves shares to the host, and the strategy "
            f"is {config.strategy}; set it to false, or take distributed=fsdp2"
        )
    if config.sequence_parallel and config.tensor == 1:
        raise ConfigError(
            "distributed.sequence_parallel=true splits tokens over the tensor ranks, and tensor "
            "is 1; set distributed.tensor, or sequence_parallel=false"
        )
    if not config.timeout > 0:
        raise ConfigError(f"distributed.timeout is {config.timeout}; give seconds above 0")
    if config.pipeline != 1:
        stages_of_rank(config)
        shares = config.replicate != 1 or config.shard != 1 or config.cpu_offload
        shares = shares or config.param_dtype is not None or config.reduce_dtype is not None
        if config.schedule in SPLIT_BACKWARD and shares and config.reshard_after_forward:
            # Seen with torch 2.13: weights' gradients are wrong, and nothing says so.
            raise ConfigError(
                f"distributed.schedule={config.schedule} splits the backward, which FSDP2 gets "
                "wrong where it frees parameters in between; set "
                "distributed.reshard_after_forward=false, or take interleaved_1f1b"
            )
    return config


def stages_of_rank(config: DistributedConfig) -> int:
    """Pipeline stages that each rank holds.

    Raises:
        ConfigError: the schedule takes another number.
    """
    fixed = SCHEDULES[config.schedule][1]
    stages = config.stages or fixed or 2
    if stages < 1 or (fixed and stages != fixed):
        raise ConfigError(
            f"distributed.stages is {stages}; the schedule {config.schedule} takes "
            f"{fixed or 'one or more'} on every rank"
        )
    return stages


def mesh_sizes(config: DistributedConfig, ranks: int) -> Sizes:
    """Sizes of the axes over so many ranks, with -1 filled in.

    Raises:
        ConfigError: they do not fit the number of ranks.
    """
    given = Sizes(*(getattr(config, axis) for axis in AXES))
    fixed = math.prod(n for n in given if n != -1)  # at most one of them is -1
    if ranks % fixed or (fixed != ranks and -1 not in given):
        if config.strategy == "single":
            cure = "take distributed=ddp or distributed=fsdp2, or start one process"
        else:
            cure = f"start torchrun with --nproc-per-node {fixed}, or set one of them to -1"
            if -1 in given:
                divisors = [str(n) for n in range(1, min(ranks, 4096) + 1) if ranks % n == 0]
                cure = f"take one of {', '.join(divisors)}, or a multiple of {fixed} ranks"
        raise ConfigError(f"{_spelt(config)} does not fit {ranks} ranks; {cure}")
    return Sizes(*(ranks // fixed if n == -1 else n for n in given))


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
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=config.timeout)
        )
    return init_device_mesh(device.type, sizes, mesh_dim_names=AXES)


def data_shard(mesh: DeviceMesh | None) -> tuple[int, int]:
    """(data-parallel rank, size): the ``shard`` of `get_loader`.

    By place on the data axes, never by global rank: ranks that differ on another axis only (say
    tensor parallel) must read the same rows.
    """
    if mesh is None:
        return 0, 1
    rank, size = 0, 1
    for axis in DATA_AXES:
        rank = rank * mesh[axis].size() + mesh.get_local_rank(axis)
        size *= mesh[axis].size()
    return rank, size


def sum_over_data(tensor: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """Add up a tensor over all data-parallel ranks, in place."""
    return sum_over(tensor, mesh, DATA_AXES)


def sum_over(tensor: torch.Tensor, mesh: DeviceMesh | None, axes: Sequence[str]) -> torch.Tensor:
    """Add up a tensor over all ranks along these axes, in place."""
    for axis in axes:
        if mesh is not None and mesh[axis].size() > 1:
            dist.all_reduce(tensor, group=mesh.get_group(axis))
    return tensor


def _spelt(config: DistributedConfig) -> str:
    sizes = {axis: getattr(config, axis) for axis in AXES}
    named = " ".join(
        f"{axis}={size}" for axis, size in sizes.items() if axis in DATA_AXES or size != 1
    )
    return f"distributed {named} ({config.strategy})"
