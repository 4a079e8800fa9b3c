"""Rows of a batch, a chunk at a time, so that memory follows the chunk and not the batch.

Shapes: B rows, N chunks, C rows of a chunk.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch

Tree = TypeVar("Tree")


def steps_of(rows: int, most: int) -> int:
    """N, the fewest chunks of at most ``most`` rows."""
    return -(-rows // most)


def to_chunks(batch: Batch, most: int) -> Batch:
    """Every (B, ...) array as (N, C, ...), C at most ``most``, for `jax.lax.scan`.

    Chunk ``n`` holds rows ``n, n + N, n + 2N, ...``: rows sharded over devices then stay where
    they are, and every device has its share of every chunk. Where C does not divide B the last
    row is repeated with nothing to learn.
    """
    rows = batch.tokens_BT.shape[0]
    chunks: Batch = jax.tree.map(lambda x: in_chunks(x, most), batch)
    steps, size = chunks.tokens_BT.shape[:2]
    row_NC = jnp.arange(steps * size).reshape(size, steps).T  # from `rows` on: repeats
    mask = chunks.loss_mask_BT & (row_NC < rows)[..., None]
    return chunks._replace(loss_mask_BT=mask)


def in_chunks(x: jax.Array, most: int) -> jax.Array:
    """One (B, ...) array as (N, C, ...), in the order of `to_chunks`."""
    x = jnp.asarray(x)
    steps = steps_of(x.shape[0], most)
    size = -(-x.shape[0] // steps)
    extra = steps * size - x.shape[0]
    padded = jnp.concatenate([x, jnp.repeat(x[-1:], extra, axis=0)]) if extra else x
    return padded.reshape(size, steps, *x.shape[1:]).swapaxes(0, 1)


def from_chunks(tree: Tree, rows: int) -> Tree:
    """(N, C, ...) results in the order of the batch's rows, (B, ...): undoes `to_chunks`."""

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:rows]

    joined: Tree = jax.tree.map(join, tree)
    return joined


def chunks_and_keys(batch: Batch, most: int, key: jax.Array) -> tuple[Batch, jax.Array]:
    """What a scan over chunks consumes: the chunks and a key for each, the same every time."""
    chunks = to_chunks(batch, most)
    return chunks, jax.random.split(key, chunks.tokens_BT.shape[0])
