"""A decoder's loss seen through its layers: taps, activations and what they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from dh_jax.config import suggest
from dh_jax.errors import ConfigError
from dh_jax.functions import TappedLayer
from dh_jax.models.decoder import Graph, Params, loss_of
from dh_jax.models.layers import Linear, RMSNorm
from dh_jax.models.taps import Tape

if TYPE_CHECKING:
    from dh_jax.batch import Batch
    from dh_jax.functions import TappedLossFn

Array: TypeAlias = jax.Array


def tapped_loss_fn(graph: Graph, chunk: int | None = None) -> TappedLossFn:
    """`loss_fn` with taps: ``(params, taps, batch, key) -> (loss_BT, activations)``.

    Args:
        graph: from `build`.
        chunk: as in `loss_fn`.

    Returns:
        See `TappedLossFn`. ``taps`` come from `zero_taps`; those of a subset tap that subset.
        Under rematerialisation activations are results, hence kept whatever the policy.
    """

    def loss(
        params: Params, taps: dict[str, Array], batch: Batch, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        del key  # nothing is drawn at random
        tape = Tape(taps)
        loss_BT = loss_of(nnx.merge(graph, params), batch, chunk, tape)
        return loss_BT, tape.kept

    return loss


def tapped_layers(graph: Graph, params: Params) -> dict[str, TappedLayer]:
    """Every operation that can be tapped, by name; the head's cannot (see `TappedLossFn`).

    Args:
        graph: from `build`.
        params: arrays or their shapes (`abstract_params`).
    """
    model: Any = nnx.merge(graph, params)
    layers = model.count if model.scanned else None
    found: dict[str, TappedLayer] = {}
    for path, module in nnx.iter_modules(model):
        name = "/".join(map(str, path))
        stacked = layers if path[:1] == ("layers",) else None
        if isinstance(module, RMSNorm):
            found[name] = TappedLayer("norm", f"{name}/scale", None, stacked)
        elif isinstance(module, nnx.Embed):
            found[name] = TappedLayer("embedding", f"{name}/embedding", None, stacked)
        elif isinstance(module, Linear) and module is not model.head:
            bias = f"{name}/bias" if module.has_bias else None
            found[name] = TappedLayer("linear", f"{name}/kernel", bias, stacked)
            if module.lora_scale:
                for low in ("lora_a", "lora_b"):
                    found[f"{name}/{low}"] = TappedLayer("linear", f"{name}/{low}", None, stacked)
    return found


def zero_taps(
    graph: Graph, params: Params, batch: Batch, names: Iterable[str] | None = None
) -> dict[str, Array]:
    """Taps for `tapped_loss_fn`: zeros in the shape of every operation's output.

    Args:
        graph: from `build`.
        params: arrays or their shapes.
        batch: arrays or their shapes; only the shape of its rows matters.
        names: which to tap; None: all of `tapped_layers`.

    Raises:
        ConfigError: no operation has such a name.
    """

    def outputs(params: Params, batch: Batch) -> dict[str, Array]:
        tape, model = Tape(measuring=True), nnx.merge(graph, params)
        model(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, tape)
        return tape.kept

    shapes = jax.eval_shape(outputs, params, batch)
    wanted = shapes if names is None else list(names)
    if unknown := [name for name in wanted if name not in shapes]:
        raise ConfigError(
            f"no operation {unknown[0]!r} to tap{suggest(unknown[0], list(shapes))}; "
            "models.tapped.tapped_layers lists them"
        )
    return {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in wanted}
