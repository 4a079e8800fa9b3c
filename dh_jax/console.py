"""How runs, stores and prices look in a terminal; previews are in `inspection.terminal`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
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
from rich.table import Table

from dh_jax.attribution.price import Price as InfluencePrice
from dh_jax.config import SPLITS
from dh_jax.data import prepare
from dh_jax.data.store import TokenStore
from dh_jax.pricing import Price
from dh_jax.search.find import Finding

if TYPE_CHECKING:
    from dh_jax.completion import Written


class TrainProgress:
    """A progress bar that is a listener of metrics records: loss, tokens/s, weights."""

    def __init__(self, steps: int, console: Console):
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

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


class PrepareProgress:
    """Pieces, documents and tokens a second, what was dropped, and the time left, while a store
    is written."""

    STEPS: ClassVar = {"map": "reading", "decide": "comparing", "write": "writing"}

    def __init__(self, console: Console):
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
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

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class InfluenceProgress:
    """Documents scored, their rate and the time left; a spinner while something is fitted."""

    def __init__(self, console: Console):
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
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

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def print_influence_price(price: InfluencePrice, console: Console) -> None:
    """A dry run's estimate of `dh influence`."""
    table = Table("step", title="what the run takes")
    table.add_column("minutes", justify="right")
    for name, seconds in (
        ("fitting", price.fit_seconds),
        ("queries", price.query_seconds),
        ("scoring", price.score_seconds),
        ("all", price.seconds),
    ):
        table.add_row(name, f"{seconds / 60:,.1f}")
    console.print(table)
    console.print(f"parameters {price.parameters:,}, {price.coverage:.0%} of them looked at")
    console.print(
        f"memory about {price.bytes / 2**30:.1f} GiB at the peak; "
        f"{price.queries} queries take {price.query_bytes / 2**30:.2f} GiB"
    )


class SearchProgress:
    """A progress bar of a search: proxies that are done."""

    def __init__(self, console: Console):
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("proxies"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("proxies", total=None)

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def print_finding(finding: Finding, console: Console) -> None:
    """Configured weights and those found, and what a fit is worth."""
    table = Table("source", title=f"weights found by {finding.method}")
    for column in ("configured", "found"):
        table.add_column(column, justify="right")
    for name, weight in finding.weights.items():
        table.add_row(name, f"{finding.configured[name]:.3f}", f"{weight:.3f}")
    console.print(table)
    if (fit := finding.fit) is not None:
        console.print(
            f"leave-one-out error {fit.error:.3f} nats a token ({fit.spread:.3f} by their mean), "
            f"rank correlation {fit.rank_correlation:.2f}"
        )
    for name, loss in (finding.measured or {}).items():
        said = f", predicted {finding.predicted[name]:.3f}" if finding.predicted else ""
        console.print(f"loss with the weights {name}: {loss:.3f} nats a token{said}")


def print_store(store: TokenStore, console: Console) -> None:
    """Documents and tokens by source and split, and what was left out."""
    # Three tables' worth of numbers in one that fits 80 columns: two lines a source.
    table = Table("source", "", title=f"store {store.folder}")
    for split in SPLITS:
        table.add_column(split, justify="right")
    table.add_column("left out")
    for name, counts in store.totals().items():
        for what in ("documents", "tokens"):
            cells = [f"{counts[split][what]:,}" for split in SPLITS]
            first = what == "documents"
            left_out = _reasons(counts["left_out"]) if first else ""
            table.add_row(name if first else "", what, *cells, left_out, end_section=not first)
    console.print(table)
    account = store.manifest.get("decontamination")
    if account:
        console.print(
            f"{account['removed']:,} contaminated documents removed, listed in "
            f"{store.folder / account['report']}; {account['evaluation_texts']:,} evaluation "
            f"texts, {account['too_short']:,} of them too short to look for"
        )


def print_written(
    prompts: Sequence[str], written: Iterator[Written], *, chat: bool, console: Console
) -> None:
    """Texts behind their prompts: one as it is written, several when all are; then the pace.

    A terminal shows the prompts too, and the pace goes to standard error: what is piped on is the
    text alone.
    """
    errors, start = Console(stderr=True, highlight=False), time.perf_counter()
    with errors.status("compiling"):
        now = begun = next(written)
        now = begun = next(written, begun)  # behind the first token the loop is compiled too
    ready, end = time.perf_counter(), "\n\n" if chat else ""
    if len(prompts) == 1:
        if console.is_terminal:
            console.out(prompts[0], style="dim", highlight=False, end=end)
        console.out(now.texts[0], highlight=False, end="")
        for following in written:
            console.out(following.texts[0][len(now.texts[0]) :], highlight=False, end="")
            now = following
        console.print()
    else:
        now = [now, *written][-1]
        for number, (prompt, text) in enumerate(zip(prompts, now.texts, strict=True), start=1):
            console.rule(str(number), style="dim", align="left")
            if console.is_terminal:
                console.out(prompt, style="dim", highlight=False, end=end)
            console.out(text, highlight=False)
    later = sum(now.tokens) - sum(begun.tokens)
    pace = f", {later / (time.perf_counter() - ready):,.1f} tokens/s" if later else ""
    endings = ", ".join(sorted({_ending(now, row) for row in range(len(prompts))}))
    errors.print(
        f"{sum(now.tokens):,} tokens{pace} after {ready - start:.1f} s of compiling; {endings}",
        style="dim", markup=False, soft_wrap=True,
    )  # fmt: skip


def _ending(written: Written, row: int) -> str:
    stop = written.stops[row]
    return f"ended by {stop}" if stop is not None else f"cut at {written.room} tokens"


def print_price(price: Price, console: Console) -> None:
    """A dry run's estimate."""
    table = Table("source", title="what the run takes")
    for column in ("weight", "tokens", "available", "epochs"):
        table.add_column(column, justify="right")
    for name, source in price.sources.items():
        known = source.available is not None
        table.add_row(
            name,
            f"{source.weight:.3f}",
            f"{source.tokens:,}",
            f"{source.available:,}" if known else "streamed",
            f"{source.epochs:.2f}" if known and source.epochs is not None else "?",
        )
    console.print(table)
    minutes = price.seconds / 60
    frozen = f" beside {price.frozen:,} frozen" if price.frozen else ""
    console.print(
        f"parameters {price.parameters:,}{frozen}   tokens {price.tokens:,}   "
        f"memory of a step {price.step_bytes / 2**20:,.0f} MiB a device   "
        f"{price.flops_per_step / 1e9:,.1f} GFLOP a step   about {minutes:,.1f} minutes of training"
    )


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items() if count) or "-"
