"""The log of a run: what happened (`metrics.jsonl`), how long it took (`timing.jsonl`).

Metrics hold nothing that differs between two runs of the same config on the same machine, so
a resumed run can be compared with an uninterrupted one byte by byte; wall-clock times have a
file of their own. The one exception is what a budget decides by the clock (``pace`` records);
a resumption takes those from the log (`later`) instead of deciding anew. Records are JSON
objects, one a line, each with its ``step``.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Listener = Callable[[Record], None]
RECENT = 200  # timings of each phase that are kept at hand


class RunLog:
    """Appends records to a run folder and hands them to listeners.

    Args:
        folder: the run's folder; None writes nothing (a process beside the first).
        step: records behind this step are cut off first (resume); None starts afresh.
        listeners: called with every metrics record.
    """

    def __init__(
        self, folder: Path | None, *, step: int | None, listeners: tuple[Listener, ...] = ()
    ):
        self._listeners = listeners
        paths = [Path(os.devnull)] * 2
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            paths = [folder / "metrics.jsonl", folder / "timing.jsonl"]
            for path in paths:
                cut_back(path, -1 if step is None else step)
        self._metrics, self._timing = (path.open("a", buffering=1) for path in paths)
        self.recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    def write(self, record: Record) -> None:
        self._metrics.write(json.dumps(record) + "\n")
        self.tell(record)

    def tell(self, record: Record) -> None:
        """Hand a record to the listeners alone."""
        for listener in self._listeners:
            listener(record)

    @contextmanager
    def timed(self, phase: str, step: int) -> Iterator[None]:
        """Record the wall-clock seconds of a phase: compile, train, eval, reweight, ..."""
        start = time.perf_counter()
        yield
        seconds = round(time.perf_counter() - start, 6)
        self.recent[phase].append(seconds)
        self._timing.write(json.dumps({"step": step, "phase": phase, "seconds": seconds}) + "\n")

    def close(self) -> None:
        self._metrics.close()
        self._timing.close()


def later(folder: Path, step: int, kind: str) -> list[Record]:
    """Whole records of one kind behind ``step``: what `RunLog` is about to cut off."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [x for x in records if x["kind"] == kind and x["step"] > step]


def cut_back(path: Path, step: int) -> None:
    """Drop every record behind ``step``, and a last line that a kill left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
