"""What each of four ranks does for test_checkpoint_ranks.py: save every layout, load into every.

torchrun --nproc-per-node 4 layouts.py FOLDER

Expected numbers come from one plain model on each rank, which never saw a mesh.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from dh_jax.config import ModelConfig
from dh_torch_bridge.distributed.checkpoint import Checkpoints
from dh_torch_bridge.distributed.named import named_parameters, named_tensors
from dh_torch_bridge.train import build_llama

# The vocabulary is no multiple of four, so that some shares are uneven.
SHAPE = ModelConfig(width=40, layers=3, heads=4, kv_heads=4, mlp_width=56, tied=True)
STEPS = 3


def plain(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return build_llama(SHAPE, 90)


def by_blocks(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for module in (*model.get_submodule("model.layers").children(), model):
        fully_shard(module, mesh=mesh)
    return model


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {f"self_attn.{x}_proj": ColwiseParallel() for x in "qkv"}
    plan |= {f"mlp.{x}_proj": ColwiseParallel() for x in ("gate", "up")}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for block in model.get_submodule("model.layers").children():
        parallelize_module(block, mesh, plan)
    return model


def mesh_of(**axes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def ddp(seed: int) -> nn.Module:
    return DistributedDataParallel(plain(seed))


def fsdp2(seed: int) -> nn.Module:
    return by_blocks(plain(seed), mesh_of(shard=4))


def hsdp(seed: int) -> nn.Module:
    return by_blocks(plain(seed), mesh_of(replicate=2, shard=2))


def tp(seed: int) -> nn.Module:
    return tensor_parallel(plain(seed), mesh_of(tensor=4))


def fsdp2_tp(seed: int) -> nn.Module:
    mesh = mesh_of(shard=2, tensor=2)
    return by_blocks(tensor_parallel(plain(seed), mesh["tensor"]), mesh["shard"])


def pp_fsdp2(seed: int) -> list[nn.Module]:
    """Two stages of two ranks, each sharded; the first has one block, the second two."""
    mesh, model = mesh_of(pipeline=2, shard=2), plain(seed)
    first = mesh.get_local_rank("pipeline") == 0
    blocks = {name: x for name, x in model.model.layers.named_children() if (name == "0") == first}
    model.model.layers = nn.ModuleDict(blocks)
    del model.lm_head  # tied, and no stage runs here
    if first:
        model.model.norm = None
    else:
        model.model.embed_tokens = None
    return [by_blocks(model, mesh["shard"])]


LAYOUTS: dict[str, Callable[[int], Any]] = {
    x.__name__: x for x in (ddp, fsdp2, hsdp, tp, fsdp2_tp, pp_fsdp2)
}


def adamw(model: Any) -> torch.optim.AdamW:
    # Step by step over tensors: groups of sharded and whole ones cannot be fused.
    return torch.optim.AdamW([p for _, p in named_parameters(model)], lr=0.01, foreach=False)


def gradient(name: str, step: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return torch.randn(like.shape, generator=generator)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Updates by gradients that are functions of a parameter's name."""
    for step in steps:
        for name, parameter in named_parameters(model):
            whole = gradient(name, step, parameter)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.grad = whole
        optimizer.step()


def assert_equal(model: Any, optimizer: Any, expected: dict[str, torch.Tensor], said: str) -> None:
    for name, tensor in named_tensors(model, optimizer).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, expected[name]), f"{said}: {name}"


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    model = plain(0)
    optimizer = adamw(model)
    train(model, optimizer, range(STEPS))
    expected = {name: x.clone() for name, x in named_tensors(model, optimizer).items()}
    train(model, optimizer, range(STEPS, STEPS + 2))
    later = named_tensors(model, optimizer)
    for name, make in LAYOUTS.items():
        model = make(0)
        optimizer = adamw(model)
        train(model, optimizer, range(STEPS))
        with Checkpoints(folder / name) as checkpoints:
            checkpoints.save(STEPS, model, optimizer, {"layout": name})
            train(model, optimizer, range(9, 10))  # while it is written
    for target, make in LAYOUTS.items():
        for source in LAYOUTS:
            model = make(1)
            optimizer = adamw(model)
            said = f"{source} -> {target}"
            with Checkpoints(folder / source) as checkpoints:
                assert checkpoints.restore(model, optimizer) == (STEPS, {"layout": source})
            assert_equal(model, optimizer, expected, said)
            train(model, optimizer, range(STEPS, STEPS + 2))
            assert_equal(model, optimizer, later, f"{said}, two steps on")
            if dist.get_rank() == 0:
                print("equal", said, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.barrier()
    os._exit(0)
