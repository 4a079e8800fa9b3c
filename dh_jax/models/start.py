"""Where a run's model comes from: drawn, or read from a folder; all of it trained, or adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from dh_jax.config import ModelConfig, validate_model
from dh_jax.distributed.mesh import place
from dh_jax.distributed.placement import AnyMesh, placed_shapes
from dh_jax.errors import ConfigError
from dh_jax.functions import round_matrices
from dh_jax.models import decoder, lora, states
from dh_jax.models.decoder import Params
from dh_jax.models.hf_config import SHAPE
from dh_jax.models.pretrained import find_folder, load_pretrained, read_config

if TYPE_CHECKING:
    from dh_jax.functions import HiddenFn, LossFn, StatesFn


class Started(NamedTuple):
    """A model at the beginning of a run."""

    params: Params  # what is trained: everything, or the adapters
    loss_fn: LossFn  # of these params; carries the frozen base beside adapters
    hidden_fn: HiddenFn | None = None  # of these params, too; None in what is only priced
    states_fn: Callable[[Mapping[str, int]], StatesFn] | None = None  # the same


def resolve(config: ModelConfig) -> ModelConfig:
    """A model config that says its shape, also where it starts from a folder.

    Raises:
        ConfigError: the config describes no decoder, there is no such folder, or a size is
            given that contradicts it.
    """
    validate_model(config)
    if config.pretrained is None:
        return config
    if not config.pretrained:
        raise ConfigError("model.pretrained is empty; give a Hugging Face folder or a hub name")
    found = read_config(find_folder(config.pretrained), config)
    plain = ModelConfig()
    for name in SHAPE:
        given = getattr(config, name)
        if given not in (getattr(plain, name), getattr(found, name)):
            raise ConfigError(
                f"model.{name} is {given!r}, but {config.pretrained} has "
                f"{getattr(found, name)!r}; take model=pretrained, which leaves the shape out"
            )
    validate_model(found)
    return found


def start(
    config: ModelConfig,
    vocab_size: int,
    key: jax.Array,
    shardings: Callable[[Params], Params] | None = None,
    chunk: int | None = None,
) -> Started:
    """The model that a run begins with.

    Args:
        config: from `resolve`.
        vocab_size: of the tokenizer; a model without ``vocab_size`` takes it.
        key: draws what is not read.
        shardings: from shapes of parameters to their places; None: the default device.
        chunk: as in `decoder.loss_fn`.

    Raises:
        ConfigError: the model's vocabulary is smaller than the tokenizer's, or as
            `load_pretrained` and `lora.adapt`.
    """
    rows = config.vocab_size or vocab_size
    if rows < vocab_size:
        raise ConfigError(
            f"model.vocab_size {rows} is below the tokenizer's {vocab_size}; "
            "set model.vocab_size=null to take the tokenizer's"
        )
    if config.pretrained is not None:
        graph, params, _, _ = load_pretrained(config.pretrained, config, shardings=shardings)
    else:
        graph, params = decoder.build(config, rows, key, shardings)
    if not config.lora.rank:
        return Started(
            params, decoder.loss_fn(graph, chunk), decoder.hidden_fn(graph),
            partial(states.states_fn, graph),
        )  # fmt: skip
    graph, adapters = lora.adapt(graph, params, config.lora, jax.random.fold_in(key, 1))
    adapters, frozen = _place(adapters, shardings), _freeze(params, config)
    return Started(
        adapters, lora.loss_fn(graph, frozen, chunk), lora.hidden_fn(graph, frozen),
        partial(lora.states_fn, graph, frozen),
    )  # fmt: skip


def abstract_start(
    config: ModelConfig,
    vocab_size: int,
    mesh: AnyMesh,
    chunk: int | None = None,
) -> Started:
    """`start` with shapes on a mesh for arrays: reads no weights, draws nothing."""
    rows = config.vocab_size or vocab_size
    graph, params = decoder.abstract_graph(config, rows), decoder.abstract_params(config, rows)
    if not config.lora.rank:
        return Started(placed_shapes(params, mesh), decoder.loss_fn(graph, chunk))

    def adapt(params: Params, key: jax.Array) -> Params:
        nonlocal graph
        graph, adapters = lora.adapt(graph, params, config.lora, key)
        return adapters

    adapters = jax.eval_shape(adapt, params, jax.random.key(0))
    frozen = jax.eval_shape(lambda params: _freeze(params, config), params)
    frozen, adapters = placed_shapes(frozen, mesh), placed_shapes(adapters, mesh)
    return Started(adapters, lora.loss_fn(graph, frozen, chunk))


def _freeze(params: Params, config: ModelConfig) -> Params:
    """Kernels are rounded to the activations' type where they are used; frozen ones stay so."""
    return round_matrices(params, config.dtype)


def _place(params: Params, shardings: Callable[[Params], Params] | None) -> Any:
    return params if shardings is None else place(params, shardings(params))
