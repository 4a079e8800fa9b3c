"""One contender at a time, in a process of its own: CPU-seconds of the tree and peak memory."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def peak_mib() -> float:
    """Largest resident set of this process or of one of its children, MiB.

    (This process's own from /proc: `getrusage` begins at what its parent had.)
    """
    own = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


def resident_mib() -> float:
    """Resident set of this process now, MiB."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def pin() -> None:
    """One core for this process, before it starts threads: what they all do is then one thread's
    work."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def clock(work: Callable[[], int]) -> dict[str, float]:
    """Run ``work``, which returns tokens; children must have ended when it returns."""
    start, wall = cpu_seconds(), time.perf_counter()
    tokens = work()
    return {
        "tokens": tokens,
        "cpu": cpu_seconds() - start,
        "wall": time.perf_counter() - wall,
        "peak_mib": peak_mib(),
    }


def in_a_process(
    script: Path, arguments: Iterable[str], python: str = sys.executable, path: Iterable[str] = ()
) -> Any:
    """The last line that a script prints, read as JSON.

    Args:
        script: file to run.
        arguments: for it.
        python: interpreter.
        path: folders of packages to go before everybody else's.
    """
    places = ":".join([*path, str(ROOT)])
    done = subprocess.run(
        [python, str(script), *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": places, "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{script.name} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(results: list[dict[str, float]]) -> dict[str, float]:
    """Medians, quantity by quantity."""
    return {key: statistics.median(r[key] for r in results) for key in results[0]}
