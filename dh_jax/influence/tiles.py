"""Gradients of a kernel, one document of a packed row after another, each formed once.

Shapes: B rows, T tokens, S documents of a row, U uses of one kernel, I inputs, O outputs,
N tiles of a row, L tokens of a tile.

The gradient of a kernel for a document is a matrix product over the document's tokens. Document
lengths differ and XLA's shapes do not, so rows are cut into tiles of at most ``L = T / S`` tokens
that never cross a document. A row has at most ``(T + S (L - 1)) / L < 2 S`` of them, so the
products cost at most twice those of the row's own gradient, however documents lie. A scan goes
through the tiles with one ``(B, I, O)`` gradient in its hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")


class Tiles(NamedTuple):
    """Where the tiles of every row begin and end."""

    tokens_NBL: jax.Array  # int32 places in the row; T where the tile is not full
    document_NB: jax.Array  # int32, s; S for tiles that are not there
    first_NB: jax.Array  # bool, begins its document
    last_NB: jax.Array  # bool, ends it


def tiles_of(segment_ids_BT: jax.Array, max_segments: int) -> Tiles:
    """Cut rows into tiles. Segments must be contiguous, as packing makes them."""
    T = segment_ids_BT.shape[1]
    S = max_segments
    L = -(-T // S)
    N = (T + S * (L - 1)) // L

    def of_row(ids_T: jax.Array) -> Tiles:
        lengths_S = jax.ops.segment_sum(jnp.ones(T, jnp.int32), ids_T, S + 1)[1:]
        ends_S = jnp.cumsum(-(-lengths_S // L))
        starts_S = jnp.pad(ends_S, (1, 0))[:-1]
        document_T = (ids_T - 1).clip(0, S - 1)
        first_S = jax.ops.segment_min(jnp.arange(T), ids_T, S + 1)[1:]
        within_T = jnp.arange(T) - first_S[document_T]
        tile_T = jnp.where(ids_T > 0, starts_S[document_T] + within_T // L, N)  # N: no tile
        tokens_NL = jnp.full((N, L), T).at[tile_T, within_T % L].set(jnp.arange(T), mode="drop")
        document_N = jnp.searchsorted(ends_S, jnp.arange(N), side="right").astype(jnp.int32)
        before_N = jnp.pad(document_N, (1, 0), constant_values=-1)[:-1]
        after_N = jnp.pad(document_N, (0, 1), constant_values=S)[1:]
        return Tiles(tokens_NL, document_N, document_N != before_N, document_N != after_N)

    tiles: Tiles = jax.vmap(of_row, out_axes=1)(segment_ids_BT)
    return tiles


def fold_documents(
    activation_BTUI: jax.Array,
    cotangent_BTUO: jax.Array,
    segment_ids_BT: jax.Array,
    max_segments: int,
    step: Callable[[Carry, jax.Array, jax.Array, jax.Array], Carry],
    start: Carry,
) -> Carry:
    """Go through the gradients of all documents of a kernel.

    Args:
        activation_BTUI: what met the kernel.
        cotangent_BTUO: the cotangents of what came out; 0 at padding.
        segment_ids_BT: which document each token is of.
        max_segments: S.
        step: ``(carry, gradient_BIO, document_B, done_B) -> carry``; only where ``done_B`` is
            True is the gradient of document ``document_B`` of the row complete.
        start: the first carry.

    Returns:
        The last carry.
    """
    B = len(activation_BTUI)
    if max_segments == 1:
        gradient_BIO = jnp.einsum(
            "btui,btuo->bio", activation_BTUI, cotangent_BTUO, precision="highest"
        )
        return step(start, gradient_BIO, jnp.zeros(B, jnp.int32), jnp.ones(B, bool))
    a_BTUI = jnp.pad(activation_BTUI, ((0, 0), (0, 1), (0, 0), (0, 0)))  # place T is empty
    d_BTUO = jnp.pad(cotangent_BTUO, ((0, 0), (0, 1), (0, 0), (0, 0)))

    def visit(state: tuple[jax.Array, Carry], tile: Tiles) -> tuple[tuple[jax.Array, Carry], None]:
        gradient_BIO, carry = state
        tokens_BL, document_B, first_B, last_B = tile
        a_BLUI = jnp.take_along_axis(a_BTUI, tokens_BL[..., None, None], axis=1)
        d_BLUO = jnp.take_along_axis(d_BTUO, tokens_BL[..., None, None], axis=1)
        more_BIO = jnp.einsum("blui,bluo->bio", a_BLUI, d_BLUO, precision="highest")
        gradient_BIO = jnp.where(first_B[:, None, None], 0, gradient_BIO) + more_BIO
        done_B = last_B & (document_B < max_segments)
        return (gradient_BIO, step(carry, gradient_BIO, document_B, done_B)), None

    tiles = tiles_of(segment_ids_BT, max_segments)
    empty = jnp.zeros(
        (B, activation_BTUI.shape[-1], cotangent_BTUO.shape[-1]),
        jnp.result_type(activation_BTUI, cotangent_BTUO),
    )
    (_, carry), _ = jax.lax.scan(visit, (empty, start), tiles)
    return carry


def map_documents(
    activation_BTUI: jax.Array,
    cotangent_BTUO: jax.Array,
    segment_ids_BT: jax.Array,
    max_segments: int,
    of_gradient: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """(B, S, ...) ``of_gradient`` (``(B, I, O) -> (B, ...)``) of every document; 0 for none."""
    B = activation_BTUI.shape[0]
    example = jax.eval_shape(
        of_gradient,
        jax.ShapeDtypeStruct(
            (B, activation_BTUI.shape[-1], cotangent_BTUO.shape[-1]),
            jnp.result_type(activation_BTUI, cotangent_BTUO),
        ),
    )
    start = jnp.zeros((B, max_segments, *example.shape[1:]), example.dtype)

    def step(
        out: jax.Array, gradient_BIO: jax.Array, document_B: jax.Array, done_B: jax.Array
    ) -> jax.Array:
        place_B = jnp.where(done_B, document_B, max_segments)  # S: dropped
        return out.at[jnp.arange(B), place_B].set(of_gradient(gradient_BIO), mode="drop")

    return fold_documents(
        activation_BTUI, cotangent_BTUO, segment_ids_BT, max_segments, step, start
    )
