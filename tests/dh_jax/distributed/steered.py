"""A process of a run of two: every policy by name, broken off and resumed.

``python -m tests.dh_jax.distributed.steered JOB`` reads a JSON file of configs by name, and
writes the weights in force at every step, as this process holds them, beside it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from dh_jax import train as training
from dh_jax.compose import compose_run
from dh_jax.distributed.processes import leave

BROKEN_OFF = 7  # behind the checkpoint of step 4

trail: list[tuple[int, dict[str, float]]] = []
stop_at: int | None = None
plain_record = training.train_record


def recorded(step: int, metrics: Any, rate: float, loader: Any, *rest: Any) -> dict[str, Any]:
    """What a run calls on every process at every step."""
    record = plain_record(step, metrics, rate, loader, *rest)
    trail.append((step, dict(loader.weights)))
    if step == stop_at:
        raise InterruptedError  # in both processes alike, as when a machine room goes dark
    return record


def main(job: Path) -> None:
    global stop_at
    training.train_record = recorded
    found = {}
    for name, overrides in json.loads(job.read_text()).items():
        trail.clear()
        config = compose_run([*overrides, f"out={job.parent / name}"])
        stop_at = BROKEN_OFF
        try:
            training.train(config)
        except InterruptedError:
            stop_at = None
            training.train(dataclasses.replace(config, resume=True))
        found[name] = list(trail)
    (job.parent / f"weights-{jax.process_index()}.json").write_text(json.dumps(found))
    leave(0, together=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
