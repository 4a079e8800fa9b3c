"""The log is cut back to a checkpoint's step, and a half-written line is dropped."""

from __future__ import annotations

import json
from pathlib import Path

from dh_jax.runlog import RunLog
from dh_jax.trackers import scalars


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_records_behind_the_step_and_torn_lines_go(tmp_path: Path) -> None:
    log = RunLog(tmp_path, step=None)
    for step in range(5):
        log.write({"kind": "train", "step": step})
        with log.timed("train", step):
            pass
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    RunLog(tmp_path, step=2).close()
    assert steps(tmp_path / "metrics.jsonl") == steps(tmp_path / "timing.jsonl") == [0, 1, 2]
    RunLog(tmp_path, step=None).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_listeners_hear_every_record_and_trackers_every_number(tmp_path: Path) -> None:
    heard: list[dict[str, object]] = []
    log = RunLog(tmp_path, step=None, listeners=(heard.append,))
    record = {"kind": "eval", "step": 3, "domains": {"code": {"loss": 2.5, "targets": 7}}}
    log.write(record)
    log.close()
    assert heard == [record]
    assert scalars(record) == {"eval/domains/code/loss": 2.5, "eval/domains/code/targets": 7.0}
