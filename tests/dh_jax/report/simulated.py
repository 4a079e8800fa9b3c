"""Run folders of a toy learner, for tests of what is read from them and said about them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

SOURCES = ("code", "docs", "prose", "maths", "puzzles")
HELP = np.array([0.15, 0.1, -0.05, 1.0, 0.45])  # of a source for the target, maths
TOKENS_A_STEP = 4096


def simulate(
    folder: Path,
    policy: str,
    seed: int,
    *,
    steps: int = 120,
    gain: float = 1.0,
    documents: bool = False,
    status: str = "finished",
    noise: float = 0.01,
) -> Path:
    """A run folder of a toy learner: loss falls as a power of a source's tokens and its kin's."""
    rng = np.random.default_rng(seed)
    policy_rng = np.random.default_rng([seed, sum(policy.encode())])
    count = len(SOURCES)
    kin = 0.05 + 0.95 * np.eye(count)
    kin[3, 4] = kin[4, 3] = 0.35
    given = np.array([0.3, 0.2, 0.3, 0.1, 0.1]) if policy != "uniform" else np.full(count, 0.2)
    start = rng.normal(9.0, 0.03, count)
    weights, tokens = given.copy(), np.zeros(count)
    named: Callable[[Any], dict[str, float]] = lambda v: dict(  # noqa: E731
        zip(SOURCES, map(float, v), strict=True)
    )

    def losses() -> np.ndarray:
        return start * (1 + kin @ tokens / 8e3) ** -np.array([0.28, 0.25, 0.2, 0.3, 0.42])

    metrics, timing = [], [{"step": 0, "seconds": 21.5, "phase": "compile"}]
    for step in range(1, steps + 1):
        tokens += weights * TOKENS_A_STEP
        now = losses()
        timing.append({"step": step, "seconds": 0.4 + 0.02 * rng.random(), "phase": "train"})
        if step % 2 == 0:
            metrics.append({
                "kind": "train", "step": step, "loss": float(weights @ now + rng.normal(0, 0.05)),
                "grad_norm": float(0.4 + 2 / step + 0.05 * rng.random()),
                "learning_rate": 3e-3 * min(1, step / 20) * (1 + math.cos(3 * step / steps)) / 2,
                "tokens": step * TOKENS_A_STEP, "weights": named(weights),
                "tokens_by_source": named(tokens),
            })  # fmt: skip
        if step % 10 == 0 or step == 1:
            shown = now + policy_rng.normal(0, noise, count)
            metrics.append({"kind": "eval", "step": step, "domains": {
                name: {"loss": float(loss), "bits_per_byte": float(loss / 2.7), "targets": 16000}
                for name, loss in zip(SOURCES, shown, strict=True)
            }})  # fmt: skip
            timing.append({"step": step, "seconds": 0.9, "phase": "eval"})
        if policy == "influence" and step % 10 == 0:
            helpful = gain * HELP * now[3] / 8 + rng.normal(0, 0.1, count)
            weights = weights * np.exp(0.35 * helpful)
            weights = np.clip(weights / weights.sum(), 0.02, 0.9)
            weights /= weights.sum()
            metrics.append({
                "kind": "reweight", "step": step, "influence": named(-helpful),
                "weights": named(weights), "coverage": 1.0,
            })  # fmt: skip
            timing.append({"step": step, "seconds": 0.6 + 0.05 * rng.random(), "phase": "reweight"})
        if step % 50 == 0:
            timing.append({"step": step, "seconds": 0.3, "phase": "checkpoint"})

    folder.mkdir(parents=True)
    config = {
        "data": {"name": "demo", "seed": 0},
        "model": {"name": "tiny"},
        "mesh": {"name": "single"},
        "mixing": {"policy": policy, "interval": 10},
        "influence": {"targets": {"maths": 1.0}, "damping": 0.1},
        "training": {"steps": steps, "learning_rate": 3e-3, "seed": seed, "wandb": False},
        "out": f"runs/{folder.name}",
    }
    about = {
        "status": status, "targets": {"maths": 1.0}, "parameters": 1_803_392, "frozen": 0,
        "device": "cpu x 2 cores", "sources": list(SOURCES),
        "versions": {"data-handler": "0.1.0", "jax": "0.10.2", "python": "3.11.7"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "run.json").write_text(json.dumps(about))
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "timing.jsonl", timing)
    if documents:
        scored = [
            {"source": SOURCES[i % count], "id": f"0x{i * 2654435761 % 2**64:016x}",
             "score": float(rng.normal(-HELP[i % count], 0.4)), "text": _text(i)}
            for i in range(60)
        ]  # fmt: skip
        (folder / "documents.json").write_text(
            json.dumps({"targets": {"maths": 1.0}, "scored": 187, "documents": scored})
        )
    return folder


def _text(i: int) -> str:
    return (
        f"Document {i}: <script>alert('{i}')</script> & a <b>bold</b> claim.\n"
        "If $x < y$ and $y < z$ then $x < z$, so the relation is transitive.\n" * (i % 7 + 1) * 20
    )


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def raw(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def last_losses(folders: list[Path], policy: str, key: str = "loss") -> np.ndarray:
    """(seeds, sources), straight from the files."""
    chosen = [f for f in folders if f.name.startswith(policy)]
    ends = [[r for r in raw(f) if r["kind"] == "eval"][-1]["domains"] for f in chosen]
    return np.array([[end[name][key] for name in SOURCES] for end in ends])
