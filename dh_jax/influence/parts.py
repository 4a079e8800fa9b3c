"""A parameter tensor's share in every document's gradient, kept factored.

Shapes: B rows, T tokens, S documents of a row, K vectors, U uses of a tensor (one, unless layers
share it), I inputs, O outputs, D width, V ids. A scanned tensor, and all of its arrays, begin
with an axis of layers; every function here takes both.

What a tap gives for a token is enough to know its gradient: the outer product of activation and
cotangent for a kernel, the cotangent in the row of its id for a table, a vector for a bias or a
scale. No document's gradient of all tensors ever exists, and of one kernel only a few at a time.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch
from dh_jax.influence.documents import document_sums, spread
from dh_jax.influence.sketch import Sketch, places, project
from dh_jax.influence.thin import Thin
from dh_jax.influence.tiles import map_documents


class Outer(NamedTuple):
    """A kernel ``[I, O]``: each token adds ``activation cotangent'``."""

    activation_BTUI: jax.Array
    cotangent_BTUO: jax.Array


class Lookup(NamedTuple):
    """A table ``[V, D]``: each token adds its cotangent to the row of its id."""

    ids_BTU: jax.Array
    cotangent_BTUD: jax.Array


class Total(NamedTuple):
    """A bias or scale ``[D]``: each token adds its value."""

    value_BTD: jax.Array


Part: TypeAlias = Outer | Lookup | Total
Parts: TypeAlias = dict[str, Part]  # by path of the parameter tensor


def is_scanned(part: Part) -> bool:
    """Whether there is a leading axis of layers."""
    return part[-1].ndim > (3 if isinstance(part, Total) else 4)


def products(part: Part, vectors: jax.Array | Thin, batch: Batch, max_segments: int) -> jax.Array:
    """(B, S, K) ``<v_k, g_d>`` for vectors ``(K, *shape)``, or kernels' thin factors."""
    if is_scanned(part):
        each = jax.vmap(lambda p, v: products(p, v, batch, max_segments), in_axes=(0, 1))
        return each(part, vectors).sum(axis=0)
    if isinstance(vectors, Thin):
        assert isinstance(part, Outer)  # `PerDocument.kernels` are no others
        met = _einsum("btui,kir->kbtur", part.activation_BTUI, vectors.left_KIr)
        pulled = _einsum("btuo,kro->kbtur", part.cotangent_BTUO, vectors.right_KrO)
        slopes_KBT = (met * pulled).sum(axis=(-2, -1))
        return jnp.moveaxis(document_sums(slopes_KBT, batch, max_segments), 0, -1)
    if isinstance(part, Outer):
        return _kernel_products(part, vectors, batch, max_segments)
    if isinstance(part, Lookup):
        rows_KBTUD = vectors[:, part.ids_BTU]
        slopes_KBT = _einsum("kbtud,btud->kbt", rows_KBTUD, part.cotangent_BTUD)
    else:
        slopes_KBT = _einsum("kd,btd->kbt", vectors, part.value_BTD)
    return jnp.moveaxis(document_sums(slopes_KBT, batch, max_segments), 0, -1)


def squares(part: Part, batch: Batch, max_segments: int) -> jax.Array:
    """(B, S) ``|g_d|^2``."""
    if is_scanned(part):
        return jax.vmap(lambda p: squares(p, batch, max_segments))(part).sum(axis=0)
    if isinstance(part, Outer):
        return map_documents(
            *part, batch.segment_ids_BT, max_segments, lambda g: jnp.square(g).sum(axis=(1, 2))
        )
    if isinstance(part, Lookup):
        rows_BTUD, first_BTU = gather_equal_ids(part, batch)
        squares_BT = (jnp.square(rows_BTUD).sum(axis=-1) * first_BTU).sum(axis=-1)
        return document_sums(squares_BT, batch, max_segments)
    return jnp.square(_vectors(part, batch, max_segments)).sum(axis=-1)


def combine(part: Part, weights_KBS: jax.Array, batch: Batch, shape: tuple[int, ...]) -> jax.Array:
    """(K, *shape) ``sum_d c_kd g_d``; ``shape`` is the tensor's."""
    if is_scanned(part):
        each = jax.vmap(lambda p: combine(p, weights_KBS, batch, shape[1:]), out_axes=1)
        return each(part)

    def one(weights_BS: jax.Array) -> jax.Array:
        weights_BT = spread(weights_BS, batch)
        if isinstance(part, Outer):
            weighted = part.cotangent_BTUO * weights_BT[..., None, None]
            return _einsum("btui,btuo->io", part.activation_BTUI, weighted)
        if isinstance(part, Lookup):
            weighted = part.cotangent_BTUD * weights_BT[..., None, None]
            return jnp.zeros(shape, weighted.dtype).at[part.ids_BTU].add(weighted)
        return _einsum("bt,btd->d", weights_BT, part.value_BTD)

    return jax.lax.map(one, weights_KBS) if len(weights_KBS) > 1 else one(weights_KBS[0])[None]


def gradients(part: Part, batch: Batch, max_segments: int, shape: tuple[int, ...]) -> jax.Array:
    """(B, S, *shape) every document's gradient itself."""
    if is_scanned(part):
        each = jax.vmap(lambda p: gradients(p, batch, max_segments, shape[1:]), out_axes=2)
        return each(part)
    if isinstance(part, Outer):
        return map_documents(*part, batch.segment_ids_BT, max_segments, lambda g: g)
    if isinstance(part, Lookup):
        B = len(part.ids_BTU)
        document_BT = jnp.where(batch.segment_ids_BT > 0, batch.segment_ids_BT - 1, max_segments)
        start = jnp.zeros((B, max_segments, *shape), part.cotangent_BTUD.dtype)
        place = (jnp.arange(B)[:, None, None], document_BT[..., None], part.ids_BTU)
        return start.at[place].add(part.cotangent_BTUD, mode="drop")
    return _vectors(part, batch, max_segments)


def sketched(
    part: Part,
    sketch: Sketch,
    path: str,
    batch: Batch,
    max_segments: int,
    shape: tuple[int, ...],
    offset: int | jax.Array = 0,
) -> jax.Array:
    """(B, S, k) the sketch of every document's gradient; see `dh_jax.influence.sketch`."""
    if is_scanned(part):
        offsets_L = jnp.arange(shape[0], dtype=jnp.uint32) * math.prod(shape[1:])
        each = jax.vmap(lambda p, o: sketched(p, sketch, path, batch, max_segments, shape[1:], o))
        return each(part, offsets_L).sum(axis=0)
    if isinstance(part, Outer):
        return map_documents(
            *part, batch.segment_ids_BT, max_segments, lambda g: project(sketch, path, g, offset)
        )
    if isinstance(part, Lookup):  # linear in the tokens, so each is put in its places alone
        D = shape[-1]
        index = part.ids_BTU[..., None].astype(jnp.uint32) * D + jnp.arange(D, dtype=jnp.uint32)
        place, sign = places(sketch, path, index + jnp.asarray(offset, jnp.uint32))
        document_BT = jnp.where(batch.segment_ids_BT > 0, batch.segment_ids_BT - 1, max_segments)
        B = len(part.ids_BTU)
        row = jnp.arange(B)[:, None, None, None]
        start = jnp.zeros((B, max_segments, sketch.size), part.cotangent_BTUD.dtype)
        values = part.cotangent_BTUD * sign.astype(start.dtype)
        return start.at[row, document_BT[..., None, None], place].add(values, mode="drop")
    whole = _vectors(part, batch, max_segments)
    flat = project(sketch, path, whole.reshape(-1, whole.shape[-1]), offset)
    return flat.reshape(*whole.shape[:2], -1)


def gather_equal_ids(part: Lookup, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What each token's id gathers over its document, and which token is the first of its id.

    Returns:
        (B, T, U, D) sums of the cotangents of equal ids of the same document, and (B, T, U) bool,
        True once for every id of a document: these rows are its whole gradient.
    """
    B, T, U = part.ids_BTU.shape
    D = part.cotangent_BTUD.shape[-1]
    ids_BN = part.ids_BTU.reshape(B, T * U)
    document_BN = jnp.repeat(batch.segment_ids_BT, U, axis=1)
    same_BNN = (ids_BN[:, :, None] == ids_BN[:, None, :]) & (
        document_BN[:, :, None] == document_BN[:, None, :]
    )
    flat_BND = part.cotangent_BTUD.reshape(B, T * U, D)
    rows_BND = _einsum("bnm,bmd->bnd", same_BNN.astype(flat_BND.dtype), flat_BND)
    first_BN = (jnp.argmax(same_BNN, axis=-1) == jnp.arange(T * U)) & (document_BN > 0)
    return rows_BND.reshape(B, T, U, D), first_BN.reshape(B, T, U)


def _kernel_products(part: Outer, vectors: jax.Array, batch: Batch, max_segments: int) -> jax.Array:
    """By tokens or by documents, whichever takes fewer multiplications."""
    T, S, K = part.activation_BTUI.shape[1], max_segments, len(vectors)
    I, O = vectors.shape[1:]  # noqa: E741
    by_tokens = K * T * min(I, O) * max(I, O)
    by_documents = (2 if S > 1 else 1) * (T + K * S) * I * O
    if by_tokens < by_documents:
        met_KBTUO = _einsum("btui,kio->kbtuo", part.activation_BTUI, vectors)
        slopes_KBT = _einsum("kbtuo,btuo->kbt", met_KBTUO, part.cotangent_BTUO)
        return jnp.moveaxis(document_sums(slopes_KBT, batch, S), 0, -1)
    return map_documents(
        *part, batch.segment_ids_BT, S, lambda g: _einsum("bio,kio->bk", g, vectors)
    )


def _vectors(part: Total, batch: Batch, max_segments: int) -> jax.Array:
    """(B, S, D) sums by document."""
    by_width = jnp.moveaxis(part.value_BTD, -1, 0)
    return jnp.moveaxis(document_sums(by_width, batch, max_segments), 0, -1)


def _einsum(formula: str, *operands: jax.Array) -> jax.Array:
    """In full precision on every device: TPUs and newer GPUs round operands otherwise."""
    return jnp.einsum(formula, *operands, precision="highest")
