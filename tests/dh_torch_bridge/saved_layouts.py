"""What each of four ranks does for test_checkpoint_ranks.py: save every layout, load into every.

torchrun --nproc-per-node 4 saved_layouts.py FOLDER

Expected numbers come from one plain model on each rank, which never saw a mesh.
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaForCausalLM

from dh_jax.config import ModelConfig
from dh_torch_bridge import load_distributed_config
from dh_torch_bridge.distributed.checkpoint import Checkpoints
from dh_torch_bridge.distributed.named import named_parameters, named_tensors
from dh_torch_bridge.distributed.parallelize import Parallel, parallelize
from dh_torch_bridge.train import build_llama

SHAPE = ModelConfig(width=40, layers=4, heads=4, kv_heads=4, mlp_width=56, tied=True)
STEPS = 3


def plain(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return build_llama(SHAPE, 92)


LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp", "replicate": 4},
    "fsdp2": {"shard": 4},
    "hsdp": {"replicate": 2, "shard": 2},
    "tp": {"tensor": 4},
    "fsdp2_tp": {"shard": 2, "tensor": 2},
    "pp_fsdp2": {"pipeline": 2, "shard": 2, "schedule": "1f1b"},
    "interleaved_tp": {"pipeline": 2, "tensor": 2, "schedule": "interleaved_1f1b"},
    # One rank of two has the tied table twice.
    "zbv_fsdp2": {"pipeline": 2, "shard": 2, "schedule": "zbv", "reshard_after_forward": False},
}


def spread(name: str, seed: int) -> Parallel:
    return parallelize(plain(seed), load_distributed_config({"strategy": "fsdp2"} | LAYOUTS[name]))


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
    for name, parameter in named_parameters(model):  # also both of a tied table's
        found = {f"model.{name}": parameter.detach()}
        found |= {f"optimizer.{name}.{k}": x for k, x in optimizer.state[parameter].items()}
        for full, tensor in found.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(whole, expected[full]), f"{said}: {full}"


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    model = plain(0)
    optimizer = adamw(model)
    train(model, optimizer, range(STEPS))
    expected = {name: x.clone() for name, x in named_tensors(model, optimizer).items()}
    train(model, optimizer, range(STEPS, STEPS + 2))
    later = named_tensors(model, optimizer)
    for name in LAYOUTS:
        model = spread(name, 0)
        optimizer = adamw(model)
        train(model, optimizer, range(STEPS))
        with Checkpoints(folder / name) as checkpoints:
            checkpoints.save(STEPS, model, optimizer, {"layout": name})
            train(model, optimizer, range(9, 10))  # while it is written
    for target in LAYOUTS:
        for source in LAYOUTS:
            model = spread(target, 1)
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
