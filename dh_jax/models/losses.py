"""Cross-entropy that never holds a table of all tokens by the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax

from dh_jax.functions import cross_entropy
from dh_jax.unembedding import map_tokens

Array: TypeAlias = jax.Array


def chunked_cross_entropy(
    logits_of: Callable[[Array], Array], hidden_BTD: Array, targets_BT: Array, chunk: int
) -> Array:
    """Cross-entropy of about ``chunk`` targets at a time.

    Chunks run along T and keep all rows, so rows sharded over devices stay where they are.
    """

    def one(part: tuple[Array, Array]) -> Array:
        return cross_entropy(logits_of(part[0]), part[1])

    # In one chunk the table is kept, and nothing is gained by making it twice.
    function = one if chunk >= targets_BT.size else jax.checkpoint(one)
    losses_BT: Array = map_tokens(function, (hidden_BTD, targets_BT), chunk)
    return losses_BT
