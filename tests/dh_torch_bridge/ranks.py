"""What each of two ranks does for test_train.py, under torchrun: read rows, then train.

torchrun ... ranks.py FOLDER OVERRIDE...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dh_jax.compose import compose
from dh_jax.config import ModelConfig, TorchRunConfig
from dh_torch_bridge import data_shard, get_loader, load_distributed_config, make_mesh
from dh_torch_bridge.train import train


def main(folder: Path, overrides: list[str]) -> None:
    for name in ("ddp", "fsdp2", "tp", "pretrained"):
        config = load_distributed_config("fsdp2" if name == "pretrained" else name)
        mesh = make_mesh(config)
        run = compose("torch_train", TorchRunConfig, [*overrides, f"out={folder / name}"])
        run.distributed = config
        if name == "pretrained":  # what the others draw, from a folder
            run.model = ModelConfig(pretrained=str(folder / "start"))
        with get_loader(run.data, batch_size=8, shard=data_shard(mesh)) as loader:
            rows = torch.stack([next(loader)["input_ids"] for _ in range(5)])
        torch.save(rows, folder / f"{name}-rank{dist.get_rank()}.pt")
        train(run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    dist.barrier()
    os._exit(0)
