"""Optional listeners: TensorBoard and Weights & Biases (both work offline).

Each is a context: leaving it writes out what is still queued.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dh_jax.errors import ConfigError
from dh_jax.extras import install_command
from dh_jax.runlog import Listener, Record


@contextmanager
def tensorboard(folder: Path, resumed_at: int | None = None) -> Iterator[Listener]:
    """Write scalars for TensorBoard below ``folder``.

    Args:
        folder: for event files; a resumed run adds one.
        resumed_at: step of the checkpoint a run goes on from; TensorBoard hides what an earlier
            attempt logged behind it.

    Raises:
        ConfigError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"training.tensorboard needs tensorboardX; {install_command('track')}"
        ) from error
    purge = None if resumed_at is None else resumed_at + 1
    with SummaryWriter(str(folder), purge_step=purge) as writer:

        def listen(record: Record) -> None:
            for name, value in scalars(record).items():
                writer.add_scalar(name, value, record["step"])

        yield listen


@contextmanager
def wandb(folder: Path, config: dict[str, Any]) -> Iterator[Listener]:
    """Log to Weights & Biases; set WANDB_MODE=offline to keep it on this machine.

    Raises:
        ConfigError: wandb is not installed.
    """
    try:
        import wandb as client
    except ImportError as error:
        raise ConfigError(f"training.wandb needs wandb; {install_command('track')}") from error
    with client.init(project="data-handler", dir=str(folder), config=config) as run:

        def listen(record: Record) -> None:
            run.log(scalars(record), step=record["step"])

        yield listen


def scalars(record: Record) -> dict[str, float]:
    """Every number of a record under a slash-joined name, e.g. ``eval/domains/code/loss``."""
    found: dict[str, float] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix] = float(value)

    for key, value in record.items():
        if key not in ("kind", "step"):
            walk(f"{record['kind']}/{key}", value)
    return found
