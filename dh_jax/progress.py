"""Progress bars of the commands: what is done, how fast, and the time left."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dh_jax.data import prepare


class Bar:
    """A bar that is there between enter and exit."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class TrainProgress(Bar):
    """A progress bar that is a listener of metrics records: loss, tokens/s, weights."""

    def __init__(self, steps: int, console: Console):
        super().__init__(console)
        self._task = self._bar.add_task("compiling", total=steps)
        self._last: tuple[float, int] | None = None
        self._rate = 0.0

    def __call__(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            now = time.perf_counter(), record["tokens"]
            if self._last and now[0] > self._last[0]:
                rate = (now[1] - self._last[1]) / (now[0] - self._last[0])
                self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
            self._last = now
            self._bar.update(
                self._task,
                completed=record["step"],
                description=f"loss {record['loss']:.3f}  {self._rate:,.0f} tok/s",
            )
        elif record["kind"] == "eval":
            losses = "  ".join(
                f"{name} {figures['bits_per_byte']:.3f}"
                for name, figures in record["domains"].items()
            )
            self._console.print(f"step {record['step']:>6}  bits/byte  {losses}", highlight=False)
        elif record["kind"] == "distillation":
            said = "  ".join(f"{k} {record[k]:.3f}" for k in ("divergence", "agreement"))
            self._console.print(f"step {record['step']:>6}  teacher    {said}", highlight=False)
        elif record["kind"] == "reweight":
            weights = "  ".join(f"{name} {w:.3f}" for name, w in record["weights"].items())
            self._console.print(f"step {record['step']:>6}  weights    {weights}", highlight=False)


class PrepareProgress(Bar):
    """Pieces, documents and tokens a second, what was dropped, and the time left, while a store
    is written."""

    STEPS: ClassVar = {"map": "reading", "decide": "comparing", "write": "writing"}

    def __init__(self, console: Console):
        super().__init__(console)
        self._task = self._bar.add_task("reading", total=None)
        self._step = "map"
        self._start = time.perf_counter()

    def __call__(self, progress: prepare.Progress) -> None:
        if progress.step != self._step:  # a step's pace says nothing about the next one's
            self._step = progress.step
            self._bar.reset(self._task)
        pace = ""
        if progress.step == "map":
            seconds = max(time.perf_counter() - self._start, 1e-9)
            pace = (
                f" ({progress.documents / seconds:,.0f}/s), {progress.tokens:,} tokens "
                f"({progress.tokens / seconds:,.0f}/s)"
            )
        self._bar.update(
            self._task,
            completed=progress.done,
            total=progress.total,
            description=f"{self.STEPS[progress.step]}: {progress.documents:,} documents{pace}, "
            f"{progress.dropped:,} dropped",
        )


class InfluenceProgress(Bar):
    """Documents scored, their rate and the time left; a spinner while something is fitted."""

    def __init__(self, console: Console):
        super().__init__(console)
        self._task = self._bar.add_task("reading", total=None)
        self._what = "reading"
        self._first: tuple[float, int] | None = None

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what != self._what:  # its own clock, so that the rate is that of this step
            self._bar.remove_task(self._task)
            self._task, self._what = self._bar.add_task(what, total=total), what
            self._first = None
        now = time.perf_counter()
        if self._first is None:
            self._first = now, done
        seconds, documents = now - self._first[0], done - self._first[1]
        pace = f"  {documents / seconds:.2f} documents/s" if documents and seconds > 1 else ""
        self._bar.update(self._task, completed=done, total=total, description=f"{what}{pace}")


class CacheProgress(Bar):
    """Tokens that a teacher has been asked about, and their rate; a line for each source done."""

    def __init__(self, console: Console):
        super().__init__(console)
        self._task = self._bar.add_task("the teacher is read", total=None)
        self._source, self._entries = "", 0
        self._start = time.perf_counter()
        self._before = 0  # of this source, when the clock was started

    def __call__(self, source: str, entries: int) -> None:
        if source != self._source:
            self._tell()
            self._start, self._before = time.perf_counter(), entries
        self._source, self._entries = source, entries
        pace = (entries - self._before) / max(time.perf_counter() - self._start, 1e-9)
        said = f"{source}: {entries:,} tokens ({pace:,.0f}/s)"
        self._bar.update(self._task, description=said)

    def _tell(self) -> None:
        if self._source:
            self._console.print(f"{self._source}: {self._entries:,} tokens", highlight=False)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._tell()


class SearchProgress(Bar):
    """A progress bar of a search: proxies that are done."""

    def __init__(self, console: Console):
        super().__init__(console)
        self._task = self._bar.add_task("proxies", total=None)

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
