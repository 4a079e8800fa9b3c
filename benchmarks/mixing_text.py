"""Does steering pay on real text? The demo's sources, several targets, every policy in turn.

``python -m benchmarks.mixing_text`` trains a small model once for each policy, target and seed,
all on equally many tokens, and prints the tables of docs/benchmarks.md; its plot lies beside it.
Interrupted, it goes on where it was. About 40 CPU-seconds a run.

Every loss is on the ``eval`` split, which neither training nor measuring influence sees. Policies
that know no target are trained once a seed and judged on every target.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from dh_jax.compose import compose_run
from dh_jax.demo.study import build_data
from dh_jax.report.runs import Run, load_run
from dh_jax.report.statistics import Spread, interval, spread, target_loss
from dh_jax.train import train

FOLDER = Path(".bench") / "mixing-text"
FIGURE = Path("docs") / "mixing_text.svg"
STEPS = 240  # of 1,024 tokens
LONGER = 1.2  # static runs of so many times the steps: what the cost of steering would also buy
TARGETS: dict[str, dict[str, float]] = {
    "maths and docs": {"maths": 0.5, "docs": 0.5},
    "cpp": {"cpp": 1.0},
    "prose": {"prose": 1.0},
}
SIZES = (  # a third of a million parameters
    "model.width=64", "model.layers=2", "model.heads=2", "model.kv_heads=1", "model.mlp_width=192",
    "training.batch_size=4", "training.warmup=10", "training.learning_rate=6e-3",
    "training.eval_rows=32", "training.checkpoint_interval=1000", "training.keep=1",
)  # fmt: skip
OFTEN = ("mixing.interval=20", "mixing.learning_rate=0.8")  # twelve moves
BLIND = {  # policies that know no target
    "static": ("mixing=static",),
    "uniform": ("mixing=uniform",),
    "proportional": ("mixing=proportional",),
    "static, 20 % longer": ("mixing=static", f"training.steps={round(STEPS * LONGER)}"),
}
AIMED = {
    "influence": ("mixing=influence", *OFTEN),
    "gradient dot": ("mixing=alignment", *OFTEN),
}
BASELINES = tuple(BLIND)


class Job(NamedTuple):
    """One training run."""

    name: str
    target: str | None  # None: of a policy that knows none
    seed: int
    overrides: tuple[str, ...]

    @property
    def out(self) -> Path:
        words = f"{self.name} {self.target or ''} {self.seed}".replace(",", "").replace(" %", "")
        return FOLDER / "runs" / "-".join(words.split())


def jobs(seeds: int) -> Iterator[Job]:
    """By seed, so that an interrupted bench has whole comparisons."""
    for seed in range(seeds):
        for name, overrides in BLIND.items():
            yield Job(name, None, seed, overrides)
        for target, probes in TARGETS.items():
            weights = ", ".join(f"{probe}: {weight}" for probe, weight in probes.items())
            for name, overrides in AIMED.items():
                yield Job(name, target, seed, (*overrides, f"influence.targets={{{weights}}}"))


def finished(out: Path) -> bool:
    facts = out / "run.json"
    return facts.exists() and json.loads(facts.read_text())["status"] == "finished"


def run(job: Job) -> None:
    """Train, unless it has been."""
    if finished(job.out):
        return
    steps = [x for x in job.overrides if x.startswith("training.steps=")] or [
        f"training.steps={STEPS}"
    ]
    config = compose_run(
        ["data=demo", "model=tiny", *SIZES, "influence=demo", *job.overrides, *steps,
         steps[0].replace("steps", "eval_interval"), f"training.seed={job.seed}",
         f"out={job.out}", "resume=true"]
    )  # fmt: skip
    begun, used = time.perf_counter(), time.process_time()
    if train(config, command=f"python -m benchmarks.mixing_text ({job.name})")["status"] != (
        "finished"
    ):
        sys.exit("interrupted; the same command goes on")
    print(
        f"# {job.out.name}: {time.process_time() - used:.0f} CPU-s, "
        f"{time.perf_counter() - begun:.0f} s",
        flush=True,
    )


# --- what came of it -----------------------------------------------------------------------------


def losses(found: Mapping[Job, Run], name: str, target: str) -> list[float]:
    """Final held-out loss on the target, by seed."""
    return [
        target_loss(run.evals[-1], TARGETS[target])
        for job, run in found.items()
        if job.name == name and job.target in (None, target)
    ]


def cost(found: Mapping[Job, Run], name: str) -> float:
    """Seconds of all moves by those of all steps; medians, since other work disturbs both."""
    shares = []
    for job, run in found.items():
        if job.name == name:
            seconds = {
                phase: [t.seconds for t in run.timings if t.phase == phase]
                for phase in ("train", "reweight")
            }
            if moves := seconds["reweight"]:
                steps = statistics.median(seconds["train"]) * run.train[-1].step
                shares.append(statistics.median(moves) * (len(moves) + 1) / steps)
    return statistics.fmean(shares) if shares else 0.0


def table(found: Mapping[Job, Run], names: list[str]) -> str:
    """Markdown: final losses by target, mean and standard error over seeds, and the cost."""
    lines = [
        f"| | {' | '.join(TARGETS)} | mean of all six | cost |",
        f"| --- |{' ---: |' * (len(TARGETS) + 2)}",
    ]
    for name in names:
        cells = [said(spread(losses(found, name, target))) for target in TARGETS]
        every = spread(
            statistics.fmean(d.loss for d in run.evals[-1].domains.values())
            for job, run in found.items()
            if job.name == name
        )
        cells += [f"{every.mean:.3f}", f"{cost(found, name):.1%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def said(s: Spread) -> str:
    return f"{s.mean:.3f} ± {s.standard_error or 0:.3f}"


def difference(found: Mapping[Job, Run], name: str, base: str, target: str) -> Spread:
    """Paired by seed; negative: ``name`` is better."""
    pairs = zip(losses(found, name, target), losses(found, base, target), strict=True)
    return spread(a - b for a, b in pairs)


def comparisons(found: Mapping[Job, Run]) -> str:
    """Markdown: paired differences with their 95 % intervals."""
    lines = [f"| | {' | '.join(TARGETS)} |", f"| --- |{' ---: |' * len(TARGETS)}"]
    pairs = [(name, base) for name in AIMED for base in BASELINES]
    for name, base in [*pairs, ("influence", "gradient dot")]:
        cells = []
        for target in TARGETS:
            s = difference(found, name, base, target)
            low, high = interval(s) or (float("nan"),) * 2
            mark = "**" if low > 0 or high < 0 else ""
            cells.append(f"{mark}{s.mean:+.3f}{mark} ({low:+.3f} to {high:+.3f})")
        lines.append(f"| {name} minus {base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Mapping[Job, Run], path: Path) -> None:
    """Differences from static by target: a mark for the mean, a bar for its 95 % interval."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "mixing", "svg.fonttype": "none", "font.size": 9})
    names = [*AIMED, *(name for name in BASELINES if name != "static")]
    figure, axes = pyplot.subplots(
        1, len(TARGETS), figsize=(7.2, 0.3 * len(names) + 1.1), sharey=True, layout="constrained"
    )
    for ax, target in zip(axes, TARGETS, strict=True):
        for y, name in enumerate(reversed(names)):
            s = difference(found, name, "static", target)
            low, high = interval(s) or (s.mean, s.mean)
            colour = "#1f5fa8" if name in AIMED else "0.45"
            ax.plot([low, high], [y, y], color=colour, lw=1.6)
            ax.plot(s.mean, y, "D", color=colour, ms=4.5)
            ax.plot(s.values, [y + 0.25] * len(s.values), "o", mfc="none", mec=colour, ms=3)
        ax.axvline(0, color="0.3", lw=0.8)
        ax.set_title(target, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), list(reversed(names)))
    figure.supxlabel("held-out loss minus static's, nats a target; left of 0 is better", fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((FOLDER / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    build_data(Path(os.environ.get("DH_DEMO", ".demo")))
    planned = list(jobs(options.seeds))
    for job in planned:
        run(job)
    found = {job: load_run(job.out) for job in planned}
    print(table(found, [*AIMED, *BASELINES]), "\n", comparisons(found), sep="\n")
    plot(found, options.figure)
    print(f"# {options.figure} is written")


if __name__ == "__main__":
    main()
