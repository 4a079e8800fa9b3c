"""From a tapped loss to every tensor's `Part`: one forward pass, one backward pass to the taps.

Shapes: B rows, T tokens, S documents of a row. The backward pass stops at the taps, so gradients
of parameters, a third of the work, are never computed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError
from dh_jax.functions import Params, TappedLayer
from dh_jax.influence.documents import target_weights
from dh_jax.influence.gradients import Blocks, document_totals, select
from dh_jax.influence.objective import Objective, Scope
from dh_jax.influence.parts import Lookup, Outer, Part, Parts, Total, combine

KINDS = ("linear", "embedding", "norm")


class Captured(NamedTuple):
    """What one forward and backward pass says of every document."""

    parts: Parts
    health_BS: jax.Array  # not finite where the loss or a cotangent of the document is not


def tapped_paths(objective: Objective, scope: Scope) -> dict[str, TappedLayer]:
    """The tapped layers of which a tensor is selected.

    Raises:
        ConfigError: the objective has no taps, a layer's kind is unknown, or none is selected.
    """
    if objective.tapped is None or objective.layers is None or objective.zero_taps is None:
        raise ConfigError(
            "this estimator needs taps: give Objective tapped, layers and zero_taps, or take an "
            "estimator that works with any loss (datainf, gradient_dot, conjugate_gradient)"
        )
    search = re.compile(scope.parameters).search
    chosen = {}
    for name, layer in objective.layers.items():
        if layer.kind not in KINDS:
            raise ConfigError(f"tapped layer {name!r} is of kind {layer.kind!r}; known: {KINDS}")
        if search(layer.weight) or (layer.bias and search(layer.bias)):
            chosen[name] = layer
    if not chosen:
        raise ConfigError(
            f"parameters {scope.parameters!r} matches no tensor of {len(objective.layers)} tapped "
            f"layers, for example {', '.join([x.weight for x in objective.layers.values()][:4])}"
        )
    return chosen


def exact_pattern(objective: Objective, scope: Scope) -> str:
    """A regular expression of the tapped and selected tensors, and of no others."""
    search = re.compile(scope.parameters).search
    layers = tapped_paths(objective, scope).values()
    paths = {p for x in layers for p in (x.weight, x.bias) if p and search(p)}
    return f"^(?:{'|'.join(map(re.escape, sorted(paths)))})$"


def bias_paths(objective: Objective, scope: Scope) -> dict[str, str]:
    """The kernels whose bias `capture` joins to them, and that bias."""
    search = re.compile(scope.parameters).search
    layers = tapped_paths(objective, scope).values()
    return {x.weight: x.bias for x in layers if x.bias and search(x.weight) and search(x.bias)}


def capture(
    objective: Objective,
    scope: Scope,
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    join_bias: bool = False,
    label_weights: jax.Array | None = None,
) -> Captured:
    """Every selected tensor's part in the gradients of a batch's documents.

    Args:
        objective: with taps.
        scope: which tensors, and what a document's loss is.
        params: all parameters.
        batch: packed rows.
        key: random key, as the loss may use it.
        join_bias: a linear layer's bias becomes a last row of its kernel (its activation is 1),
            as EK-FAC wants it; a part of its own otherwise.
        label_weights: (B, T) factors of the targets' losses, over and above the scope's.
    """
    layers = tapped_paths(objective, scope)
    assert objective.tapped is not None and objective.zero_taps is not None
    tapped = objective.tapped
    every = objective.zero_taps(params, batch)
    taps = {name: every[name].astype(scope.dtype) for name in layers}

    def losses(taps: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return tapped(params, taps, batch, key)

    loss_BT, pull, activations = jax.vjp(losses, taps, has_aux=True)
    weights_BT = target_weights(batch, scope.max_segments, scope.reduction, loss_BT.dtype)
    if label_weights is not None:
        weights_BT = weights_BT * label_weights.astype(loss_BT.dtype)
    (cotangents,) = pull(weights_BT)
    uses: dict[str, list[Part]] = {}
    for name, layer in layers.items():
        parts = _parts_of(layer, activations[name], cotangents[name], scope, join_bias)
        for path, part in parts.items():
            uses.setdefault(path, []).append(part)
    sizes_BT = sum(_size(layers[name], d) for name, d in cotangents.items())
    health_BS = document_totals(loss_BT * weights_BT + sizes_BT, batch, scope.max_segments)
    return Captured({path: _shared(path, parts) for path, parts in uses.items()}, health_BS)


def _parts_of(
    layer: TappedLayer,
    activation: jax.Array,
    cotangent: jax.Array,
    scope: Scope,
    join_bias: bool,
) -> Parts:
    selected = re.compile(scope.parameters).search
    d = cotangent.astype(scope.dtype)
    if layer.kind == "embedding":
        return {layer.weight: Lookup(activation[..., None], d[..., None, :])}
    a = activation.astype(scope.dtype)
    if layer.kind == "norm":
        heads = tuple(range(3 if layer.layers else 2, a.ndim - 1))  # one scale for all heads
        return {layer.weight: Total((a * d).sum(axis=heads))}
    weight = selected(layer.weight) is not None
    bias = layer.bias if layer.bias and selected(layer.bias) else None
    if weight and bias and join_bias:
        a = jnp.concatenate([a, jnp.ones((*a.shape[:-1], 1), a.dtype)], axis=-1)
        bias = None
    parts: Parts = {}
    if weight:
        parts[layer.weight] = Outer(a[..., None, :], d[..., None, :])
    if bias:
        parts[bias] = Total(d)
    return parts


def _shared(path: str, parts: list[Part]) -> Part:
    """One tensor met several times: its uses side by side."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(type(part) is not type(first) for part in parts):
        raise ConfigError(
            f"tensor {path!r} is tapped both as a table and as a kernel; tap one of them only"
        )
    if isinstance(first, Total):
        return Total(sum((part[-1] for part in parts[1:]), first.value_BTD))
    d = jnp.concatenate([part[-1] for part in parts], axis=-2)
    axis = -1 if isinstance(first, Lookup) else -2  # of uses
    return type(first)(jnp.concatenate([part[0] for part in parts], axis=axis), d)


def _size(layer: TappedLayer, cotangent: jax.Array) -> jax.Array:
    """(B, T) squared norm of a layer's cotangents, over all layers of a scanned one."""
    d = cotangent if layer.layers else cotangent[None]
    return jnp.square(d).sum(axis=(0, *range(3, d.ndim)))


# --- are the taps the whole gradient? --------------------------------------------------------


def complete_layers(
    objective: Objective, params: Params, batch: Batch, key: jax.Array, tolerance: float = 0.05
) -> tuple[dict[str, TappedLayer], dict[str, float]]:
    """Compare gradients by taps with plain ones, and keep the layers whose taps say all.

    A tied table is met twice, as embedding and as head, and the head is never tapped: its tapped
    gradient is a part of the truth. Such tensors are better left out, and counted in the
    coverage, than scored by half.

    Args:
        objective: with taps.
        params: all parameters.
        batch: a few rows, typical ones.
        key: random key, as the loss may use it.
        tolerance: relative difference up to which a gradient counts as the same; wide enough for
            bfloat16 models.

    Returns:
        The complete layers, for `Objective.layers`, and the relative difference of every tensor
        that is not.
    """
    wide_open = Scope(max_segments=int(batch.segment_ids_BT.max()))

    @jax.jit
    def difference(params: Params) -> dict[str, jax.Array]:
        selection = select(params)

        def total(blocks: Blocks) -> jax.Array:
            loss_BT = objective.loss(selection.merge(blocks), batch, key)
            return jnp.where(batch.loss_mask_BT, loss_BT, 0).sum()

        plain = jax.grad(total)(selection.blocks)
        ones = jnp.ones((1, batch.tokens_BT.shape[0], wide_open.max_segments))
        parts = capture(objective, wide_open, params, batch, key).parts
        out = {}
        for path, part in parts.items():
            seen = combine(part, ones, batch, plain[path].shape)[0]
            norm = jnp.linalg.norm(plain[path])
            out[path] = jnp.linalg.norm(seen - plain[path]) / jnp.where(norm > 0, norm, 1)
        return out

    wrong = {path: float(x) for path, x in difference(params).items() if not x <= tolerance}
    layers = tapped_paths(objective, wide_open)
    kept = {
        name: layer
        for name, layer in layers.items()
        if layer.weight not in wrong and layer.bias not in wrong
    }
    return kept, wrong


def coverage(objective: Objective, scope: Scope, params: Params) -> float:
    """Tapped and selected entries as a share of all trainable ones.

    Raises:
        ConfigError: a layer names a tensor that the parameters do not have.
    """
    blocks = select(params).blocks
    search = re.compile(scope.parameters).search
    paths = {p for x in tapped_paths(objective, scope).values() for p in (x.weight, x.bias) if p}
    missing = paths - set(blocks)
    if missing:
        raise ConfigError(
            f"tapped layers name {sorted(missing)[0]!r}, which is no parameter; there are "
            f"{', '.join(list(blocks)[:4])}"
        )
    covered = sum(blocks[path].size for path in paths if search(path))
    return covered / sum(block.size for block in blocks.values())
