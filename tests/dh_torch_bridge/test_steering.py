"""The reference trainer steers: alike on any ranks, and on from a checkpoint as if unbroken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dh_torch_bridge.train import main  # noqa: E402
from tests.dh_torch_bridge.launch import torchrun, written  # noqa: E402

STEPS = 6


@pytest.fixture(scope="module")
def overrides(make_config: Any, store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = written(make_config(store=str(store)), tmp_path_factory.mktemp("config"))
    shape = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "mlp_width": 24}
    return [
        f"data={path}",
        *(f"model.{key}={value}" for key, value in shape.items()),
        f"training.steps={STEPS}",
        "training.batch_size=8",
        "training.warmup=1",
        "training.checkpoint_interval=3",
        "training.keep=9",
        "mixing.interval=2",
        "influence.targets={sums: 1}",
        "influence.rows_per_source=2",
        "influence.probe_rows=2",
        "influence.row_length=32",
    ]


@pytest.fixture(scope="module")
def alone(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main([*overrides, "mixing=influence", f"out={folder}"]) == 0
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def moves(folder: Path) -> np.ndarray:
    """Weights behind every move, and what the move saw, ``[moves, 2, sources]``."""
    found = [r for r in records(folder) if r["kind"] == "reweight"]
    assert [r["step"] for r in found] == [2, 4, 6]
    return np.array([[list(r[k].values()) for k in ("weights", "influence")] for r in found])


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_with_the_same_moves(
    overrides: list[str], alone: Path, tmp_path: Path
) -> None:
    weights = moves(alone)[:, 0]
    assert np.abs(np.diff(weights, axis=0)).max() > 1e-3  # it moves
    again = tmp_path / "again"
    shutil.copytree(alone, again)
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    assert main([*overrides, "mixing=influence", f"out={again}", "resume=true"]) == 0
    assert records(again) == records(alone)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "tp"])
def test_ranks_of_any_layout_make_the_moves_of_one_process(
    overrides: list[str], alone: Path, tmp_path: Path, layout: str
) -> None:
    folder = tmp_path / "run"
    command = ["-m", "dh_torch_bridge.train", *overrides, "mixing=influence", f"out={folder}"]
    done = torchrun(*command, f"distributed={layout}")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(moves(folder), moves(alone), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "said"),
    [("mixing=odm", "looks at losses by source"), ("mixing=influence mixing.budget=0.1", "budget")],
)
def test_what_it_cannot_do_is_said(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str,
    said: str,
) -> None:  # fmt: skip
    assert main([*overrides, *override.split(), f"out={tmp_path / 'run'}"]) == 2
    assert said in capsys.readouterr().err
