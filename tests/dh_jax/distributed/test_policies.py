"""Every policy in a run of two processes: both hold the same weights at every step, and a run
that was broken off goes on with the weights of one that was not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dh_jax.mixing.registry import MOVING
from tests.dh_jax.distributed.running import write_data
from tests.dh_jax.distributed.steered import BROKEN_OFF

STEPS, SAVED = 8, 4
NAMES = ["schedule", *MOVING, "influence with a budget"]  # the others never move
CHANGES = {
    "schedule": ["mixing.stages=[{step: 9, weights: {mail: 1.0}}]", "mixing.interpolate=true"],
    "doremi": ["mixing.reference={code: 5.0, mail: 5.5, sums: 5.2}"],
    "aioli": ["mixing.interval=1", "mixing.hold=2"],
    "influence with a budget": ["mixing.budget=0.5", "mixing.longest=3"],
}
SMALL = (
    "model=tiny", "model.width=16", "model.layers=1", "model.heads=2", "model.kv_heads=1",
    "model.mlp_width=16", f"training.steps={STEPS}", "training.batch_size=4", "training.warmup=2",
    f"training.eval_interval={STEPS}", "training.eval_rows=2", "mesh=data",
    f"training.checkpoint_interval={SAVED}", "influence.rows_per_source=2",
    "influence.probe_rows=2", "influence.targets={sums: 1}",
)  # fmt: skip

Trails = dict[str, list[tuple[int, dict[str, float]]]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trails(
    make_config: Any, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trails, Trails]:
    """The weights at every step of every run, as either process held them."""
    folder = tmp_path_factory.mktemp("two")
    data = write_data(make_config(store=str(store)), folder)
    jobs = {
        name: [f"data={data}", *SMALL, f"mixing={name.split()[0]}",
               "mixing.interval=2", *CHANGES.get(name, [])]
        for name in NAMES
    }  # fmt: skip
    job = folder / "job.json"
    job.write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    logs = [folder / f"log-{index}" for index in range(2)]
    running = []
    for index, log in enumerate(logs):
        with log.open("w") as file:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.dh_jax.distributed.steered", str(job)],
                    env=environment | {"JAX_PROCESS_ID": str(index)},
                    stdout=file, stderr=file,
                )
            )  # fmt: skip
    codes = [process.wait(timeout=1200) for process in running]
    assert codes == [0, 0], [log.read_text()[-2000:] for log in logs]
    first, second = (json.loads((folder / f"weights-{i}.json").read_text()) for i in range(2))
    return first, second


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_hold_the_same_weights_at_every_step(
    name: str, trails: tuple[Trails, Trails]
) -> None:
    first, second = (trail[name] for trail in trails)
    assert first == second  # to the last bit: JSON writes a float in full
    assert len({json.dumps(weights) for _, weights in first}) > 1
    assert all(sum(weights.values()) == pytest.approx(1, abs=1e-5) for _, weights in first)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_broken_off_goes_on_with_the_same_weights(
    name: str, trails: tuple[Trails, Trails]
) -> None:
    """Where a budget sets the pace the clock says something else the second time; what had been
    decided stands all the same."""
    trail = trails[0][name]
    assert [step for step, _ in trail] == [*range(1, BROKEN_OFF + 1), *range(SAVED + 1, STEPS + 1)]
    assert trail[BROKEN_OFF : 2 * BROKEN_OFF - SAVED] == trail[SAVED:BROKEN_OFF]
    moved = trail[SAVED - 1][1] != trail[BROKEN_OFF - 1][1]
    assert moved or "budget" in name  # which may hold that it cannot afford one
