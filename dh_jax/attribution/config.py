"""What `dh influence` is told: the schema behind ``configs/attribution.yaml``.

Units: lengths in tokens, memory in GiB.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from dh_jax.config import (
    DataConfig,
    ModelConfig,
    load_data_config,
    suggest,
)
from dh_jax.errors import ConfigError
from dh_jax.models.start import resolve


@dataclass
class EstimatorConfig:
    """Which estimator, of which gradients."""

    name: str = "gradient_cosine"
    arguments: dict[str, Any] = field(default_factory=dict)  # of its function: damping, steps, ...
    parameters: str = ".*"  # regular expression searched for in parameter paths
    reduction: str = "mean"  # a document's loss is the mean or the sum of its targets' losses
    taps: bool = True  # gradients by taps where the model has them; false: plainly, all tensors
    fit_documents: int = 256  # the first of those scored, for estimators that are fitted
    chunk: int = 2  # rows worked on at once; memory follows it


@dataclass
class QueryConfig:
    """Whose loss is explained."""

    probes: list[str] = field(default_factory=list)  # by name; empty: all of the data config's
    documents: int = 16  # of each probe
    average: bool = True  # a probe is one query, its mean; false: every document is a query
    texts: list[str] = field(default_factory=list)  # of one's own; each is a query
    low_rank: int | None = None  # keep a query's kernels to this rank; null: whole


@dataclass
class AttributionConfig:
    """Everything one influence run is made from."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    queries: QueryConfig = field(default_factory=QueryConfig)
    run: str | None = None  # a run's folder: its model config, and the newest checkpoint's weights
    documents: int = 512  # scored, drawn from the training split by the mixture's weights
    batch_size: int = 8  # rows scored at once, and of one shard on disk
    self_influence: bool = False  # also of each document on itself; costs about as much again
    top: int = 10  # documents shown at each end
    tinted: int = 2  # of them, whose tokens are tinted; each costs about as much as a score
    memory_limit: float | None = None  # GiB; null: none
    seed: int = 0
    out: str = "runs/influence"


def check(config: AttributionConfig) -> AttributionConfig:
    """The config with its data typed and its model's shape known.

    Raises:
        ConfigError: a value lies outside its range; names it, the limit and the cure.
    """
    for label, value, least in (
        ("documents", config.documents, 1), ("batch_size", config.batch_size, 1),
        ("top", config.top, 1), ("tinted", config.tinted, 0),
        ("estimator.chunk", config.estimator.chunk, 1),
        ("estimator.fit_documents", config.estimator.fit_documents, 1),
        ("queries.documents", config.queries.documents, 1),
        ("queries.low_rank", config.queries.low_rank or 1, 1),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"{label} is {value}; the least is {least}")
    limit = config.memory_limit
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise ConfigError(f"memory_limit is {limit}; give GiB above 0, or null for none")
    data = load_data_config(config.data)
    known = list(data.probes or data.sources)
    for name in config.queries.probes:
        if name not in known:
            raise ConfigError(
                f"queries.probes: no probe {name!r}{suggest(name, known)}; known: "
                f"{', '.join(known)}"
            )
    return dataclasses.replace(config, data=data, model=resolve(config.model))
