"""A decoder that shows states of chosen layers beside its hidden states, and keeps no others.

=============  ===================  ===========================================================
state          shape                what it is
=============  ===================  ===========================================================
hidden         ``[B, T, D]``        the residual stream behind the layer
query          ``[B, T, H, h]``     the projection, before norms of heads and rotation
key, value     ``[B, T, K, h]``     the same
rotated_query  ``[B, T, H, h]``     as attention meets it, behind norm and rotation
rotated_key    ``[B, T, K, h]``     the same
=============  ===================  ===========================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from dh_jax.config import suggest
from dh_jax.errors import ConfigError
from dh_jax.models.decoder import Decoder, Graph, Params
from dh_jax.models.taps import Tape

if TYPE_CHECKING:
    from dh_jax.batch import Batch
    from dh_jax.functions import Head, StatesFn

Array: TypeAlias = jax.Array

STATES = ("hidden", "query", "key", "value", "rotated_query", "rotated_key")


def states_fn(graph: Graph, layers: Mapping[str, int]) -> StatesFn:
    """The decoder before its last matrix product, and the states asked for.

    Args:
        graph: from `decoder.build`.
        layers: which layer of each state, from 0, or from -1 backwards: ``{"value": -1}``.

    Returns:
        ``(params, batch) -> (hidden_BTD, head, states)``. One array of a state's shape goes from
        layer to layer, also where layers are scanned; nothing of other layers is held.

    Raises:
        ConfigError: no state has such a name, or the model no such layer (when first called).
    """
    for name in layers:
        if name not in STATES:
            raise ConfigError(
                f"no state {name!r}{suggest(name, list(STATES))}; known: {', '.join(STATES)}"
            )

    def states(params: Params, batch: Batch) -> tuple[Array, Head, dict[str, Array]]:
        model: Decoder = nnx.merge(graph, params)
        wanted = {name: _counted(layer, model.count) for name, layer in layers.items()}
        angles, attend = model.seeing(batch.positions_BT, batch.segment_ids_BT)
        x_BTD = model.embedded(batch.tokens_BT, Tape())

        def one(block: Any, carried: Any, given: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
            x_BTD, found = carried
            tape = Tape()
            x_BTD = block(x_BTD, angles, attend, tape)
            here = {name: given["layer"] == layer for name, layer in wanted.items()}
            found = {name: jnp.where(here[name], tape.shown[name], x) for name, x in found.items()}
            return (x_BTD, found), {}

        numbers = jnp.arange(model.count)
        given = {"layer": numbers}
        if not model.scanned:
            given = {f"{i}/layer": numbers[i] for i in range(model.count)}
        none = {name: jnp.zeros(_shape(model, name, x_BTD), x_BTD.dtype) for name in wanted}
        (x_BTD, found), _ = model.each_layer(one, (x_BTD, none), given)
        return model.final_norm(x_BTD, Tape()), model.unembedding(), found

    return states


def _counted(layer: int, count: int) -> int:
    if not -count <= layer < count:
        raise ConfigError(
            f"layer {layer} of a model of {count} layers; take 0 to {count - 1}, or -1 for the last"
        )
    return layer % count


def _shape(model: Decoder, name: str, x_BTD: Array) -> tuple[int, ...]:
    if name == "hidden":
        return x_BTD.shape
    attention = (model.layers if model.scanned else model.layers["0"]).attention
    heads = attention.heads if name.endswith("query") else attention.kv_heads
    return (*x_BTD.shape[:2], heads, attention.head_width)
