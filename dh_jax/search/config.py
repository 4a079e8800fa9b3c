"""What a search for weights is made from: a proxy run's config, and how to search."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from dh_jax.config import RunConfig, load_data_config, one_of, weights_of
from dh_jax.errors import ConfigError
from dh_jax.influence.optimizer import resolve_targets
from dh_jax.runconfig import check_training

METHODS = ("regmix", "doremi")


@dataclass
class SearchConfig:
    """How weights are searched for."""

    method: str = "regmix"  # or doremi
    proxies: int = 32  # mixtures that are trained on (regmix)
    candidates: int = 100_000  # mixtures that the fit is asked about (regmix)
    top: int = 100  # of them, whose mean is the answer (regmix)
    rounds: int = 1  # of reference and proxy (doremi)
    learning_rate: float = 1.0  # log-weight for one nat of excess loss (doremi)
    exploration: float = 1e-3  # weight given to all sources alike (doremi)
    processes: int | None = None  # proxies trained at a time; None: one a core
    confirm: bool = True  # train two more, on the answer and on the configured weights


@dataclass
class SearchRunConfig(RunConfig):
    """Everything a search is made from; model and training are those of each proxy."""

    search: SearchConfig = field(default_factory=SearchConfig)


def check_search(config: SearchRunConfig) -> SearchRunConfig:
    """Refuse what cannot be searched; returns the config with its data config typed.

    Raises:
        ConfigError: names the key, its value and the limit.
    """
    check_training(config.training)
    search = config.search
    one_of("search.method", search.method, METHODS)
    for label, value, least in (
        ("proxies", search.proxies, 3),  # a regression wants three
        ("top", search.top, 1),
        ("candidates", search.candidates, search.top + 1),
        ("rounds", search.rounds, 1),
        ("processes", 1 if search.processes is None else search.processes, 1),
    ):
        if value < least:
            raise ConfigError(f"search.{label} is {value}; the least is {least}")
    if config.mesh.coordinator or (config.mesh.processes or 1) > 1:
        raise ConfigError(
            "mesh.coordinator and mesh.processes make one run of several processes, but a proxy "
            "is a run of one; set search.processes for the number of proxies at a time"
        )
    data = load_data_config(config.data)
    if len(weights_of(data.sources)) < 2:
        raise ConfigError(f"data config {data.name!r} has one source; a mixture needs two or more")
    resolve_targets(config.influence.targets, list(data.probes or data.sources))
    return dataclasses.replace(config, data=data)
