"""A run's saved config (written once, held against that of a resumption) and its data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dh_jax.config import RunConfig, load_data_config, typed
from dh_jax.data.loader import Loader, get_loader
from dh_jax.data.seeding import derive
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import DataError, StateError

MAY_CHANGE = {  # config keys that may differ between a run and its resumption
    "out", "resume", "data.prefetch", "training.keep", "training.checkpoint_interval",
    "training.log_interval", "training.tensorboard", "training.wandb",
}  # fmt: skip


def save_config(folder: Path, config: RunConfig) -> None:
    """Write ``config.yaml`` into a run's folder, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".config.yaml.partial"
    partial.write_text(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))
    partial.replace(folder / "config.yaml")


def load_config(folder: Path) -> RunConfig:
    """Read the ``config.yaml`` that `save_config` wrote.

    Raises:
        DataError: there is none.
        ConfigError: it says what this version does not know.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise DataError(f"{path}: missing; a run folder holds its config")
    config = typed(RunConfig, OmegaConf.load(path), where=str(path))
    return dataclasses.replace(config, data=load_data_config(config.data))


def training_loader(
    config: RunConfig,
    *,
    tokenizer: TokenizerWrapper | None = None,
    shard: tuple[int, int] = (0, 1),
    prefetch: int | None = None,
) -> Loader:
    """The loader that a run trains on, at its first batch, under the configured weights.

    Raises:
        ConfigError, DataError, StateError: as `get_loader`.
    """
    return get_loader(
        config.data,
        tokenizer=tokenizer,
        batch_size=config.training.batch_size,
        seed=derive(config.training.seed, "train"),
        shard=shard,
        prefetch=prefetch,
    )


def refuse_other_config(folder: Path, config: RunConfig) -> None:
    """Refuse to resume a run under a config that would make it another run."""
    saved = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    changed = [
        f"{key} (was {old!r}, now {new!r})"
        for key, old, new in _differences("", saved, now)
        if key not in MAY_CHANGE
    ]
    if changed:
        raise StateError(
            f"{folder} was started with another config: {'; '.join(changed[:4])}; "
            "resume with the same values, or choose another out="
        )


def _differences(prefix: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            yield from _differences(f"{prefix}.{key}".lstrip("."), old.get(key), new.get(key))
    elif old != new:
        yield prefix, old, new
