"""Two real processes form one run: they equal one, stop together, and others go on for them."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dh_jax.compose import compose_run
from dh_jax.config import MeshConfig
from dh_jax.distributed.checkpoint import read_host
from dh_jax.distributed.processes import join
from dh_jax.errors import ConfigError
from dh_jax.train import train
from tests.dh_jax.distributed.running import Command, finish, losses, records, write_data

STEPS = 12
STEERED = (
    f"training.steps={STEPS}", "mixing=influence", "mixing.interval=5",
    "influence.rows_per_source=4", "influence.probe_rows=4", "influence.targets={sums: 1}",
)  # fmt: skip


def logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


@pytest.mark.slow
def test_two_processes_equal_one_stop_together_and_one_goes_on_for_them(
    make_config: Any, store: Path, tmp_path: Path
) -> None:
    data = write_data(make_config(store=str(store)), tmp_path)
    command = Command(data, tmp_path / "compiled")
    out, alone = tmp_path / "two", tmp_path / "one"
    running = command.start(out, *STEERED, "mesh=data", processes=2)
    while logged(out) < 4 and all(process.poll() is None for process in running):
        time.sleep(0.01)
    running[1].send_signal(signal.SIGTERM)  # one hears it; both stop behind the same step
    first, second = finish(running, code=130)
    assert "resume=true" in first and "loss" in first and "loss" not in second
    facts = json.loads((out / "run.json").read_text())
    assert facts["status"] == "interrupted" and facts["step"] < STEPS

    # The weights that the policy moved reached both, to the last bit.
    saved = read_host(out / "checkpoints", before=STEPS)
    assert saved is not None and saved.step == facts["step"] >= 5
    states = [
        {name: part["weight"] for name, part in state["mixture"].items()}
        for state in saved.host["loaders"]
    ]
    assert len(states) == 2 and states[0] == states[1] == records(out, "reweight")[0]["weights"]
    assert states[0]["sums"] > 0.35

    # One process goes on, on eight devices and another mesh; and one did it all.
    train(
        compose_run(command.overrides(out, *STEERED, "mesh.fsdp=4", "mesh.tensor=2", "resume=true"))
    )
    train(compose_run(command.overrides(alone, *STEERED)))
    assert len(losses(out)) == STEPS
    np.testing.assert_allclose(losses(out), losses(alone), rtol=0, atol=5e-5)
    for ours, theirs in zip(records(out, "reweight"), records(alone, "reweight"), strict=True):
        assert ours["weights"] == pytest.approx(theirs["weights"], abs=1e-4)
    assert [r["tokens"] for r in records(out)] == [r["tokens"] for r in records(alone)]


@pytest.mark.slow
def test_two_processes_that_each_hold_half_of_every_row_equal_one(
    make_config: Any, store: Path, tmp_path: Path
) -> None:
    data = write_data(make_config(store=str(store)), tmp_path)
    command = Command(data, tmp_path / "compiled")
    short = ("training.steps=4", "training.eval_interval=2")
    command.run(tmp_path / "two", *short, "mesh=sequence", processes=2)
    command.run(tmp_path / "one", *short)
    two, one = (losses(tmp_path / name) for name in ("two", "one"))
    assert len(two) == 4
    np.testing.assert_allclose(two, one, rtol=0, atol=5e-5)
    for ours, theirs in zip(*(records(tmp_path / x, "eval") for x in ("two", "one")), strict=True):
        for name, domain in theirs["domains"].items():
            assert ours["domains"][name]["loss"] == pytest.approx(domain["loss"], abs=5e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"coordinator": "here:1"}, r"mesh\.processes is null.*JAX_NUM_PROCESSES"),
        ({"coordinator": "here:1", "processes": 2, "process": 2}, "an index below it"),
        ({"coordinator": "here", "processes": 2, "process": 0}, "give host:port"),
    ],
)
def test_half_a_run_is_refused(given: dict[str, Any], said: str) -> None:
    assert join(MeshConfig()) == 0  # nothing said: one process
    with pytest.raises(ConfigError, match=said):
        join(MeshConfig(**given))
