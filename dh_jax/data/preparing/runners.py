"""Who does the piecework: this process, processes of this machine, or a Ray cluster.

All of them call the same pure functions ``function(job, task)`` and yield what those return as
it comes. A function writes its results into the job's folder and returns only counts.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache, partial
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from dh_jax.data.preparing.piecework import Job
from dh_jax.errors import ConfigError, DataError, UserError
from dh_jax.extras import install_command

Work = Callable[[Job, Any], Any]


class Runner(Protocol):
    """Runs tasks of one job, in any order."""

    def __call__(self, function: Work, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (index of the task, result) as results come; an error ends it all."""


@contextmanager
def open_runner(job: Job, backend: str, workers: int) -> Iterator[Runner]:
    """A runner for one job; its workers are gone when the context is left, however that is.

    Args:
        job: handed to every worker once.
        backend: ``local`` or ``ray``.
        workers: processes of the local backend; 1 works in this process, where the tokenizer
            uses all cores by itself.
    """
    if backend == "ray":
        with _ray(job) as runner:
            yield runner
    elif workers == 1:
        yield lambda function, tasks: ((i, function(job, t)) for i, t in enumerate(tasks))
    else:
        with _processes(job, workers) as runner:
            yield runner


# --- processes of this machine ---------------------------------------------------------------

_job: Job | None = None  # of a worker process


@contextmanager
def _processes(job: Job, workers: int) -> Iterator[Runner]:
    # Not forked from this process, which may hold JAX and its threads, but from a server that
    # imported what the work needs, once; spawning imports it in every worker.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dh_jax.data.preparing.runners"])
    ours, theirs = context.Pipe(duplex=False)[::-1]
    executor = ProcessPoolExecutor(workers, context, _begin, (job, theirs))

    def run(function: Work, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        try:
            futures = {executor.submit(_work, function, task): i for i, task in enumerate(tasks)}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process died; if for want of memory, run again with fewer than "
                f"{workers} workers (data.prepare.workers=...), finished lots are kept; a "
                'script that prepares needs `if __name__ == "__main__":`'
            ) from error

    try:
        yield run
    finally:
        ours.close()  # workers leave at once; they are idle, or what they do is void
        executor.shutdown(wait=True, cancel_futures=True)
        theirs.close()


def _begin(job: Job, stop: Connection) -> None:
    global _job
    _job = job
    _one_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which says stop
    leave_with_parent(stop)


def leave_with_parent(stop: Connection) -> None:
    """Let this worker end as soon as its parent closes the other end of ``stop`` or is no more:
    even SIGKILL leaves no orphan."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    watched = [stop, parent.sentinel]
    threading.Thread(target=_leave, args=(watched,), daemon=True).start()


def _leave(watched: list[Any]) -> None:
    wait(watched)
    os._exit(1)


def _work(function: Work, task: Any) -> Any:
    assert _job is not None
    return function(_job, task)


def _one_thread() -> None:
    """One thread a process: with as many processes as cores, the tokenizer's own would only get
    in one another's way. Read by Rust when it first works in parallel, which is later."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


# --- Ray -------------------------------------------------------------------------------------


@contextmanager
def _ray(job: Job) -> Iterator[Runner]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f"prepare.backend=ray needs Ray Data; {install_command('ray')}, or set "
            "data.prepare.backend=local"
        ) from error
    ours = not ray.is_initialized()
    if ours:  # RAY_ADDRESS says which cluster; without it Ray starts one on this machine
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # we have a progress bar
    packed = pickle.dumps(job)

    def run(function: Work, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        if not tasks:
            return
        rows = [{"index": i, "task": pickle.dumps(task)} for i, task in enumerate(tasks)]
        # One block a task, so that every idle core gets one. A plain function, not a class with
        # a concurrency of its own: actors would hold the cores that reading needs.
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        dataset.context.enable_progress_bars = False
        for row in dataset.map(partial(_ray_work, packed, function)).iter_rows():
            outcome = pickle.loads(row["outcome"])
            if isinstance(outcome, UserError):
                raise outcome
            yield int(row["index"]), outcome

    try:
        yield run
    finally:
        if ours:
            ray.shutdown()


def _ray_work(packed: bytes, function: Work, row: dict[str, Any]) -> dict[str, Any]:
    """A user's error travels as a result: Ray would try again and wrap it in pages of trace."""
    _one_thread()
    try:
        outcome: Any = function(_unpacked(packed), pickle.loads(row["task"]))
    except UserError as error:
        outcome = error
    return {"index": row["index"], "outcome": pickle.dumps(outcome)}


@lru_cache(maxsize=1)
def _unpacked(packed: bytes) -> Job:
    """The job, once a worker: building its tokenizer takes as long as encoding a megabyte."""
    return pickle.loads(packed)
