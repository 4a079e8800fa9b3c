"""A training step of our decoder against the same model of transformers in torch, on this CPU.

    python -m benchmarks.model                                  10 M parameters
    python -m benchmarks.model --shape smollm2_135m --steps 2

Needs torch and transformers. Both start from the same weights in float32 and take the same packed
rows, learning rates, clipping and AdamW; the losses of all steps are compared. transformers finds
the packed documents by their positions and runs its attention of ``sdpa``; torch's AdamW is the
fused one. Ours has its memory in huge pages, as `dh train` has; torch runs with and without.
Contenders run in turn, each in a process of its own, on as many cores as threads. Times are of a
step behind those that compile or warm up, CPU-seconds of all threads together; medians of the
processes' best steps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _measure
from dh_jax import huge_pages

SHAPES = {"small": ("small", 8192, 8, 256), "smollm2_135m": ("smollm2_135m", 49_152, 2, 256)}
CONTENDERS = ("ours", "torch", "torch, huge pages")
WARM = 2  # steps
TRAINING = {"steps": 1000, "learning_rate": 1e-3, "warmup": 20}


def write_task(folder: Path, shape: str, rows: int, length: int, steps: int) -> None:
    """Weights as a folder that both read, batches, and learning rates."""
    import dataclasses

    import jax
    from omegaconf import OmegaConf

    from dh_jax.config import ModelConfig, TrainingConfig, config_folder, typed
    from dh_jax.models.decoder import build
    from dh_jax.models.pretrained import save_pretrained
    from dh_jax.step import make_schedule

    name, vocab_size, *_ = SHAPES[shape]
    config = typed(ModelConfig, OmegaConf.load(config_folder() / "model" / f"{name}.yaml"))
    config = dataclasses.replace(config, dtype="float32", vocab_size=vocab_size)
    save_pretrained(folder / "model", config, build(config, vocab_size, jax.random.key(0))[1])
    rng = np.random.default_rng(0)
    tokens = rng.zipf(1.3, (steps, rows, length)).clip(max=vocab_size).astype(np.int32) - 1
    segments, positions = np.ones_like(tokens), np.zeros_like(tokens)
    for row_segments, row_positions in zip(
        segments.reshape(-1, length), positions.reshape(-1, length), strict=True
    ):  # documents of a fifth to four fifths of a row
        first = int(rng.integers(length // 5, length - length // 5))
        row_segments[first:] = 2
        row_positions[:] = np.r_[:first, : length - first]
    targets = np.zeros_like(tokens)
    targets[..., :-1] = tokens[..., 1:]
    mask = np.zeros(tokens.shape, bool)
    mask[..., :-1] = segments[..., 1:] == segments[..., :-1]
    schedule = make_schedule(TrainingConfig(**TRAINING))
    rates = np.array([float(schedule(i)) for i in range(steps)])
    np.savez(
        folder / "task.npz",
        tokens=tokens, targets=targets, mask=mask, segments=segments, positions=positions,
        rates=rates,
    )  # fmt: skip


def timed(step: Any, steps: int) -> dict[str, Any]:
    losses, cpu, wall = [], [], []
    for i in range(steps):
        start = _measure.cpu_seconds(), time.perf_counter()
        losses.append(step(i))
        cpu.append(_measure.cpu_seconds() - start[0])
        wall.append(time.perf_counter() - start[1])
    return {
        "cpu": min(cpu[WARM:]),
        "wall": min(wall[WARM:]),
        "first": sum(wall[:WARM]),
        "peak_mib": _measure.peak_mib(),
        "losses": losses,
    }


def ours(folder: Path) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from dh_jax.batch import Batch
    from dh_jax.config import TrainingConfig
    from dh_jax.influence.optimizer import InfluenceAwareOptimizer
    from dh_jax.mixing.policy import uniform
    from dh_jax.models.decoder import loss_fn
    from dh_jax.models.pretrained import load_pretrained
    from dh_jax.step import make_optimizer, make_step

    task = np.load(folder / "task.npz")
    model = load_pretrained(folder / "model")
    training = TrainingConfig(**TRAINING)
    optimizer = InfluenceAwareOptimizer(
        make_optimizer(training), uniform(), source_names=["one"], weights=[1.0]
    )
    state = optimizer.init(model.params)
    step, held = make_step(loss_fn(model.graph), optimizer, 1), [model.params, state]
    del model, state
    sources = np.zeros(task["tokens"].shape[1], np.int32)
    fields = ("tokens", "targets", "mask", "segments", "positions")

    def one(i: int) -> float:
        batch = Batch(*(task[name][i] for name in fields), sources)
        *held[:], metrics = step(*held, jax.tree.map(jnp.asarray, batch), jax.random.key(i))
        return float(jax.block_until_ready((held, metrics))[1].loss)

    return timed(one, len(task["tokens"]))


def torch(folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    task = np.load(folder / "task.npz")
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def one(i: int) -> float:
        tokens, positions = (
            torch.from_numpy(task[name][i].astype(np.int64)) for name in ("tokens", "positions")
        )
        wanted = np.where(task["mask"][i], task["targets"][i], -100).astype(np.int64)
        logits = model(tokens, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(wanted).flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = task["rates"][i]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return timed(one, len(task["tokens"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=4, help="timed, behind those that warm up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--child", nargs=3, metavar=("CONTENDER", "THREADS", "FOLDER"))
    options = parser.parse_args()
    if options.child:
        contender, threads, folder = options.child
        if contender != "torch":
            huge_pages.restart()
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
        print(json.dumps((ours if contender == "ours" else torch)(Path(folder))))
        return
    _, _, rows, length = SHAPES[options.shape]
    rows, length = options.rows or rows, options.length or length
    print(f"{options.shape}, {rows} rows of {length} tokens, float32; a step")
    print("| threads | | CPU s | wall s | peak MiB |\n| ---: | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as temporary:
        write_task(Path(temporary), options.shape, rows, length, WARM + options.steps)
        for threads in options.threads:
            runs: dict[str, list[Any]] = {name: [] for name in CONTENDERS}
            for _ in range(options.repeats):
                for name in CONTENDERS:
                    arguments = ["--child", name, str(threads), temporary]
                    runs[name].append(_measure.in_a_process(Path(__file__), arguments))
            losses = [np.array(runs[name][0].pop("losses")) for name in CONTENDERS]
            apart = max(np.abs(losses[0] - each).max() for each in losses[1:])
            medians = {
                name: _measure.median([{k: v for k, v in r.items() if k != "losses"} for r in rs])
                for name, rs in runs.items()
            }
            for name in CONTENDERS:
                m = medians[name]
                print(
                    f"| {threads} | {name} | {m['cpu']:.2f} | {m['wall']:.2f} "
                    f"| {m['peak_mib']:,.0f} |"
                )
            for name in CONTENDERS[1:]:
                m, peer = medians["ours"], medians[name]
                ratios = (m[k] / peer[k] for k in ("cpu", "wall", "peak_mib"))
                print(
                    f"| {threads} | ours / {name} | "
                    + " | ".join(f"{r:.2f}" for r in ratios)
                    + " |"
                )
            print(f"(largest difference of a loss: {apart:.1e})", file=sys.stderr)


if __name__ == "__main__":
    main()
