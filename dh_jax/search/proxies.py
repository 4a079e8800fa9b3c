"""Proxies: small runs that each leave one result file, several at a time, each only once."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dh_jax.config import MixingConfig, RunConfig
from dh_jax.data.preparing.runners import leave_with_parent
from dh_jax.data.store import write_json
from dh_jax.distributed.processes import ENVIRONMENT
from dh_jax.errors import DataError, UserError
from dh_jax.search.config import SearchRunConfig
from dh_jax.train import train

VERSION = 2  # of a result file; 1 left out the moves that left weights as they were
Progress = Callable[[int, int], None]  # proxies that are done, of how many


class Proxy(NamedTuple):
    """One run of a search."""

    name: str
    weights: dict[str, float]  # that it starts from
    mixing: MixingConfig = MixingConfig()  # static
    split: str = "probe"  # what it is judged on


class Result(NamedTuple):
    """What a proxy left behind."""

    name: str
    weights: dict[str, float]  # that it started from
    moves: list[dict[str, float]]  # weights after each move
    losses: dict[str, float]  # held out, by domain, nats a target


def train_all(
    config: SearchRunConfig, proxies: list[Proxy], progress: Progress | None = None
) -> list[Result]:
    """Train the proxies that have no result yet; the results of all, in their order.

    Each runs in a process of its own on its share of the cores. A finished one is not run again;
    one that was killed goes on from its last checkpoint.

    Args:
        config: of the search; ``out`` is its folder.
        proxies: with distinct names.
        progress: called as proxies finish.

    Raises:
        UserError: a proxy failed; names it. The others' results stay.
    """
    folder = Path(config.out)
    found = {proxy.name: read_result(folder, proxy) for proxy in proxies}
    waiting = [proxy for proxy in proxies if found[proxy.name] is None]
    say = progress or (lambda done, total: None)
    say(len(proxies) - len(waiting), len(proxies))
    if waiting:
        workers = min(config.search.processes or len(cores()), len(waiting))
        for name, result in _in_processes(config, waiting, workers):
            found[name] = result
            say(sum(x is not None for x in found.values()), len(proxies))
    return [result for result in found.values() if result is not None]


def read_result(folder: Path, proxy: Proxy) -> Result | None:
    """A proxy's result, or None if it has not finished.

    Raises:
        DataError: the file is broken, or is of other weights.
    """
    path = folder / "results" / f"{proxy.name}.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content.pop("version") != VERSION:
            raise ValueError("another version")
        result = Result(**content)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no result of a proxy ({error}); delete it to run it") from error
    if result.weights != proxy.weights:
        raise DataError(f"{path} is of other weights than this search asks for; choose another out")
    return result


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


# --- one proxy -----------------------------------------------------------------------------------


def run_config(config: SearchRunConfig, proxy: Proxy) -> RunConfig:
    """The run that a proxy is: what is searched for, with its weights, judged once at its end."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)}
    sources = {
        name: dataclasses.replace(source, weight=proxy.weights[name])
        for name, source in config.data.sources.items()
    }
    training = dataclasses.replace(
        config.training, eval_split=proxy.split, eval_interval=config.training.steps, keep=1,
        tensorboard=False, wandb=False,
    )  # fmt: skip
    return RunConfig(
        **fields
        | {
            "data": dataclasses.replace(config.data, sources=sources),
            "mixing": proxy.mixing,
            "training": training,
            "out": str(Path(config.out) / "proxies" / proxy.name),
            "resume": True,
        }
    )


def train_proxy(config: SearchRunConfig, proxy: Proxy) -> Result:
    """Train one proxy in this process and write its result.

    Raises:
        UserError: it failed; names it.
    """
    run = run_config(config, proxy)
    try:
        facts = train(run)
    except UserError as error:
        raise type(error)(f"proxy {proxy.name}: {error}") from error
    if facts["status"] != "finished":
        raise KeyboardInterrupt
    folder = Path(run.out)
    records = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [x for x in records if x["kind"] == "eval"][-1]
    result = Result(
        proxy.name,
        proxy.weights,
        weights_after_moves(records, proxy.mixing, config.training.steps),
        {name: domain["loss"] for name, domain in last["domains"].items()},
    )
    path = Path(config.out) / "results" / f"{proxy.name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"version": VERSION, **result._asdict()})
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # hundreds of them would add up
    return result


def weights_after_moves(
    records: Sequence[Mapping[str, Any]], mixing: MixingConfig, steps: int
) -> list[dict[str, float]]:
    """The weights after each move of a run; none for weights that are still.

    The log leaves out a move that left weights as they were, but what averages over moves must
    count it: the weights before are carried over it.
    """
    if mixing.policy == "static":
        return []
    # The first step's record holds the weights that the run began with.
    weights: dict[str, float] = next(x["weights"] for x in records if x["kind"] == "train")
    moved = {x["step"]: x["weights"] for x in records if x["kind"] == "reweight"}
    found = []
    for step in range(1, steps + 1):
        weights = moved.get(step, weights)
        if step >= mixing.warmup and (step - mixing.warmup) % mixing.interval == 0:
            found.append(weights)
    return found


# --- several at a time ---------------------------------------------------------------------------


def _in_processes(
    config: SearchRunConfig, proxies: list[Proxy], workers: int
) -> Iterator[tuple[str, Result]]:
    """Yield (name, result) as proxies finish; the workers are gone when this ends, however."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dh_jax.search.proxies"])
    ours, theirs = context.Pipe(duplex=False)[::-1]
    shares = context.SimpleQueue()
    available = cores()
    for k in range(workers):
        shares.put(available[k::workers] or [available[k % len(available)]])
    compiled = str((Path(config.out) / "compiled").absolute())
    executor = ProcessPoolExecutor(workers, context, _begin, (theirs, shares, compiled))
    try:
        futures = {executor.submit(train_proxy, config, proxy): proxy for proxy in proxies}
        for future in as_completed(futures):
            yield futures[future].name, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a proxy's process died; if for want of memory, go on with fewer than {workers} "
            "(search.processes=...) and resume=true, finished proxies are kept"
        ) from error
    finally:
        ours.close()  # workers leave at once: what they do goes on from their checkpoints
        executor.shutdown(wait=True, cancel_futures=True)
        theirs.close()


def _begin(stop: Connection, shares: Any, compiled: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which says stop
    leave_with_parent(stop)
    for name in ENVIRONMENT.values():  # a proxy is a run of one process, wherever this one stands
        os.environ.pop(name, None)
    mine = shares.get()
    if hasattr(os, "sched_setaffinity"):  # a small model's step does not fill many cores
        os.sched_setaffinity(0, mine)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # an accelerator is shared
    # Proxies compile the same programs: once is enough.
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
