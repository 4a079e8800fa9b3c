"""Checkpoints of several ranks: layouts, other numbers of ranks, kills, restarts. Minutes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dh_torch_bridge.distributed.checkpoint import Checkpoints, written_steps  # noqa: E402
from dh_torch_bridge.distributed.named import named_tensors  # noqa: E402
from tests.dh_torch_bridge.launch import written  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


def launch(*arguments: str, ranks: int, restarts: int = 0) -> subprocess.Popen[str]:
    """Ranks under torchrun, in a process group of their own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
    )


def finish(ranks: subprocess.Popen[str]) -> str:
    try:
        said, _ = ranks.communicate(timeout=900)
    finally:
        ranks.kill()
    assert ranks.returncode == 0, said[-6000:]
    return said


def test_every_layout_reads_what_every_layout_wrote(tmp_path: Path) -> None:
    from tests.dh_torch_bridge import saved_layouts as layouts

    said = finish(launch(str(HERE / "saved_layouts.py"), str(tmp_path), ranks=4))
    assert said.count("equal ") == len(layouts.LAYOUTS) ** 2 == 64
    model = layouts.plain(0)
    optimizer = layouts.adamw(model)
    layouts.train(model, optimizer, range(layouts.STEPS))
    expected = {name: x.clone() for name, x in named_tensors(model, optimizer).items()}
    for name in layouts.LAYOUTS:  # and by one process
        model = layouts.plain(1)
        optimizer = layouts.adamw(model)
        with Checkpoints(tmp_path / name) as checkpoints:
            assert checkpoints.restore(model, optimizer) == (layouts.STEPS, {"layout": name})
        layouts.assert_equal(model, optimizer, expected, name)


def test_thirty_kills_and_ten_damaged_steps_leave_nothing_wrong(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "kills.py"), str(tmp_path), "30"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "every start read exactly the newest good step" in done.stdout


# --- the trainer -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overrides(make_config: Any, store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = written(make_config(store=str(store)), tmp_path_factory.mktemp("config"))
    shape = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 48}
    return [
        "-m",
        "dh_torch_bridge.train",
        f"data={path}",
        *(f"model.{key}={value}" for key, value in shape.items()),
        "training.batch_size=8",
        "training.warmup=2",
        "training.learning_rate=3e-4",
        "training.checkpoint_interval=10",
        "training.keep=20",
    ]


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return [r["loss"] for r in records]


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_a_run_goes_on_with_other_ranks(
    before: int, after: int, overrides: list[str], tmp_path: Path
) -> None:
    """A hundred steps behind step 10, against the run that nobody broke off."""
    command = [*overrides, f"out={tmp_path / 'run'}", "distributed=fsdp2", "training.steps=110"]
    finish(launch(*command, ranks=before))
    whole = losses(tmp_path / "run")
    assert len(whole) == 110
    for step in written_steps(tmp_path / "run" / "checkpoints"):
        if step > 10:
            subprocess.run(["rm", "-r", tmp_path / "run" / "checkpoints" / str(step)], check=True)
    finish(launch(*command, "resume=true", ranks=after))
    again = losses(tmp_path / "run")
    print(f"{before} -> {after}: largest difference {np.abs(np.subtract(whole, again)).max():.1e}")
    np.testing.assert_allclose(again, whole, atol=2e-6, rtol=0)


def children(pid: int) -> list[int]:
    """Processes that a process started, the youngest last."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_torchrun_restarts_a_run_whose_rank_was_killed(
    overrides: list[str], tmp_path: Path
) -> None:
    command = [*overrides, "distributed=fsdp2", "training.steps=60"]
    finish(launch(*command, f"out={tmp_path / 'whole'}", ranks=2))
    run = launch(*command, f"out={tmp_path / 'killed'}", ranks=2, restarts=3)
    began = time.monotonic()
    for kill, least in enumerate((10, 30)):  # while it trains on from there
        while max([0, *written_steps(tmp_path / "killed" / "checkpoints")]) < least:
            assert run.poll() is None and time.monotonic() - began < 600
            time.sleep(0.01)
        os.kill(children(run.pid)[kill], signal.SIGKILL)
    finish(run)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
