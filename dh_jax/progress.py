"""Progress of the commands: what is done, how fast, and the time left.

A bar in a terminal or notebook; in a log or a pipe a line every few seconds, also where nothing
is new: then rarer and rarer, with the time that it has taken.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Self

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

if TYPE_CHECKING:
    from dh_jax.data import prepare

PAUSE = 10.0  # seconds at least between two lines of the same step
SILENCE = 10.0  # after which a log gets a line though nothing is new
LONGEST = 40.0  # between two such lines: they become rarer
SOON = 10.0  # seconds left that are not worth a word
COMPILED = {"train": "training", "eval": "judging", "reweight": "measuring for a move",
            "distillation": "comparing with the teacher"}  # fmt: skip


class Bar:
    """A bar of one task that is there between enter and exit.

    Args:
        console: where; one that is no terminal gets lines instead.
        step: what is done first.
        total: how many there are of it, if that is known.
    """

    def __init__(self, console: Console, step: str, total: int | None = None):
        self._console = console
        self._drawn = _draws(console)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=3600.0,  # a time left also where a step takes minutes
            disable=not self._drawn,
        )
        self._task = self._bar.add_task(step, total=total)
        self._step, self._total = step, total
        self._said, self._last = step, 0.0  # the last line, and when it was written
        self._held: str | None = None  # what has been said since
        self._since: tuple[float, int] | None = None  # when the step was first shown, how far
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._bar.start()
        self._line(self._step)
        if not self._drawn:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._bar.stop()
        if self._held is not None:
            self._line(self._held)

    def begin(self, step: str, total: int | None = None) -> None:
        """Another step, with a clock of its own: one's pace says nothing of the next one's."""
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(step, total=total)
        if step != self._step:
            self._line(step)
        self._step, self._total, self._since = step, total, None

    def show(self, said: str, done: int | None = None) -> None:
        self._bar.update(self._task, description=said, completed=done)
        of = "" if self._total is None else f" of {self._total:,}"
        self._held = said if done is None else f"{said}  {done:,}{of}{self._left(done)}"
        if time.monotonic() - self._last >= PAUSE:
            self._line(self._held)

    def _left(self, done: int) -> str:
        """The time left at the step's pace, where that is long."""
        now = time.monotonic()
        if self._since is None or done < self._since[1]:
            self._since = now, done
        begun, before = self._since
        if self._total is None or done <= before:
            return ""
        left = (now - begun) / (done - before) * (self._total - done)
        return "" if left < SOON else f", {duration(left)} left"

    def note(self, said: str) -> None:
        """A line that stays, above the bar; in a log behind what was held back."""
        if self._held is not None and not self._drawn:
            self._line(self._held)
        self._console.print(said, highlight=False, soft_wrap=True)

    def _line(self, said: str) -> None:
        if not self._drawn:
            self._said, self._last, self._held = said, time.monotonic(), None
            self.note(said)

    def _beat(self) -> None:
        """Break the silence of whatever takes long between two calls."""
        pause = SILENCE
        while not self._over.wait(pause):
            if self._held is not None:
                self._line(self._held)
            silent = time.monotonic() - self._last
            if silent >= pause:
                self.note(f"{self._said}  (for {silent:.0f} s)")
            pause = min(2 * pause, LONGEST) if silent >= pause else SILENCE


def duration(seconds: float) -> str:
    """A span of time in words: seconds, minutes, or hours and minutes."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def waiting(console: Console, said: str) -> AbstractContextManager[object]:
    """Say what is waited for: beside a spinner, or as lines of a log."""
    return console.status(said) if _draws(console) else Bar(console, said)


def _draws(console: Console) -> bool:
    return (console.is_terminal or console.is_jupyter) and not console.quiet


class TrainProgress(Bar):
    """A listener of metrics records: loss, tokens/s, weights."""

    def __init__(self, steps: int, console: Console, step: str = "opening data and model"):
        super().__init__(console, step, steps)
        self._before: tuple[float, int] | None = None
        self._rate = 0.0
        self._compiling = False

    def __call__(self, record: dict[str, Any]) -> None:
        kind, step = record["kind"], record["step"]
        if self._compiling:  # it is over: the next silence is the training's
            self._bar.update(self._task, description="training")
            self._held, self._said, self._compiling = None, "training", False
        if kind == "train":
            now = time.perf_counter(), record["tokens"]
            if self._before and now[0] > self._before[0]:
                rate = (now[1] - self._before[1]) / (now[0] - self._before[0])
                self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
            self._before = now
            pace = f"  {self._rate:,.0f} tok/s" if self._rate else ""
            self.show(f"loss {record['loss']:.3f} nats{pace}", step)
        elif kind == "eval":
            losses = {name: x["bits_per_byte"] for name, x in record["domains"].items()}
            self._note(step, "bits/byte", losses)
        elif kind == "distillation":
            self.note(
                f"step {step:>6}  teacher    {record['divergence']:.3f} nats a token away; the "
                f"same most probable id at {record['agreement']:.1%} of them"
            )
        elif kind == "reweight":
            self._note(step, "weights", record["weights"])
        elif kind == "pace":
            late = self._total is not None and record["due"] > self._total
            taken = "this move was compiled, so what moves take is not known yet"
            if record["spent"]:
                taken = (
                    f"moves have taken {record['spent'] / step:.1%} of the steps' time, without "
                    "what they compiled"
                )
            self.note(
                f"step {step:>6}  budget     {taken}; the next is due at step "
                f"{record['due']}{', behind the last' if late else ''}"
            )
        elif kind == "compile":
            if self._held is not None and not self._compiling:
                self._line(self._held)  # of the phase before
            self._compiling = True
            self.show(f"{COMPILED[record['phase']]}: compiling")

    def _note(self, step: int, what: str, values: dict[str, float]) -> None:
        said = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        self.note(f"step {step:>6}  {what:<9}  {said}")


class PrepareProgress(Bar):
    """Pieces, documents and tokens a second, what was dropped, and the time left, while a store
    is written."""

    STEPS: ClassVar = {"map": "reading", "decide": "comparing", "write": "writing"}

    def __init__(self, console: Console):
        super().__init__(console, "reading")
        self._start = time.perf_counter()

    def __call__(self, progress: prepare.Progress) -> None:
        step = self.STEPS[progress.step]
        if (step, progress.total) != (self._step, self._total):
            self.begin(step, progress.total)
        pace = ""
        if progress.step == "map" and progress.documents:
            seconds = max(time.perf_counter() - self._start, 1e-9)
            pace = (
                f" ({progress.documents / seconds:,.0f}/s), {progress.tokens:,} tokens "
                f"({progress.tokens / seconds:,.0f}/s)"
            )
        self.show(
            f"{step}: {progress.documents:,} documents{pace}, {progress.dropped:,} dropped",
            progress.done,
        )


class InfluenceProgress(Bar):
    """Documents scored, their rate and the time left; a spinner while something is fitted."""

    def __init__(self, console: Console):
        super().__init__(console, "reading")
        self._first: tuple[float, int] | None = None

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what != self._step:
            self.begin(what, total)
            self._first = None
        now = time.perf_counter()
        if self._first is None and done:  # clocks start behind the first, which was compiled for
            self._first, self._since = (now, done), None
        begun, before = self._first or (now, done)
        seconds, documents = now - begun, done - before
        pace = ": compiling, then the first rows" if total and not done else ""
        if documents and seconds > 1:
            pace = f"  {documents / seconds:.2f} pieces/s"
        self.show(f"{what}{pace}", done if total or done else None)


class CacheProgress(Bar):
    """Tokens that a teacher has been asked about, and their rate; a line for each source done."""

    def __init__(self, console: Console, total: int | None = None):
        super().__init__(console, "the teacher is read", total)
        self._source, self._entries = "", 0
        self._others = 0  # tokens of the sources that are done
        self._start = time.perf_counter()
        self._before = 0  # of this source, when the clock was started

    def __call__(self, source: str, entries: int) -> None:
        if source != self._source:
            self._tell()
            self._others += self._entries
            self._start, self._before = time.perf_counter(), entries
        self._source, self._entries = source, entries
        pace = (entries - self._before) / max(time.perf_counter() - self._start, 1e-9)
        rate = f" ({pace:,.0f}/s)" if entries > self._before else ""
        self.show(f"{source}: {entries:,} tokens{rate}, in all", self._others + entries)

    def _tell(self) -> None:
        if self._source:
            self.note(f"{self._source}: {self._entries:,} tokens")

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # in a log its last line says the same
        if self._drawn:
            self._tell()


class SearchProgress(Bar):
    """A progress bar of a search: proxies that are done, and runs that confirm what they found.

    ``plan`` says what they are, once the search has begun.
    """

    def __init__(self, console: Console, plan: str | None = None):
        super().__init__(console, "small runs")
        self._plan = plan

    def __call__(self, done: int, total: int) -> None:
        if total != self._total:
            if self._plan is not None:
                self.note(self._plan)
            self.begin("small runs", total)
        self.show("small runs", done)
