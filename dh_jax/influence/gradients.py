"""Gradients of rows and documents with respect to a named part of the parameters.

Shapes: B rows, T tokens, S segments of a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError
from dh_jax.functions import LossFn, Params
from dh_jax.influence.chunks import chunks_and_keys

Blocks = dict[str, jax.Array]  # one array for each parameter tensor, by "/"-joined path


class Selection(NamedTuple):
    """A named part of the parameters, and the way back to the whole."""

    blocks: Blocks
    merge: Callable[[Blocks], Params]  # the whole, with these blocks in their places
    coverage: float  # selected entries / all trainable (floating-point) entries


def select(params: Params, pattern: str = ".*") -> Selection:
    """The parameter tensors whose path matches a regular expression, anywhere in the path.

    Args:
        params: any pytree of arrays; leaves that are not floating-point are never selected.
        pattern: searched for (``re.search``) in paths such as ``layers/0/mlp/up/kernel``.

    Raises:
        ConfigError: the pattern is not a regular expression, or matches no parameter.
    """
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise ConfigError(f"parameters {pattern!r} is no regular expression: {error}") from error
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    leaves = [leaf for _, leaf in paths]
    trainable = {
        name: leaf
        for name, leaf in zip(names, leaves, strict=True)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    blocks = {name: leaf for name, leaf in trainable.items() if search(name)}
    if not blocks:
        raise ConfigError(
            f"parameters {pattern!r} matches none of {len(trainable)} parameter tensors, "
            f"for example {', '.join(list(trainable)[:4]) or 'none'}"
        )

    def merge(blocks: Blocks) -> Params:
        mixed = [blocks.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
        return jax.tree_util.tree_unflatten(treedef, mixed)

    covered = sum(leaf.size for leaf in blocks.values())
    return Selection(blocks, merge, covered / sum(leaf.size for leaf in trainable.values()))


# --- reductions ------------------------------------------------------------------------------


def valid_rows(batch: Batch) -> jax.Array:
    """(B,) bool: rows with at least one target to learn; the others have no gradient."""
    return jnp.any(batch.loss_mask_BT, axis=1)


def row_means(values_BT: jax.Array, batch: Batch) -> jax.Array:
    """(B,) mean over each row's valid targets; 0 for a row without any."""
    total_B = jnp.where(batch.loss_mask_BT, values_BT, 0).sum(axis=1)
    return total_B / batch.loss_mask_BT.sum(axis=1).clip(min=1)


def document_totals(values_BT: jax.Array, batch: Batch, max_segments: int) -> jax.Array:
    """(B, S) sums by document in which a NaN stays in its document.

    In `documents.document_sums`, a matrix product and faster, 0 x NaN spreads it over the row.
    """

    def sums(values_T: jax.Array, ids_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values_T, ids_T, max_segments + 1)[1:]

    return jax.vmap(sums)(values_BT, batch.segment_ids_BT)


def segment_means(values_BT: jax.Array, batch: Batch, max_segments: int) -> jax.Array:
    """(B, S) mean over the valid targets of each segment; 0 where there is none.

    Entry ``[b, s]`` is segment ``s + 1`` of row ``b``.
    """
    masked_BT = jnp.where(batch.loss_mask_BT, values_BT, 0)
    total_BS = document_totals(masked_BT, batch, max_segments)
    count_BS = document_totals(batch.loss_mask_BT.astype(jnp.int32), batch, max_segments)
    return total_BS / count_BS.clip(min=1)


# --- gradients -------------------------------------------------------------------------------


def row_gradients(loss_fn: LossFn, selection: Selection, batch: Batch, key: jax.Array) -> Blocks:
    """(B, *shape) for each block: the gradient of every row's mean loss, all rows at once."""

    def loss(blocks: Blocks, row: Batch, row_key: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda x: x[None], row)
        return row_means(loss_fn(selection.merge(blocks), one, row_key), one)[0]

    keys_B = jax.random.split(key, batch.tokens_BT.shape[0])
    return jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(selection.blocks, batch, keys_B)


def mean_gradient(
    loss_fn: LossFn, selection: Selection, batch: Batch, key: jax.Array, chunk: int
) -> Blocks:
    """Gradient of the mean, over rows that have a valid target, of each row's mean loss.

    Every row counts the same however many targets it has. Float32 or wider.
    """

    def loss(blocks: Blocks, rows: Batch, chunk_key: jax.Array) -> jax.Array:
        return row_means(loss_fn(selection.merge(blocks), rows, chunk_key), rows).sum()

    def add(total: Blocks, xs: tuple[Batch, jax.Array]) -> tuple[Blocks, None]:
        gradient = jax.grad(loss)(selection.blocks, *xs)
        return jax.tree.map(lambda t, g: t + g, total, gradient), None

    start = zeros_wide(selection.blocks)
    total, _ = jax.lax.scan(add, start, chunks_and_keys(batch, chunk, key))
    count = valid_rows(batch).sum().clip(min=1)
    return jax.tree.map(lambda t: t / count, total)


def along(
    loss_fn: LossFn, selection: Selection, direction: Blocks, batch: Batch, key: jax.Array
) -> jax.Array:
    """(B, T) ``<direction, gradient of each target's loss>`` by one forward-mode pass.

    Any mean of these over targets is the inner product with the gradient of the same mean: of a
    row, of a document in a packed row, even of a token. No gradient is ever formed. The loss must
    have a forward derivative, which a function with only a ``custom_vjp`` has not.
    """
    tangent = jax.tree.map(lambda d, p: d.astype(p.dtype), direction, selection.blocks)
    _, tangent_BT = jax.jvp(
        lambda blocks: loss_fn(selection.merge(blocks), batch, key),
        (selection.blocks,),
        (tangent,),
    )
    return tangent_BT


def wide(blocks: Blocks) -> jnp.dtype:
    """The type to compute in: the widest of the blocks, at least float32."""
    return jnp.result_type(jnp.float32, *(block.dtype for block in blocks.values()))


def zeros_wide(blocks: Blocks) -> Blocks:
    """Zeros to accumulate in: as the blocks, but at least float32."""
    return {
        name: jnp.zeros(block.shape, jnp.promote_types(block.dtype, jnp.float32))
        for name, block in blocks.items()
    }
