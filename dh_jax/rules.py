"""Rules that every config keeps, and what of it may be written down."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from dh_jax.errors import ConfigError
from dh_jax.schema import ModelConfig, SourceConfig

WEIGHT_SUM_TOLERANCE = 1e-6
ATTENTION = ("xla", "pallas")  # see `dh_jax.models.kernels`
REMAT = ("none", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")
LINEAR = ("dense", "ternary")
PRECISION = ("default", "highest")


def suggest(word: str, known: Sequence[str]) -> str:
    """A hint at the nearest known name, or nothing.

    >>> suggest("maht", ["maths", "prose"])
    " (did you mean 'maths'?)"
    >>> suggest("zebra", ["maths", "prose"])
    ''
    """
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def one_of(label: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among those allowed, with the nearest of them."""
    if value not in allowed:
        raise ConfigError(
            f"{label} is {value!r}{suggest(value, allowed)}; allowed: {', '.join(allowed)}"
        )


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
    one_of("model.dtype", config.dtype, ("float32", "bfloat16"))
    one_of("model.precision", config.precision, PRECISION)
    one_of("model.attention", config.attention, ATTENTION)
    one_of("model.remat", config.remat, REMAT)
    one_of("model.linear", config.linear, LINEAR)
    if config.lora.rank < 0:
        raise ConfigError(f"model.lora.rank is {config.lora.rank}; the least is 0 (no adapters)")


def weights_of(sources: Mapping[str, SourceConfig]) -> dict[str, float]:
    """Mixture weights by source name: as given (they must sum to 1), or equal if none is.

    >>> weights_of({"a": SourceConfig(weight=0.75), "b": SourceConfig(weight=0.25)})
    {'a': 0.75, 'b': 0.25}
    >>> weights_of({"a": SourceConfig(), "b": SourceConfig()})
    {'a': 0.5, 'b': 0.5}

    Raises:
        ConfigError: only some have a weight, one is negative, or they do not sum to 1.
    """
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


# --- what is written down --------------------------------------------------------------------


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
