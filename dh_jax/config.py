"""Typed configuration: what every YAML file under ``configs/`` may say, and how it is found.

The schemas are plain dataclasses, kept in `dh_jax.schema` and importable from here. Hydra
composes them on the command line (`dh_jax.compose`); `load_data_config` reads one data config
without touching Hydra's global state, so it also works inside a running ``@hydra.main``
application. Unknown keys are refused everywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dh_jax.errors import ConfigError
from dh_jax.schema import (
    FILE_FORMATS,
    SOURCE_KINDS,
    SPLITS,
    TOKEN_SOURCES,
    DataConfig,
    DecontaminationConfig,
    DistributedConfig,
    FilesSource,
    HubSource,
    InfluenceConfig,
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
    TextConfig,
    TorchRunConfig,
    TrainingConfig,
)

__all__ = [
    "FILE_FORMATS",
    "SOURCE_KINDS",
    "SPLITS",
    "TOKEN_SOURCES",
    "DataConfig",
    "DecontaminationConfig",
    "DistributedConfig",
    "FilesSource",
    "HubSource",
    "InfluenceConfig",
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
    "TextConfig",
    "TorchRunConfig",
    "TrainingConfig",
    "config_folder",
    "decisive_spec",
    "explain",
    "find_yaml",
    "list_configs",
    "load_data_config",
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

WEIGHT_SUM_TOLERANCE = 1e-6


# --- finding and reading ---------------------------------------------------------------------


def config_folder() -> Path:
    """The folder of shipped YAML: ``dh_jax/configs`` in a wheel, ``configs/`` in a checkout."""
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
    """The file of a shipped config, or a YAML file of one's own by its path."""
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
    """Merge ``raw`` (mapping) and ``key=value`` overrides into a fresh ``cls``."""
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


def suggest(word: str, known: Sequence[str]) -> str:
    """A hint at the nearest known name, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _untyped(config: DataConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


# --- checking --------------------------------------------------------------------------------


def source_config(name: str, raw: Any) -> SourceConfig:
    """The typed source behind one entry of ``sources``; the second step OmegaConf needs,
    since it refuses unions."""
    if isinstance(raw, SourceConfig):
        return raw
    raw = OmegaConf.to_container(raw, resolve=True) if isinstance(raw, DictConfig) else raw
    if not isinstance(raw, Mapping):
        raise ConfigError(f"source {name!r}: expected a mapping with a 'kind', got {raw!r}")
    kind = raw.get("kind")
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
    source = typed(SOURCE_KINDS[kind], fields, where=f"source {name!r}")
    chosen = [source.text.column, source.text.columns, source.text.template]
    if sum(choice is not None for choice in chosen) != 1:
        raise ConfigError(
            f"source {name!r}: text needs exactly one of column, columns, template; "
            f"got {[c for c in chosen if c is not None]}"
        )
    _one_of(f"source {name!r}: split", source.split, ("hash", *SPLITS))
    if source.weight is not None and not (math.isfinite(source.weight) and source.weight >= 0):
        raise ConfigError(f"source {name!r}: weight {source.weight} must be finite and >= 0")
    if source.max_epochs is not None and source.max_epochs < 1:
        raise ConfigError(f"source {name!r}: max_epochs is {source.max_epochs}; the least is 1")
    if isinstance(source, FilesSource):
        _one_of(f"source {name!r}: format", source.format, ("auto", *FILE_FORMATS))
        if not source.paths:
            raise ConfigError(f"source {name!r}: paths is empty; name files, folders or globs")
    if isinstance(source, HubSource) and not source.path:
        raise ConfigError(f"source {name!r}: path is empty; name a data set, e.g. org/name")
    if isinstance(source, TOKEN_SOURCES):
        _one_of(f"source {name!r}: ids", source.ids, ("position", "content"))
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


def public_spec(spec: SourceConfig) -> dict[str, Any]:
    """A source as plain values for fingerprints, logs and saved configs.

    Left out are options that may hold secrets (``storage_options``) and patience with the
    network (``retry``), which decides nothing about the documents.
    """
    values = dataclasses.asdict(spec)
    for key in ("storage_options", "retry"):
        values.pop(key, None)
    return values


def decisive_spec(spec: SourceConfig) -> dict[str, Any]:
    """What decides which documents a source has, as plain values for fingerprints: neither how
    often nor in what order they are read."""
    values = public_spec(spec)
    for key in ("weight", "max_epochs", "interleave"):
        del values[key]
    return values


def public_run(config: Any) -> dict[str, Any]:
    """A run's config as plain values for its folder and for logs; see `public_spec`."""
    values = dataclasses.asdict(config)
    for group in ("sources", "probes"):
        specs = getattr(config.data, group)
        values["data"][group] = {
            name: public_spec(spec) if isinstance(spec, SourceConfig) else spec
            for name, spec in specs.items()
        }
    return values


def validate_data(config: DataConfig) -> DataConfig:
    """Type the sources and check every rule a data config must keep."""
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
    _one_of("packing.strategy", config.packing.strategy, ("best_fit", "first_fit", "concat"))
    _one_of("packing.long_documents", config.packing.long_documents, ("split", "truncate"))
    _one_of("weight_unit", config.weight_unit, ("tokens", "rows", "trained_tokens"))
    _one_of("exhausted", config.exhausted, ("renormalise", "stop"))
    _one_of("on_error", config.on_error, ("raise", "skip"))
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
    _one_of("prepare.backend", config.backend, ("local", "ray"))
    _one_of("prepare.near_duplicates.action", near.action, ("ignore", "drop", "together"))
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


def weights_of(sources: Mapping[str, SourceConfig]) -> dict[str, float]:
    """Mixture weights by source name: as given (they must sum to 1), or equal if none is."""
    given = {n: s.weight for n, s in sources.items() if s.weight is not None}
    if not given:
        return dict.fromkeys(sources, 1.0 / len(sources))
    missing = [n for n in sources if n not in given]
    if missing:
        raise ConfigError(
            f"sources {', '.join(missing)} have no weight but others do; "
            "give every source a weight, or none for equal shares"
        )
    total = sum(given.values())
    if abs(total - 1.0) > WEIGHT_SUM_TOLERANCE:
        if total > 0:
            scaled = ", ".join(f"{n}: {w / total:.4g}" for n, w in given.items())
            cure = f"to keep their ratios write {scaled}"
        else:
            cure = "give at least one source a positive weight"
        raise ConfigError(f"source weights sum to {total:g}, not 1; {cure}")
    return {n: float(w) for n, w in given.items()}


def validate_model(config: ModelConfig) -> None:
    """Refuse a shape that no decoder has.

    Raises:
        ConfigError: one line with the field, its value and what it must be.
    """
    for name in ("width", "layers", "heads", "kv_heads", "mlp_width"):
        if getattr(config, name) < 1:
            raise ConfigError(f"model.{name} is {getattr(config, name)}; the least is 1")
    if config.heads % config.kv_heads:
        raise ConfigError(
            f"model.heads {config.heads} is not a multiple of model.kv_heads {config.kv_heads}; "
            f"kv_heads must divide {config.heads}"
        )
    if config.head_width is None and config.width % config.heads:
        raise ConfigError(
            f"model.width {config.width} is not a multiple of model.heads {config.heads}; "
            "change one of them, or set model.head_width"
        )
    head_width = config.width // config.heads if config.head_width is None else config.head_width
    if head_width < 2 or head_width % 2:
        raise ConfigError(f"model.head_width is {head_width}; rotary positions need an even number")
    for name in ("rope_theta", "norm_epsilon", "init_scale"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"model.{name} is {getattr(config, name)}; it must be above 0")
    _one_of("model.dtype", config.dtype, ("float32", "bfloat16"))


def _one_of(label: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{label} is {value!r}{suggest(value, allowed)}; allowed: {', '.join(allowed)}"
        )
