"""Cross-entropy that never holds a table of all tokens by the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from dh_jax.functions import cross_entropy

Array: TypeAlias = jax.Array


def chunked_cross_entropy(
    logits_of: Callable[[Array], Array], hidden_BTD: Array, targets_BT: Array, chunk: int
) -> Array:
    """Cross-entropy of about ``chunk`` targets at a time.

    Chunks run along T and keep all rows, so rows sharded over devices stay where they are.
    """
    B, T, _ = hidden_BTD.shape
    if chunk >= B * T:
        return cross_entropy(logits_of(hidden_BTD), targets_BT)
    length = max(1, chunk // B)
    count = -(-T // length)

    def split(x_BT: Array) -> Array:  # [count, B, length, ...]
        widths = [(0, 0), (0, count * length - T)] + [(0, 0)] * (x_BT.ndim - 2)
        padded = jnp.pad(x_BT, widths)
        return padded.reshape(B, count, length, *x_BT.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(part: tuple[Array, Array]) -> Array:
        return cross_entropy(logits_of(part[0]), part[1])

    losses = jax.lax.map(one, (split(hidden_BTD), split(targets_BT)))
    return losses.swapaxes(0, 1).reshape(B, count * length)[:, :T]
