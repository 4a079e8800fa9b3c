"""A data config with other weights, as a YAML file that `dh train` and `dh mix` take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dh_jax.config import DataConfig, SourceConfig
from dh_jax.data.stores.shards import replacing

DIGITS = 6


def write_data_config(
    data: DataConfig,
    weights: Mapping[str, float],
    method: str,
    path: Path,
    remark: str | None = None,
) -> None:
    """Write the config with these weights; what has its default value is left out.

    ``storage_options`` are never written down, since they may hold secrets.

    Args:
        data: typed.
        weights: by source, summing to 1.
        method: how they were found, for the comment at the top and the config's name.
        path: the file; it appears whole or not at all.
        remark: one more line of that comment.
    """
    plain = shortened(data)
    plain["name"] = f"{data.name}-{method}"
    rounded = round_weights(weights)
    for name, source in plain["sources"].items():
        source["weight"] = rounded[name]
    comment = f"# Data config {data.name!r} with the weights that `dh mix search={method}` found.\n"
    if remark is not None:
        comment += f"# {remark}\n"
    secret = [n for n, s in data.sources.items() if getattr(s, "storage_options", None)]
    if secret:
        comment += (
            f"# storage_options of {', '.join(secret)} are not written down; give them again.\n"
        )
    with replacing(path) as partial:
        partial.write_text(comment + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def round_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights of few digits that sum to 1; the largest takes what rounding leaves."""
    rounded = {name: round(weight, DIGITS) for name, weight in weights.items()}
    largest = max(rounded, key=lambda name: rounded[name])
    rest = math.fsum(weight for name, weight in rounded.items() if name != largest)
    return rounded | {largest: round(1 - rest, DIGITS)}


def shortened(value: Any) -> Any:
    """A dataclass as a mapping without the fields that have their default."""
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    kept = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kind = isinstance(value, SourceConfig) and field.name == "kind"
        if field.name != "storage_options" and (kind or item != default):
            kept[field.name] = shortened(item)
    return kept
