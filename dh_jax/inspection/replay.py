"""What a run's batch at a step held, made again from its folder and its data.

The loader goes back to the last checkpoint before the step (or to the start), draws the batches
from there on, and changes the weights where the log says that the run did. On the way it is held
against every logged step, so data that is no longer what the run read is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dh_jax.batch import Batch, Origins, checksum
from dh_jax.data.elastic import loader_states
from dh_jax.data.loader import Loader
from dh_jax.distributed.checkpoint import read_host
from dh_jax.errors import DataError, StateError, UserError
from dh_jax.inspection.rows import DecodedRow, decode_rows
from dh_jax.report.runs import Run, TrainPoint, load_run
from dh_jax.runconfig import load_config, training_loader


class Replay(NamedTuple):
    """One batch of a run."""

    run: Path
    step: int
    steps: int  # that the run has logged
    since: int  # the checkpoint that the replay began at; 0: the start of the run
    compared: int  # batches from there on whose checksum was logged and agrees
    weights: dict[str, float]  # in force for this batch
    names: tuple[str, ...]  # of the sources
    rows: list[DecodedRow]
    batch: Batch
    origins: Origins


def replay(
    folder: str | Path,
    step: int,
    *,
    store: str | None = None,
    rows: list[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Replay:
    """Make the batch of one training step of a run again.

    Args:
        folder: the run's folder.
        step: from 1 to the run's last step.
        store: where the run's token store is now, if it was moved.
        rows: which rows to decode; default: all.
        progress: called with every step drawn on the way.

    Raises:
        DataError: the folder holds no run, the run has no such step, or its data is gone.
        StateError: the data is there but is not what the run read.
    """
    folder = Path(folder)
    run, config = load_run(folder), load_config(folder)
    last = run.train[-1].step
    if not 1 <= step <= last:
        raise DataError(f"run {folder} has no step {step}; it has logged steps 1 to {last}")
    size = config.training.batch_size
    for row in rows or ():
        if not 0 <= row < size:
            raise DataError(f"a batch of run {folder} has no row {row}; rows are 0 to {size - 1}")
    if store is not None:
        config.data.store = store
    saved = read_host(folder / "checkpoints", before=step)
    with _explained(folder):
        loader = training_loader(config, prefetch=0)
    with loader:
        if saved is None:
            loader.set_weights(_first_weights(run))
        else:
            with _explained(folder):
                loader.set_state(_state_for_one(folder, saved.host["loaders"]))
        return _draw(loader, run, step, saved.step if saved else 0, rows, progress)


def _state_for_one(folder: Path, states: list[dict[str, Any]]) -> dict[str, Any]:
    """The loader state of one host that draws the rows of all; a stream has none."""
    state, again = loader_states(states, 1)
    if again:
        raise StateError(
            f"run {folder} streamed its documents to {len(states)} hosts, whose batches no single "
            "loader can make; only runs on prepared stores can be replayed"
        )
    return state[0]


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say of an error of the data that the run could once read it."""
    try:
        yield
    except StopIteration:
        raise StateError(f"the data of run {folder} ends before the run did") from None
    except UserError as error:
        raise type(error)(
            f"the data of run {folder} is no longer there as the run read it: {error} (paths are "
            "relative to the folder the run was started in; --store names a store that was moved)"
        ) from error


def _draw(
    loader: Loader,
    run: Run,
    step: int,
    since: int,
    rows: list[int] | None,
    progress: Callable[[int], None] | None,
) -> Replay:
    logged = {point.step: point for point in run.train}
    moves = {point.step: point.weights for point in run.reweights}
    compared = 0
    for now in range(since + 1, step + 1):
        if progress is not None:
            progress(now)
        with _explained(run.folder):  # a stream looks at its files when it is first read
            batch = next(loader)
        if now in logged:
            _compare(loader, batch, logged[now])
            compared += logged[now].batch is not None
        if now in moves and now < step:
            loader.set_weights(moves[now])
    decoded = decode_rows(batch, loader.origins, loader.names, loader.tokenizer, rows)
    return Replay(
        run.folder, step, run.train[-1].step, since, compared, loader.weights, loader.names,
        decoded, batch, loader.origins,
    )  # fmt: skip


def _first_weights(run: Run) -> dict[str, float]:
    """The weights that a run began with: its policy may have changed the configured ones."""
    first = run.train[0]
    if run.reweights and run.reweights[0].step < first.step:
        raise StateError(
            f"the log of run {run.folder} says nothing of the weights up to step "
            f"{run.reweights[0].step}, since its first record is of step {first.step}; replay a "
            "step behind its first checkpoint"
        )
    return first.weights


def _compare(loader: Loader, batch: Batch, point: TrainPoint) -> None:
    """Hold a batch, and the weights it was drawn under, against the log."""
    for what, ours, theirs in (
        ("weights", loader.weights, point.weights),
        ("batch", checksum(batch), point.batch),
    ):
        if theirs is not None and ours != theirs:
            raise StateError(
                f"at step {point.step} the log has {what} {theirs}, the replay {ours}; the data is "
                "not what the run read"
            )
