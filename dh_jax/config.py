"""Typed configuration: what every YAML file under ``configs/`` may say, and how it is found.

The schemas are plain dataclasses, kept in `dh_jax.schema` and importable from here. Hydra
composes them on the command line (`dh_jax.compose`); `load_data_config` reads one data config
without touching Hydra's global state, so it also works inside a running ``@hydra.main``
application. Unknown keys are refused everywhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dh_jax.distillation_schema import DistillationConfig
from dh_jax.distributed_schema import DistributedConfig
from dh_jax.errors import ConfigError
from dh_jax.rules import (
    decisive_spec,
    one_of,
    public_run,
    public_spec,
    suggest,
    validate_model,
    weights_of,
)
from dh_jax.schema import (
    CONVERSATION_COLUMNS,
    FILE_FORMATS,
    SOURCE_KINDS,
    SPLITS,
    TOKEN_SOURCES,
    ConversationConfig,
    DataConfig,
    DecontaminationConfig,
    FilesSource,
    HubSource,
    InfluenceConfig,
    LoraConfig,
    MdsSource,
    MegatronSource,
    MeshConfig,
    MixingConfig,
    ModelConfig,
    NearDuplicateConfig,
    PackingConfig,
    PrepareConfig,
    RetryConfig,
    RunConfig,
    SourceConfig,
    SplitConfig,
    StageConfig,
    TextConfig,
    TorchRunConfig,
    TrainingConfig,
)

__all__ = [
    "CONVERSATION_COLUMNS",
    "FILE_FORMATS",
    "SOURCE_KINDS",
    "SPLITS",
    "TOKEN_SOURCES",
    "ConversationConfig",
    "DataConfig",
    "DecontaminationConfig",
    "DistillationConfig",
    "DistributedConfig",
    "FilesSource",
    "HubSource",
    "InfluenceConfig",
    "LoraConfig",
    "MdsSource",
    "MegatronSource",
    "MeshConfig",
    "MixingConfig",
    "ModelConfig",
    "NearDuplicateConfig",
    "PackingConfig",
    "PrepareConfig",
    "RetryConfig",
    "RunConfig",
    "SourceConfig",
    "SplitConfig",
    "StageConfig",
    "TextConfig",
    "TorchRunConfig",
    "TrainingConfig",
    "config_folder",
    "decisive_spec",
    "explain",
    "find_yaml",
    "list_configs",
    "load_data_config",
    "one_of",
    "public_run",
    "public_spec",
    "source_config",
    "suggest",
    "typed",
    "validate_data",
    "validate_model",
    "weights_of",
]

T = TypeVar("T")


# --- finding and reading ---------------------------------------------------------------------


def config_folder() -> Path:
    """The folder of shipped YAML: ``dh_jax/configs`` in a wheel, ``configs/`` in a checkout.

    Raises:
        ConfigError: there are none, so the installation is damaged.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "data").is_dir():
            return folder
    raise ConfigError(
        f"no configs beside {package}: the installation is damaged; reinstall data-handler"
    )


def list_configs() -> dict[str, list[str]]:
    """Names of the shipped configs by group, both sorted."""
    root = config_folder()
    groups = sorted(p for p in root.iterdir() if p.is_dir())
    return {g.name: sorted(p.stem for p in g.glob("*.yaml")) for g in groups}


def describe_configs() -> dict[str, dict[str, str]]:
    """The shipped configs by group and name, each with the first sentence of its comment."""
    root = config_folder()
    return {
        group: {name: _first_sentence(root / group / f"{name}.yaml") for name in names}
        for group, names in list_configs().items()
    }


def _first_sentence(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.removeprefix("#").strip() for line in comment)
    return re.split(r"(?<! al)\.(?= |$)", text, maxsplit=1)[0]


def load_data_config(
    config: str | Path | DataConfig | Mapping[str, Any] | DictConfig,
    overrides: Sequence[str] = (),
) -> DataConfig:
    """Read a data config: a shipped name, a YAML file, a mapping, or one already typed.

    Args:
        config: for example ``"mixed_pretrain"``, ``"my/data.yaml"`` or ``cfg.data``.
        overrides: ``key=value`` strings, for example ``["max_length=512"]``.

    Returns:
        A validated `DataConfig` whose ``sources`` and ``probes`` are typed `SourceConfig`.

    Raises:
        ConfigError: the name, a key or a value is wrong; the message names it and the cure.
    """
    if isinstance(config, DataConfig) and not overrides:
        return validate_data(dataclasses.replace(config))
    if isinstance(config, str | Path):
        raw: Any = OmegaConf.load(find_yaml("data", config))
    elif isinstance(config, DataConfig):
        raw = _untyped(config)
    else:
        raw = config
    merged = typed(DataConfig, raw, overrides, where="data")
    return validate_data(merged)


def find_yaml(group: str, name: str | Path) -> Path:
    """The file of a shipped config, or a YAML file of one's own by its path.

    Raises:
        ConfigError: there is neither a shipped config nor a file of this name.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(f"no config file {path}")
    shipped = config_folder() / group / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    known = list_configs().get(group, [])
    raise ConfigError(
        f"no {group} config {str(name)!r}{suggest(str(name), known)}; "
        f"shipped: {', '.join(known)}; or give the path of a .yaml file"
    )


def typed(cls: type[T], raw: Any, overrides: Sequence[str] = (), *, where: str = "config") -> T:
    """Merge ``raw`` (mapping) and ``key=value`` overrides into a fresh ``cls``.

    Raises:
        ConfigError: a key is unknown or a value of the wrong type; names the nearest key.
    """
    try:
        schema = OmegaConf.structured(cls)
        given = OmegaConf.merge(OmegaConf.create(raw), OmegaConf.from_dotlist(list(overrides)))
        merged = OmegaConf.to_object(OmegaConf.merge(schema, given))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, cls, where)) from error
    assert isinstance(merged, cls)
    return merged


def explain(error: Exception, cls: type, where: str) -> str:
    """One line for an OmegaConf or Hydra error, with the nearest known key."""
    key = getattr(error, "full_key", None)
    text = str(error).splitlines()[0]
    if key:
        holder = getattr(error, "object_type", None) or cls
        names = (
            [f.name for f in dataclasses.fields(holder)] if dataclasses.is_dataclass(holder) else []
        )
        last = str(key).split(".")[-1]
        if names and last not in names:
            return f"{where}: unknown key {key!r}{suggest(last, names)}; known: {', '.join(names)}"
        return f"{where}.{key}: {text}"
    return f"{where}: {text}"


def _untyped(config: DataConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


# --- checking --------------------------------------------------------------------------------


def source_config(name: str, raw: Any) -> SourceConfig:
    """The typed source behind one entry of ``sources``; the second step OmegaConf needs,
    since it refuses unions.

    Raises:
        ConfigError: its kind or a key is unknown, or a value lies outside its range.
    """
    if isinstance(raw, SourceConfig):
        return raw
    raw = OmegaConf.to_container(raw, resolve=True) if isinstance(raw, DictConfig) else raw
    if not isinstance(raw, Mapping):
        raise ConfigError(f"source {name!r}: expected a mapping with a 'kind', got {raw!r}")
    kind = raw.get("kind")
    if kind is None:
        raise ConfigError(
            f"source {name!r} has no kind; known kinds: {', '.join(SOURCE_KINDS)} "
            "(or is its name misspelt?)"
        )
    if kind not in SOURCE_KINDS:
        raise ConfigError(
            f"source {name!r}: kind {kind!r}{suggest(str(kind), list(SOURCE_KINDS))}; "
            f"known kinds: {', '.join(SOURCE_KINDS)}"
        )
    fields = dict(raw)
    text = fields.get("text")
    if isinstance(text, str):  # text: content
        fields["text"] = {"column": text}
    elif isinstance(text, list):  # text: [title, body]
        fields["text"] = {"column": None, "columns": text}
    elif isinstance(text, Mapping):  # the default column gives way to what is named
        fields["text"] = {"column": None, **text}
        if isinstance(text.get("conversation"), str):  # conversation: sharegpt
            fields["text"]["conversation"] = {"shape": text["conversation"]}
    source = typed(SOURCE_KINDS[kind], fields, where=f"source {name!r}")
    conversation = source.text.conversation
    chosen = [source.text.column, source.text.columns, source.text.template, conversation]
    if sum(choice is not None for choice in chosen) != 1:
        raise ConfigError(
            f"source {name!r}: text needs exactly one of column, columns, template, conversation; "
            f"got {[c for c in chosen if c is not None]}"
        )
    if conversation is not None:
        _check_conversation(f"source {name!r}: text.conversation", conversation)
    one_of(f"source {name!r}: split", source.split, ("hash", *SPLITS))
    if source.weight is not None and not (math.isfinite(source.weight) and source.weight >= 0):
        raise ConfigError(f"source {name!r}: weight {source.weight} must be finite and >= 0")
    if source.max_epochs is not None and source.max_epochs < 1:
        raise ConfigError(f"source {name!r}: max_epochs is {source.max_epochs}; the least is 1")
    if isinstance(source, FilesSource):
        one_of(f"source {name!r}: format", source.format, ("auto", *FILE_FORMATS))
        if not source.paths:
            raise ConfigError(f"source {name!r}: paths is empty; name files, folders or globs")
    if isinstance(source, HubSource) and not source.path:
        raise ConfigError(f"source {name!r}: path is empty; name a data set, e.g. org/name")
    if isinstance(source, TOKEN_SOURCES):
        one_of(f"source {name!r}: ids", source.ids, ("position", "content"))
        if not source.path:
            raise ConfigError(f"source {name!r}: path is empty; name the token files")
    for label, value, least in (
        ("interleave", source.interleave, 1),
        ("retry.attempts", source.retry.attempts, 1),
        ("retry.first", source.retry.first, 0),
        ("retry.longest", source.retry.longest, 0),
    ):
        if value < least:
            raise ConfigError(f"source {name!r}: {label} is {value}; the least is {least}")
    return source


def _check_conversation(label: str, conversation: ConversationConfig) -> None:
    one_of(f"{label}.shape", conversation.shape, tuple(CONVERSATION_COLUMNS))
    one_of(f"{label}.too_long", conversation.too_long, ("truncate", "drop"))
    one_of(f"{label}.dropped_text", conversation.dropped_text, ("refuse", "keep"))
    known = (*CONVERSATION_COLUMNS[conversation.shape], "system", "tools")
    for key, column in conversation.columns.items():
        one_of(f"{label}.columns: key", key, known)
        if column is None and key not in ("input", "system", "tools"):
            raise ConfigError(f"{label}.columns.{key} is null; the shape cannot do without it")


def validate_data(config: DataConfig) -> DataConfig:
    """Type the sources and check every rule a data config must keep.

    Raises:
        ConfigError: a rule is broken; names the value, the limit and the cure.
    """
    if not config.sources:
        raise ConfigError(f"data config {config.name!r} has no sources; add one under 'sources'")
    sources = {n: source_config(n, raw) for n, raw in config.sources.items()}
    probes: dict[str, Any] = {}
    for name, raw in config.probes.items():
        if isinstance(raw, str):  # the probe split of a source
            if raw not in sources:
                raise ConfigError(
                    f"probe {name!r} names source {raw!r}{suggest(raw, list(sources))}, "
                    f"which is not among {', '.join(sources)}"
                )
            probes[name] = raw
        else:
            probes[name] = source_config(name, raw)
    weights_of(sources)
    one_of("packing.strategy", config.packing.strategy, ("best_fit", "first_fit", "concat"))
    one_of("packing.long_documents", config.packing.long_documents, ("split", "truncate"))
    one_of("weight_unit", config.weight_unit, ("tokens", "rows", "trained_tokens"))
    one_of("exhausted", config.exhausted, ("renormalise", "stop"))
    one_of("on_error", config.on_error, ("raise", "skip"))
    for label, value, least in (
        ("max_length", config.max_length, 2),
        ("packing.window", config.packing.window, 1),
        ("packing.max_segments", config.packing.max_segments, 1),
        ("prefetch", config.prefetch, 0),
    ):
        if value < least:
            raise ConfigError(f"{label} is {value}; the least is {least}")
    held_out = config.splits.probe + config.splits.eval
    if min(config.splits.probe, config.splits.eval) < 0 or held_out >= 1:
        raise ConfigError(
            f"splits.probe {config.splits.probe} and splits.eval {config.splits.eval} must be "
            "at least 0 and together below 1"
        )
    return dataclasses.replace(
        config, sources=sources, probes=probes, prepare=_checked_prepare(config.prepare)
    )


def _checked_prepare(config: PrepareConfig) -> PrepareConfig:
    near, clean = config.near_duplicates, config.decontamination
    one_of("prepare.backend", config.backend, ("local", "ray"))
    one_of("prepare.near_duplicates.action", near.action, ("ignore", "drop", "together"))
    if not 0 < near.threshold <= 1:
        raise ConfigError(
            f"prepare.near_duplicates.threshold is {near.threshold}; it must be above 0, at most 1"
        )
    for label, value, least in (
        ("workers", 1 if config.workers is None else config.workers, 1),
        ("near_duplicates.ngram", near.ngram, 1),
        ("near_duplicates.permutations", near.permutations, 16),
        ("decontamination.shortest", clean.shortest, 1),
        ("decontamination.ngram", clean.ngram, clean.shortest),
        ("decontamination.max_documents", clean.max_documents, 1),
    ):
        if value < least:
            raise ConfigError(f"prepare.{label} is {value}; the least is {least}")
    against = {name: source_config(name, raw) for name, raw in clean.against.items()}
    return dataclasses.replace(config, decontamination=dataclasses.replace(clean, against=against))
