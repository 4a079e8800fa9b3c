"""From a config to what is measured: parameters, objective, estimator.

A tied table is met twice, and its use as the head is never tapped, so by taps it would be scored
by half: it is left out and counted as missing in the coverage.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from dh_jax.attribution.config import AttributionConfig, EstimatorConfig
from dh_jax.config import ModelConfig, suggest
from dh_jax.distributed.checkpoint import read_arrays
from dh_jax.errors import ConfigError
from dh_jax.functions import Params
from dh_jax.influence.ekfac import ekfac
from dh_jax.influence.empirical_fisher import datainf, woodbury
from dh_jax.influence.estimator import Estimator
from dh_jax.influence.first_order import gradient_cosine, gradient_dot
from dh_jax.influence.iterative import conjugate_gradient, lissa, low_rank
from dh_jax.influence.newton import newton_step
from dh_jax.influence.objective import Objective, Scope
from dh_jax.influence.projection import projection
from dh_jax.models import decoder
from dh_jax.models.start import start
from dh_jax.models.tapped import tapped_layers, tapped_loss_fn, zero_taps
from dh_jax.runconfig import load_config

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "gradient_dot": gradient_dot,
    "gradient_cosine": gradient_cosine,
    "datainf": datainf,
    "woodbury": woodbury,
    "ekfac": ekfac,
    "conjugate_gradient": conjugate_gradient,
    "low_rank": low_rank,
    "lissa": lissa,
    "projection": projection,
    "newton_step": newton_step,
}
FITTED = tuple(name for name in ESTIMATORS if not name.startswith("gradient_"))


class Model(NamedTuple):
    """What is measured, and where it came from in words."""

    params: Params
    objective: Objective
    origin: str


def with_run(config: AttributionConfig) -> AttributionConfig:
    """The config with the model of its ``run``, where it names one.

    Raises:
        DataError: the folder holds no run.
    """
    if config.run is None:
        return config
    return dataclasses.replace(config, model=load_config(Path(config.run)).model)


def open_model(config: AttributionConfig, vocab_size: int) -> Model:
    """Parameters and objective: of a run's newest checkpoint, a folder, or drawn from the seed.

    Raises:
        ConfigError, DataError, StateError: the model cannot be read.
    """
    rows = config.model.vocab_size or vocab_size
    if config.run is not None:
        folder = Path(config.run)
        seed = load_config(folder).training.seed  # of a base that was drawn
        like, loss_fn, *_ = start(config.model, vocab_size, jax.random.key(seed))
        params = read_arrays(folder / "checkpoints", {"params": like})["params"]
        steps = [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
        origin = f"{folder}, step {max(steps)}"
    else:
        params, loss_fn, *_ = start(config.model, vocab_size, jax.random.key(config.seed))
        origin = config.model.pretrained or f"{config.model.name or 'a model'}, drawn, not trained"
    if config.model.lora.rank:  # adapters alone; their base is in the loss
        return Model(params, Objective(loss_fn), origin)
    graph = decoder.abstract_graph(config.model, rows)
    objective = Objective(loss_fn, decoder.logits_fn(graph))
    if config.estimator.taps and config.model.linear == "dense":
        objective = tapped_objective(objective, config.model, graph, params)
    return Model(params, objective, origin)


def tapped_objective(
    objective: Objective, model: ModelConfig, graph: decoder.Graph, params: Params
) -> Objective:
    """The objective with all taps that say the whole gradient of their tensor."""
    layers = tapped_layers(graph, params)
    if model.tied:
        layers = {name: layer for name, layer in layers.items() if layer.kind != "embedding"}
    return objective._replace(
        tapped=tapped_loss_fn(graph),
        layers=layers,
        zero_taps=lambda params, batch: zero_taps(graph, params, batch),
    )


def make_estimator(config: EstimatorConfig, objective: Objective, max_segments: int) -> Estimator:
    """The estimator that a config names.

    Raises:
        ConfigError: there is no such estimator or argument, or it refuses its arguments.
    """
    if config.name not in ESTIMATORS:
        raise ConfigError(
            f"estimator.name: no estimator {config.name!r}"
            f"{suggest(config.name, list(ESTIMATORS))}; known: {', '.join(ESTIMATORS)}"
        )
    make = ESTIMATORS[config.name]
    known = [
        name
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "preconditioner"
    ]
    for name in config.arguments:
        if name not in known:
            raise ConfigError(
                f"estimator.arguments: {config.name} has no argument {name!r}"
                f"{suggest(name, known)}; it has {', '.join(known) or 'none'}"
            )
    scope = Scope(config.parameters, max_segments, config.reduction, config.chunk)  # type: ignore[arg-type]
    return make(objective, scope, **config.arguments)
