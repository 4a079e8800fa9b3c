"""Gradients of the documents in packed rows, by plain differentiation of any loss.

Shapes: B rows, T tokens, S segments ("documents") of a row, K vectors. Entry ``[b, s]`` belongs
to segment ``s + 1`` of row ``b``. `document_gradients` is the exact reference; it holds B x S
gradients at once. What only needs inner products or weighted sums of them never forms one:

- ``<v, g_d>`` for every document is one forward-mode pass, summed by segments;
- ``sum_d c_d g_d`` is one reverse-mode pass with ``c`` as the cotangent of the losses.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dh_jax.batch import Batch
from dh_jax.functions import LossFn
from dh_jax.influence.gradients import Blocks, Selection, along, document_totals, wide

Reduction = Literal["sum", "mean"]


def document_sums(values_BT: jax.Array, batch: Batch, max_segments: int) -> jax.Array:
    """(..., B, S) sums over the tokens of each document; axes before B are carried along."""
    segments_BTS = jax.nn.one_hot(
        batch.segment_ids_BT - 1, max_segments, dtype=values_BT.dtype
    )  # padding, segment 0, is -1 and so all zeros
    return jnp.einsum("...bt,bts->...bs", values_BT, segments_BTS, precision="highest")


def target_counts(batch: Batch, max_segments: int) -> jax.Array:
    """(B, S) int32, valid targets of each document; 0 where there is no such document."""
    return document_totals(batch.loss_mask_BT.astype(jnp.int32), batch, max_segments)


def spread(values_BS: jax.Array, batch: Batch) -> jax.Array:
    """(B, T) each document's value at each of its tokens; 0 at padding."""
    padded = jnp.pad(values_BS, ((0, 0), (1, 0)))  # segment 0
    return jnp.take_along_axis(padded, batch.segment_ids_BT, axis=1)


def target_weights(
    batch: Batch, max_segments: int, reduction: Reduction, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """(B, T) weight of each target's loss in its document's loss; 0 where masked."""
    mask_BT = batch.loss_mask_BT.astype(dtype)
    if reduction == "sum":
        return mask_BT
    counts_BS = target_counts(batch, max_segments).clip(min=1).astype(dtype)
    return mask_BT * spread(1 / counts_BS, batch)


def document_gradients(
    loss_fn: LossFn,
    selection: Selection,
    batch: Batch,
    key: jax.Array,
    max_segments: int = 1,
    reduction: Reduction = "sum",
) -> Blocks:
    """(B, S, *shape) for each block: the gradient of every document's loss.

    Args:
        loss_fn: any loss in which documents of a row do not meet.
        selection: of the parameters, see `gradients.select`.
        batch: packed rows.
        key: random key, as the loss may use it.
        max_segments: S; documents beyond are ignored, see `objective.checked`.
        reduction: a document's loss is the sum or the mean over its valid targets.

    Returns:
        Gradients; 0 for a document without a target.
    """
    weights_BT = target_weights(batch, max_segments, reduction, wide(selection.blocks))

    def of_row(row: Batch, row_key: jax.Array, weights_T: jax.Array) -> Blocks:
        one = jax.tree.map(lambda x: x[None], row)

        def losses(blocks: Blocks) -> jax.Array:
            return loss_fn(selection.merge(blocks), one, row_key)[0]

        loss_T, pull = jax.vjp(losses, selection.blocks)
        own_ST = row.segment_ids_BT[None] == jnp.arange(1, max_segments + 1)[:, None]
        cotangents_ST = jnp.where(own_ST, weights_T, 0).astype(loss_T.dtype)
        gradients: Blocks = jax.vmap(lambda c: pull(c)[0])(cotangents_ST)
        return gradients

    keys_B = jax.random.split(key, batch.tokens_BT.shape[0])
    return jax.vmap(of_row)(batch, keys_B, weights_BT)


def document_products(
    loss_fn: LossFn,
    selection: Selection,
    vectors: Blocks,
    batch: Batch,
    key: jax.Array,
    max_segments: int = 1,
    reduction: Reduction = "sum",
) -> jax.Array:
    """(K, B, S) ``<v_k, g_d>`` for K stacked vectors, by K forward-mode passes over one primal."""
    weights_BT = target_weights(batch, max_segments, reduction, wide(selection.blocks))

    def one(vector: Blocks) -> jax.Array:
        return along(loss_fn, selection, vector, batch, key)

    slopes_KBT = jax.vmap(one)(vectors)
    return document_sums(slopes_KBT * weights_BT, batch, max_segments)


def combine(
    loss_fn: LossFn,
    selection: Selection,
    weights_BS: jax.Array,
    batch: Batch,
    key: jax.Array,
    reduction: Reduction = "sum",
) -> Blocks:
    """``sum_d c_d g_d`` over the documents of a batch, by one reverse-mode pass."""
    max_segments = weights_BS.shape[1]
    targets_BT = target_weights(batch, max_segments, reduction, wide(selection.blocks))

    def losses(blocks: Blocks) -> jax.Array:
        return loss_fn(selection.merge(blocks), batch, key)

    loss_BT, pull = jax.vjp(losses, selection.blocks)
    (total,) = pull((targets_BT * spread(weights_BS, batch)).astype(loss_BT.dtype))
    blocks: Blocks = total
    return blocks
