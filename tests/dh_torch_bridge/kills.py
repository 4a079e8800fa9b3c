"""Kill two ranks at random moments, thirty times, and damage what they left now and then.

python kills.py FOLDER [KILLS]

Ranks train by gradients that are functions of the step, and save every step, so what they hold
at any step is known from a plain model. What a start restores is compared with it, bit for bit.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dh_torch_bridge.distributed.checkpoint import UNFINISHED, Checkpoints, written_steps
from dh_torch_bridge.distributed.named import named_parameters, named_tensors

RANKS, STEPS, WIDTH, KEEP = 2, 100_000, 512, 3


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(8)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for _, parameter in named_parameters(model):
        whole = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):  # every rank draws the same
            whole = distribute_tensor(
                whole, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.grad = whole
    optimizer.step()


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    found = xxhash.xxh3_128()
    for name, tensor in sorted(named_tensors(model, optimizer).items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found.update(name.encode() + whole.numpy().tobytes())
    return found.hexdigest()


def rank_main(rank: int, folder: Path, start: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{start}", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    model, _ = make()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    warnings.simplefilter("ignore")  # of damaged steps, which are counted below
    with Checkpoints(folder / "checkpoints", keep=KEEP) as checkpoints:
        restored = checkpoints.restore(model, optimizer)
        first = 0 if restored is None else restored.step
        found = digest(model, optimizer)
        if rank == 0:
            said = "" if restored is None else restored.host["said"]
            partial = folder / f"start-{start}.partial"
            partial.write_text(f"{first} {found} {said}")
            partial.rename(folder / f"start-{start}")
        for step in range(first, STEPS):
            train(model, optimizer, step)
            checkpoints.save(step + 1, model, optimizer, {"said": f"after-{step}"})


def damage(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    place = int(rng.integers(len(content)))
    content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content if rng.random() < 0.5 else content[:place])


def main(folder: Path, kills: int) -> None:
    rng = np.random.default_rng(7)
    context = multiprocessing.get_context("fork")
    known: dict[int, str] = {}  # step -> what a plain model holds
    model, optimizer = make()
    done = within = damaged = 0
    expected = 0  # the newest step that must be found
    bad: set[int] = set()  # steps damaged since the last start that got to reading
    for start in range(kills + 1):
        ranks: list[Any] = [
            context.Process(target=rank_main, args=(rank, folder, start)) for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.start()
        note = folder / f"start-{start}"
        began = time.monotonic()
        early = start % 5 == 4  # now and then before anything was restored
        while not note.exists() and not early:
            assert time.monotonic() - began < 120 and all(r.is_alive() for r in ranks), start
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2))
        os.kill(ranks[int(rng.integers(RANKS))].pid, signal.SIGKILL)
        time.sleep(rng.uniform(0, 0.3))
        for rank in ranks:
            rank.kill()
            rank.join()
        if note.exists():
            step, found, *said = note.read_text().split()
            while done <= int(step):
                known[done] = digest(model, optimizer) if done else digest(*make())
                train(model, optimizer, done)
                done += 1
            assert found == known[int(step)], f"start {start} read something else at step {step}"
            assert said == ([f"after-{int(step) - 1}"] if int(step) else [])
            assert int(step) == expected, f"start {start}: step {step}, not {expected}"
            bad.clear()
        steps = written_steps(folder / "checkpoints")
        within += any((folder / "checkpoints").glob(f"{UNFINISHED}*"))
        if start % 3 == 2 and len(steps) - len(bad) > 1:
            newest = max(set(steps) - bad)
            files = sorted((folder / "checkpoints" / str(newest)).iterdir())
            damage(files[int(rng.integers(len(files)))], rng)
            bad.add(newest)
            damaged += 1
        expected = max({0, *steps} - bad)
        for aside in (folder / "checkpoints").glob("damaged-*"):
            shutil.rmtree(aside)
    print(f"{kills} kills, {within} of them while a step was being written, {damaged} damaged;")
    print(f"every start read exactly the newest good step; {expected} steps in the end")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 30)
    os._exit(0)
