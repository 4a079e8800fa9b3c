"""What commands say while they work: lines in a log, a bar in a terminal."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
from rich.console import Console

from dh_jax import progress
from dh_jax.progress import InfluenceProgress, SearchProgress, TrainProgress, waiting


def trained(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "tokens": 100 * step}


def test_a_log_gets_lines_and_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    with TrainProgress(20, Console(file=log, width=100)) as told:
        told(trained(1, 5.5))
        told({"kind": "eval", "step": 10, "domains": {"code": {"bits_per_byte": 1.25}}})
        told(trained(20, 4.25))
    first, early, judged, last = log.getvalue().splitlines()
    assert (first, early) == ("opening data and model", "loss 5.500 nats  1 of 20")
    assert judged == "step     10  bits/byte  code 1.250"
    assert last.startswith("loss 4.250 nats  ") and last.endswith(" tok/s  20 of 20")


def test_a_phase_that_compiles_is_named_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(progress, "SILENCE", 0.1)
    with TrainProgress(20, Console(file=log, width=100)) as told:
        told(trained(1, 5.5))
        told({"kind": "compile", "step": 10, "phase": "reweight"})
        time.sleep(0.25)
        told({"kind": "reweight", "step": 10, "weights": {"code": 1.0}})
        time.sleep(0.25)
    lines = log.getvalue().splitlines()
    moved = lines.index("step     10  weights    code 1.000")
    assert "measuring for a move: compiling" in lines[:moved]
    assert not any("compiling" in line for line in lines[moved:])


def test_a_move_that_was_compiled_says_so_in_place_of_a_share() -> None:
    log = io.StringIO()
    with TrainProgress(20, Console(file=log, width=100)) as told:
        told({"kind": "pace", "step": 5, "spent": 0.0, "due": 10})
        told({"kind": "pace", "step": 10, "spent": 0.5, "due": 30})
    first, second = log.getvalue().splitlines()[1:]
    assert "this move was compiled" in first and "the next is due at step 10" in first
    assert "taken 5.0% of the steps' time" in second and "behind the last" in second


def test_lines_of_one_step_keep_their_distance() -> None:
    log = io.StringIO()
    with InfluenceProgress(Console(file=log, width=100)) as told:
        told("fitting", 0, None)
        for done in range(0, 100, 10):
            told("scoring", done, 100)
    *steps, last = log.getvalue().splitlines()
    assert steps == ["reading", "fitting", "scoring"]
    assert last == "scoring  90 of 100"  # all within a second: no pace to tell


def test_a_log_is_not_silent_while_nothing_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(progress, "SILENCE", 0.1)
    with waiting(Console(file=log, width=100), "compiling"):
        time.sleep(1.0)  # lines after .1, .3 and .7 seconds
    first, *later = log.getvalue().splitlines()
    assert first == "compiling"
    assert 1 <= len(later) <= 3 and all(line.startswith("compiling  (") for line in later)
    said = len(log.getvalue())
    time.sleep(0.5)
    assert len(log.getvalue()) == said  # it ends with what it waits for


def test_what_was_held_back_is_said_once_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(progress, "SILENCE", 0.1)
    with SearchProgress(Console(file=log, width=100)) as told:
        told(3, 10)
        time.sleep(0.5)
        assert log.getvalue().splitlines()[:2] == ["small runs", "small runs  3 of 10"]


def test_a_log_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    log, clock = io.StringIO(), iter(range(1000, 100_000, 600))
    with SearchProgress(Console(file=log, width=100)) as told:
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
        for done in range(3):
            told(done, 10)
        monkeypatch.undo()
    *_, last = log.getvalue().splitlines()
    left = re.fullmatch(r"small runs  2 of 10, (\d+) h (\d\d) min left", last)
    assert left and 80 < 60 * int(left[1]) + int(left[2]) < 400


def test_a_terminal_gets_a_bar() -> None:
    screen = io.StringIO()
    with TrainProgress(20, Console(file=screen, width=100, force_terminal=True)) as told:
        told(trained(20, 4.25))
    assert "━" in screen.getvalue() and "20/20" in screen.getvalue()
