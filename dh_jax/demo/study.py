"""The demo: real text from packages, nine small models, one report.

Three ways to mix the same sources (steered by influence, static as configured, uniform) train
the same model on equally many tokens with the same seeds. Every step is an ordinary command of
``dh`` that a user could type, is cached, and picks up where it was interrupted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dh_jax.config import load_data_config
from dh_jax.console import print_store
from dh_jax.data.prepare import prepare
from dh_jax.data.sources import document_id, split_of
from dh_jax.data.tokenization import train_bpe
from dh_jax.demo import corpora
from dh_jax.errors import UserError
from dh_jax.progress import PAUSE, PrepareProgress, duration
from dh_jax.report import write_report

VOCABULARY = 4096
TOKENIZER_BYTES = 8_000_000  # of training text that the tokenizer is trained on
POLICIES = ("influence", "static", "uniform")
FOLDER_VARIABLE = "DH_DEMO"  # what configs/data/demo.yaml reads the folder from


class Job(NamedTuple):
    """One training run of the study."""

    policy: str
    seed: int
    out: Path
    command: tuple[str, ...]


def run_demo(
    folder: Path, *, steps: int | None = None, seeds: int = 3, console: Console | None = None
) -> Path:
    """Build corpora, tokenizer and store, train every run, and write the report.

    Args:
        folder: everything lands here; a second call does only what is missing.
        steps: of each run; default: as ``configs/training/demo.yaml`` says.
        seeds: runs of each policy.
        console: where progress is shown.

    Returns:
        The path of the report.

    Raises:
        UserError: a package that the corpora come from is missing, or a run failed.
    """
    console = console or Console()
    start = time.perf_counter()
    build_data(folder, console)
    console.rule(f"4. {len(POLICIES) * seeds} runs")
    jobs = list(study_jobs(folder, steps=steps, seeds=seeds))
    run_jobs(jobs, console)
    console.rule("5. report")
    report = folder / "report.html"
    found = write_report([job.out for job in jobs], report, title="A mixture that steers itself")
    console.print(found.headline, highlight=False)
    console.print(f"{duration(time.perf_counter() - start)} without installing; open {report}")
    return report


def build_data(folder: Path, console: Console | None = None) -> None:
    """Corpora, tokenizer and token store of the data config ``demo``, as far as they are missing.

    From then on that config reads ``folder``.

    Raises:
        UserError: a package that the corpora come from is missing.
    """
    console = console or Console()
    os.environ[FOLDER_VARIABLE] = str(folder)
    console.rule("1. real text, from installed packages")
    corpora.build(folder / "corpora")
    console.rule("2. tokenizer")
    ensure_tokenizer(folder)
    console.rule("3. token store")
    with PrepareProgress(console) as progress:
        store = prepare("demo", progress=progress)
    print_store(store, console)


def ensure_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on training documents of every domain, once."""
    target = folder / "tokenizer"
    if (target / "tokenizer.json").exists():
        return
    train_bpe(_training_texts(folder / "corpora"), VOCABULARY, target)


def _training_texts(folder: Path) -> Iterator[str]:
    """Text of training documents, equally many bytes of each domain; nothing held out."""
    splits = load_data_config("demo").splits
    paths = sorted(folder.glob("*.jsonl"))
    for path in paths:
        left = TOKENIZER_BYTES // len(paths)
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                if split_of(document_id(text), splits) != "train":
                    continue
                yield text
                left -= len(text.encode())
                if left <= 0:
                    break


def study_jobs(folder: Path, *, steps: int | None, seeds: int) -> Iterator[Job]:
    """Runs by seed, then policy, so that an interrupted study has whole comparisons."""
    for seed in range(seeds):
        for policy in POLICIES:
            out = folder / "runs" / f"{policy}-{seed}"
            overrides = [
                "data=demo", f"mixing={policy}", "influence=demo", "training=demo",
                f"training.seed={seed}", f"out={out}", "resume=true",
            ]  # fmt: skip
            if policy == "influence":
                overrides += ["mixing.interval=10", "mixing.learning_rate=0.8"]
                if seed == 0:  # one run ranks documents for the report
                    overrides.append("influence.documents=30")
            if steps is not None:
                overrides.append(f"training.steps={steps}")
            command = (sys.executable, "-m", "dh_jax.cli", "train", *overrides)
            yield Job(policy, seed, out, command)


def run_jobs(jobs: list[Job], console: Console) -> None:
    """Run jobs in as many processes as there are cores, each pinned to one.

    A small model's step does not fill two cores, so two runs side by side finish sooner than
    one after the other. Output goes to a log beside each run.

    Raises:
        UserError: a run failed; the others are stopped, and its last lines are shown.
    """
    free: list[int | None] = [None]
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        free = list(sorted(os.sched_getaffinity(0)))
    waiting = [job for job in jobs if not _finished(job)]
    environment = os.environ | {  # the runs compile the same code: once is enough
        "JAX_COMPILATION_CACHE_DIR": str(jobs[0].out.parent.absolute() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    running: dict[Job, tuple[subprocess.Popen[bytes], int | None]] = {}
    drawn = console.is_terminal or console.is_jupyter
    bar = Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not drawn,
    )
    tasks, runs = {}, len(waiting)
    start = told = time.monotonic()
    begun: dict[Job, float] = {}
    try:
        with bar:
            while waiting or running:
                while free and waiting:
                    job, core = waiting.pop(0), free.pop(0)
                    running[job] = _start(job, core, environment), core
                    tasks[job] = bar.add_task(f"{job.policy} {job.seed}", total=None)
                    begun[job] = time.monotonic()
                time.sleep(0.5)
                for job, (process, core) in list(running.items()):
                    step, total = _progress(job)
                    bar.update(tasks[job], completed=step, total=total)
                    if process.poll() is None:
                        continue
                    del running[job]
                    free.append(core)
                    if process.returncode:
                        raise UserError(f"run {job.out} failed: {_last_lines(_log(job))}")
                    left = len(waiting) + len(running)
                    seconds = (time.monotonic() - start) / (runs - left) * left
                    soon = f", about {duration(seconds)} left" if left else ""
                    bar.console.print(  # also in a log
                        f"{job.policy} {job.seed} is done, {runs - left} of {runs}{soon}"
                    )
                if not drawn and time.monotonic() - told >= PAUSE:
                    told = time.monotonic()
                    console.print(", ".join(_said(job, told - begun[job]) for job in running))
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def _start(job: Job, core: int | None, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    _log(job).parent.mkdir(parents=True, exist_ok=True)
    pin = None if core is None else partial(os.sched_setaffinity, 0, {core})
    with _log(job).open("ab") as log:
        return subprocess.Popen(
            job.command,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=pin,
        )


def _said(job: Job, seconds: float) -> str:
    step, total = _progress(job)
    what = f"step {step} of {total}" if step else f"compiling ({seconds:.0f} s)"
    if step == total:
        what = "its last judgement"
    return f"{job.policy} {job.seed}: {what}"


def _log(job: Job) -> Path:
    return job.out.with_suffix(".log")


def _finished(job: Job) -> bool:
    facts = job.out / "run.json"
    return facts.exists() and json.loads(facts.read_text())["status"] == "finished"


def _progress(job: Job) -> tuple[int, int | None]:
    """Last logged step and the number of steps."""
    timing, config = job.out / "timing.jsonl", job.out / "config.yaml"
    if not timing.exists() or not config.exists():
        return 0, None
    lines = timing.read_text().splitlines()
    step = max((json.loads(x)["step"] for x in lines if x.endswith("}")), default=0)
    for line in config.read_text().splitlines():
        if line.startswith("  steps:"):
            return step, int(line.split(":")[1])
    return step, None


def _last_lines(path: Path) -> str:
    return " | ".join(path.read_text(errors="replace").splitlines()[-3:])
