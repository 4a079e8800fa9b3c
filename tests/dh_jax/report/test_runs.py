"""Run folders are read whole or refused with file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dh_jax.errors import DataError
from dh_jax.report import find_runs, load_run, summarise
from dh_jax.report.plots import throughput
from dh_jax.report.runs import tokens_at
from tests.dh_jax.report.simulated import TOKENS_A_STEP, raw


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "timing.jsonl", "run.json"])
def test_a_missing_file_is_named(run_folder: Path, name: str) -> None:
    (run_folder / name).unlink()
    with pytest.raises(DataError, match=rf"{re.escape(name)}: missing"):
        load_run(run_folder)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("run.json", '{\n"status": "finished",\n', "run.json line 3: not JSON"),
        ("run.json", "[]", "run.json: expected an object, got list"),
        ("config.yaml", "mixing: [\nx: :", r"config.yaml line \d: not YAML"),
        ("config.yaml", "mixing: {}", "config.yaml: 'mixing': no 'policy'"),
        (
            "timing.jsonl",
            '{"step": 1, "seconds": "x", "phase": "train"}',
            "line 1: 'seconds' is 'x'",
        ),
        ("timing.jsonl", '{"step": true, "seconds": 1, "phase": "a"}', "line 1: 'step' is True"),
        ("documents.json", '{"targets": {"maths": 1}}', "documents.json: no 'documents'"),
        ("documents.json", '{"targets": {"m": 1}, "documents": [{}]}', "document 0: no 'source'"),
        ("metrics.jsonl", "\n", "no 'train' record"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(
    run_folder: Path, name: str, text: str, said: str
) -> None:
    (run_folder / name).write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        load_run(run_folder)
    assert "\n" not in str(caught.value) and str(run_folder) in str(caught.value)


def test_a_broken_line_inside_a_log_is_refused_with_its_number(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], lines[4][:30] + "\n", *lines[5:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl line 5: not JSON"):
        load_run(run_folder)


def test_a_half_last_line_is_left_out_and_told_of(run_folder: Path) -> None:
    whole = load_run(run_folder)
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ste')
    cut = load_run(run_folder)
    assert cut.train == whole.train and whole.notes == ()
    number_of_lines = len((run_folder / "metrics.jsonl").read_text().splitlines())
    assert cut.notes == (
        f"metrics.jsonl: line {number_of_lines} is cut off (a killed run); left out",
    )
    assert any("cut off" in warning for warning in summarise([cut]).warnings)


def test_steps_that_go_back_unknown_targets_and_foreign_sources_are_refused(
    run_folder: Path,
) -> None:
    path = run_folder / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text + text)
    with pytest.raises(DataError, match="must be cut back"):
        load_run(run_folder)
    path.write_text(text)
    about = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({**about, "targets": {"latin": 1.0}}))
    with pytest.raises(DataError, match="target 'latin' is not an evaluated domain"):
        load_run(run_folder)
    (run_folder / "run.json").write_text(json.dumps({**about, "sources": ["code"]}))
    with pytest.raises(DataError, match="from different runs"):
        load_run(run_folder)


def test_unknown_kinds_are_counted_not_dropped_in_silence(run_folder: Path) -> None:
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "note", "step": 1}\n' * 2)
    assert load_run(run_folder).notes == (
        "metrics.jsonl: 2 records of unknown kind 'note' left out",
    )


def test_runs_are_found_in_a_folder_of_runs(nine: list[Path], tmp_path: Path) -> None:
    assert find_runs(nine[0]) == [nine[0]]
    assert find_runs(nine[0].parent) == sorted(nine)
    with pytest.raises(DataError, match="no run in"):
        find_runs(tmp_path)


def test_tokens_between_and_after_logged_steps_are_in_proportion(run_folder: Path) -> None:
    run = load_run(run_folder)
    assert [p.step for p in run.train[:2]] == [2, 4]
    np.testing.assert_allclose(
        tokens_at(run, [0, 1, 2, 3, 20, 25]), TOKENS_A_STEP * np.array([0, 1, 2, 3, 20, 25])
    )


def test_throughput_is_tokens_over_seconds_of_the_same_steps(run_folder: Path) -> None:
    spent = [r["seconds"] for r in raw(run_folder, "timing.jsonl") if r["phase"] == "train"]
    x, y = throughput(load_run(run_folder))
    np.testing.assert_allclose(x, TOKENS_A_STEP * np.arange(2, 21))
    np.testing.assert_allclose(y, TOKENS_A_STEP / np.array(spent[1:]))


def test_what_a_run_may_leave_open_is_none(run_folder: Path) -> None:
    """A run that was not started from a command line; a batch without a checksum."""
    path = run_folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "command": None}))
    run = load_run(run_folder)
    assert run.command is None and run.train[0].batch is None
