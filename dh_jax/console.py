"""How runs, stores and prices look in a terminal; previews are in `inspection.terminal`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import safe_open

from dh_jax.attribution.price import Price as InfluencePrice
from dh_jax.config import SPLITS
from dh_jax.data.store import TokenStore
from dh_jax.pricing import Price
from dh_jax.search.find import Finding, warning_of

if TYPE_CHECKING:
    from dh_jax.completion import Written


def print_influence_price(price: InfluencePrice, console: Console) -> None:
    """A dry run's estimate of `dh influence`."""
    table = Table("step", title="what the run takes")
    table.add_column("minutes, from", justify="right")
    table.add_column("to", justify="right")
    slowest, compiling = price.slowest, price.compile_seconds
    for name, least, most in (
        ("compiling", compiling, compiling),
        ("fitting", price.fit_seconds, slowest * price.fit_seconds),
        ("queries", price.query_seconds, slowest * price.query_seconds),
        ("scoring", price.score_seconds, slowest * price.score_seconds),
        ("all", compiling + price.seconds, compiling + slowest * price.seconds),
    ):
        table.add_row(name, f"{least / 60:,.1f}", f"{most / 60:,.1f}")
    console.print(table)
    console.print("at the pace that this machine has now; beside it libraries and data are loaded")
    console.print(f"parameters {price.parameters:,}, {price.coverage:.0%} of them measured")
    asked = "1 query takes" if price.queries == 1 else f"{price.queries} queries take"
    console.print(
        f"memory about {price.bytes / 2**30:.1f} GiB at the peak; "
        f"{asked} {price.query_bytes / 2**30:.2f} GiB"
    )


def print_folder(folder: Path, console: Console) -> None:
    """What was written: a model's folder."""
    files = sorted(folder.glob("*.safetensors"))
    count = 0
    for path in files:
        with safe_open(path, framework="numpy") as tensors:
            names = tensors.keys()
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    size = sum(path.stat().st_size for path in files)
    console.print(
        f"{folder}: {count:,} parameters, {size / 1e6:,.0f} MB", highlight=False, soft_wrap=True
    )


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
    if (warning := warning_of(finding)) is not None:
        console.print(f"warning: {warning}")


def print_examination(found: dict[str, Any], console: Console) -> None:
    """What `dh doctor` found: what is here, what is missing and the command, and problems last."""
    table = Table.grid(padding=(0, 2))
    versions = "  ".join(f"{n} {v}" for n, v in found["versions"].items() if v is not None)
    memory = found["memory"]
    rows = {
        "versions": f"python {found['python']}  {versions}",
        "devices": ", ".join(found["devices"]) or "none",
        "memory": f"{memory['available']} of {memory['total']} GiB available, "
        f"{found['cores']} cores, {found['disk_free']} GiB of disk free here",
        "hub": f"{found['hub']['address']} {found['hub']['answer']}",
        **found["addresses"],
    }
    for name, said in rows.items():
        table.add_row(name, Text(said))
    console.print(table)
    if found["extras"]:
        console.print("\nwhat is not installed, each for those who need it:")
        for extra in found["extras"].values():  # whole lines, to be copied
            said = f"  {', '.join(extra['missing'])}: {extra['install']}"
            console.print(Text(said), soft_wrap=True)
    console.print("")
    for hint in found["hints"]:
        console.print(Text(f"hint: {hint}"), soft_wrap=True)
    for problem in found["problems"]:
        console.print(Text(f"problem: {problem}"), soft_wrap=True)
    if not found["problems"]:
        unheard = found["hub"]["answer"].startswith("not reached")
        but = "; configs that stream from the hub cannot be read from here" if unheard else ""
        console.print(f"no problem found{but}")


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
    table = Table("source", title="what the run takes at its first weights")
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
        f"{price.flops_per_step / 1e9:,.1f} GFLOP a step   about {minutes:,.1f} minutes of "
        "training steps; compiling, evaluations and moves come on top"
    )


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items() if count) or "-"
