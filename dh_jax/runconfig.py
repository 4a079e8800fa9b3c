"""A run's config (checked, written once, held against that of a resumption) and its data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dh_jax.config import (
    DataConfig,
    DistributedConfig,
    MeshConfig,
    MixingConfig,
    RunConfig,
    TorchRunConfig,
    TrainingConfig,
    load_data_config,
    one_of,
    public_run,
    typed,
)
from dh_jax.data.loader import Join, Loader, get_loader
from dh_jax.data.prepare import open_prepared
from dh_jax.data.seeding import derive
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, DataError, StateError

MAY_CHANGE = {  # config keys that may differ between a run and its resumption
    "out", "resume", "data.prefetch", "training.keep", "training.checkpoint_interval",
    "training.log_interval", "training.tensorboard", "training.wandb", "training.keep_every",
    "search.processes",
    *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)),
    *(f"distributed.{field.name}" for field in dataclasses.fields(DistributedConfig)),
}  # fmt: skip


def check_training(training: TrainingConfig) -> None:
    """Refuse counts that no run has.

    Raises:
        ConfigError: names the key, its value and the least it may be.
    """
    t = training
    for label, value, least in (
        ("steps", t.steps, 1), ("batch_size", t.batch_size, 1), ("warmup", t.warmup, 0),
        ("eval_interval", t.eval_interval, 1), ("eval_rows", t.eval_rows, 1),
        ("checkpoint_interval", t.checkpoint_interval, 1), ("keep", t.keep, 1),
        ("log_interval", t.log_interval, 1),
        ("keep_every", 1 if t.keep_every is None else t.keep_every, 1),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"training.{label} is {value}; the least is {least}")
    one_of("training.eval_split", t.eval_split, ("eval", "probe"))


def save_config(folder: Path, config: RunConfig | TorchRunConfig) -> None:
    """Write ``config.yaml`` into a run's folder, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".config.yaml.partial"
    partial.write_text(OmegaConf.to_yaml(OmegaConf.create(public_run(config))))
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
    join: Join | None = None,
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
        join=join,
    )


def source_tokens(data: DataConfig, tokenizer: TokenizerWrapper) -> dict[str, int] | None:
    """Training tokens by source, or None where they are streamed and nobody has counted them."""
    if data.store is None:
        return None
    store = open_prepared(data, tokenizer)
    return {name: store.total(name, "train", "tokens") for name in data.sources}


def resolve_reference(mixing: MixingConfig, names: list[str]) -> MixingConfig:
    """Put the final held-out losses of ``reference_run`` in the place of ``reference``.

    So a run's own config says what it was steered by, whatever becomes of the other run.

    Raises:
        ConfigError: both are given.
        DataError: the folder holds no evaluation, or none of a source.
    """
    if mixing.policy != "doremi" or mixing.reference_run is None:
        return mixing
    path = Path(mixing.reference_run) / "metrics.jsonl"
    if mixing.reference:
        raise ConfigError("mixing.reference and mixing.reference_run are both given; keep one")
    if not path.is_file():
        raise DataError(f"{path}: missing; mixing.reference_run names the folder of a run")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    judged = [record["domains"] for record in records if record["kind"] == "eval"]
    missing = [name for name in names if not judged or name not in judged[-1]]
    if missing:
        raise DataError(f"{path}: no held-out loss of source {', '.join(map(repr, missing))}")
    reference = {name: judged[-1][name]["loss"] for name in names}
    return dataclasses.replace(mixing, reference=reference, reference_run=None)


def refuse_other_config(folder: Path, config: RunConfig | TorchRunConfig) -> None:
    """Refuse to resume a run under a config that would make it another run."""
    saved = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    now = json.loads(json.dumps(public_run(config)))
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
