"""Optional listeners: TensorBoard and Weights & Biases (both work offline)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dh_jax.errors import ConfigError
from dh_jax.runlog import Listener, Record


def tensorboard(folder: Path) -> Listener:
    """Write scalars for TensorBoard below ``folder``."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "training.tensorboard needs tensorboardX; pip install 'data-handler[track]'"
        ) from error
    writer = SummaryWriter(str(folder))

    def listen(record: Record) -> None:
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record["step"])

    return listen


def wandb(folder: Path, config: dict[str, Any]) -> Listener:
    """Log to Weights & Biases; set WANDB_MODE=offline to keep it on this machine."""
    try:
        import wandb as client
    except ImportError as error:
        raise ConfigError(
            "training.wandb needs wandb; pip install 'data-handler[track]'"
        ) from error
    run = client.init(project="data-handler", dir=str(folder), config=config)

    def listen(record: Record) -> None:
        run.log(scalars(record), step=record["step"])

    return listen


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
