"""The whole of `dh mix`, with real proxies in real processes; `make slow`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dh_jax.config import load_data_config, weights_of
from tests.dh_jax.distributed.running import write_data

SMALL = (
    "model.width=16", "model.layers=1", "model.heads=2", "model.kv_heads=1", "model.mlp_width=16",
    "training.steps=6", "training.batch_size=4", "training.eval_rows=2", "training.warmup=1",
    "influence.targets={sums: 1}",
)  # fmt: skip

pytestmark = pytest.mark.slow


def start(command: str, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dh_jax.cli", command, *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def said(process: subprocess.Popen[str], code: int = 0) -> str:
    text = process.communicate(timeout=600)[0]
    assert process.returncode == code, text
    return text


def test_a_killed_search_goes_on_and_dh_train_takes_what_it_finds(
    make_config: Any, store: Path, tmp_path: Path
) -> None:
    data = write_data(make_config(store=str(store)), tmp_path)
    out = tmp_path / "search"
    words = (f"data={data}", *SMALL, "search.proxies=4", "search.processes=2", f"out={out}")
    first = start("mix", *words)
    while not (early := sorted(out.glob("results/*.json"))) and first.poll() is None:
        time.sleep(0.05)
    workers = descendants(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert early and len(workers) > 2  # the fork server, its tracker, two proxies
    for _ in range(200):  # they leave by themselves when their parent is gone
        if not any(map(alive, workers)):
            break
        time.sleep(0.1)
    assert not [pid for pid in workers if alive(pid)]
    kept = {path: path.stat().st_mtime_ns for path in out.glob("results/*.json")}
    assert len(kept) < 6

    text = said(start("mix", *words, "resume=true"))
    assert "leave-one-out error" in text
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(out.glob("results/*.json"))) == 6
    found = json.loads((out / "finding.json").read_text())
    written = load_data_config(out / "data.yaml")
    assert weights_of(written.sources) == pytest.approx(found["weights"], abs=1e-5)
    assert "Predicted and measured" in (out / "report.html").read_text()
    said(start("train", f"data={out / 'data.yaml'}", *SMALL, f"out={tmp_path / 'run'}"))
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert record["weights"] == pytest.approx(found["weights"], abs=1e-5)


def test_doremi_trains_a_reference_and_a_proxy(
    make_config: Any, store: Path, tmp_path: Path
) -> None:
    data = write_data(make_config(store=str(store)), tmp_path)
    out = tmp_path / "search"
    said(start("mix", f"data={data}", *SMALL, "search=doremi", "search.processes=1", f"out={out}"))
    proxy = json.loads((out / "results" / "proxy-1.json").read_text())
    assert len(proxy["moves"]) == 6
    found = json.loads((out / "finding.json").read_text())["weights"]
    for name, weight in found.items():
        assert weight == pytest.approx(sum(m[name] for m in proxy["moves"]) / 6, abs=1e-6)


def test_a_failing_proxy_is_one_line_that_names_it(
    make_config: Any, store: Path, tmp_path: Path
) -> None:
    data = write_data(make_config(store=str(store)), tmp_path)
    text = said(
        start(
            "mix", f"data={data}", *SMALL, "search.proxies=3", "search.processes=1",
            "training.learning_rate=1e20", f"out={tmp_path / 'search'}",
        ),
        code=2,
    )  # fmt: skip
    assert "dh mix: proxy 00" in text and "the loss is" in text and "Traceback" not in text


def descendants(pid: int) -> list[int]:
    """Processes below one, by what Linux says of each."""
    above = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            above[int(entry.name)] = int(fields[1])
    found = [pid]
    for known in found:
        found += [child for child, parent in above.items() if parent == known]
    return found[1:]


def alive(pid: int) -> bool:
    """Whether a process still works; a zombie waits only to be counted."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
