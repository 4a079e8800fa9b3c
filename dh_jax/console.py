"""How runs, stores and prices look in a terminal; previews are in `inspection.terminal`."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

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

from dh_jax.data import prepare
from dh_jax.data.store import TokenStore
from dh_jax.pricing import Price


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
    """Documents and tokens a second while a store is written."""

    def __init__(self, console: Console):
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
        )
        self._tasks: dict[str, tuple[Any, float]] = {}

    def __call__(self, progress: prepare.Progress) -> None:
        name = progress.source
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=None), time.perf_counter()
        task, start = self._tasks[name]
        rate = progress.tokens / max(time.perf_counter() - start, 1e-9)
        self._bar.update(
            task,
            description=f"{name}: {progress.documents:,} documents, {progress.tokens:,} tokens, "
            f"{rate:,.0f} tok/s",
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def print_store(store: TokenStore, console: Console) -> None:
    """Documents and tokens by source and split, and what was left out."""
    table = Table(title=f"store {store.folder}")
    table.add_column("source")
    for split in ("train", "probe", "eval"):
        table.add_column(f"{split} documents", justify="right")
        table.add_column("tokens", justify="right")
    table.add_column("left out")
    for name in store.manifest["sources"]:
        counts = [
            f"{store.total(name, split, what):,}"
            for split in ("train", "probe", "eval")
            for what in ("documents", "tokens")
        ]
        table.add_row(name, *counts, _reasons(store.manifest["skipped"].get(name, {})))
    console.print(table)


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
    console.print(
        f"parameters {price.parameters:,}   tokens {price.tokens:,}   "
        f"memory of a step {price.step_bytes / 2**20:,.0f} MiB a device   "
        f"{price.flops_per_step / 1e9:,.1f} GFLOP a step   about {minutes:,.1f} minutes of training"
    )


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items() if count) or "-"
