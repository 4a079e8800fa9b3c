"""DataInf as pure functions: the influence of training rows and documents on a probe's loss.

Shapes: B rows, T tokens, S segments; i runs over the n fitted examples, l over parameter tensors
("blocks").

DataInf (Kwon et al. 2023, arXiv:2310.00902, section 3) replaces the inverse of each damped Fisher
block by the mean of its terms' inverses, which are known in closed form (Sherman-Morrison)::

    H_l^-1  ~  (1/n) sum_i (lambda_l I + g_il g_il')^-1
            =  (1/lambda_l) (I - (1/n) sum_i g_il g_il' / (lambda_l + |g_il|^2))
    score_k =  - sum_l v_l' H_l^-1 g_kl

with ``v`` the probe's mean gradient and ``lambda_l`` = damping times the mean of ``g_il^2`` over
examples and entries (the paper takes 0.1). A positive score means harmful: more of ``k`` raises
the probe's loss.

The score is linear in ``g_k``. So the inverse is applied once, to the probe (`precondition`)::

    q_l = (1/lambda_l) (v_l - (1/n) sum_i c_il g_il),    c_il = v_l.g_il / (lambda_l + |g_il|^2)

and ``score_k = -<q, g_k>`` follows for every row, or every document of a packed row, from one
forward-mode pass. No gradient of a scored row is ever formed; those of the fitted rows exist a
chunk at a time, unless all of them fit in ``max_bytes``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch
from dh_jax.functions import LossFn, Params
from dh_jax.influence.chunks import chunks_and_keys, from_chunks, steps_of
from dh_jax.influence.gradients import (
    Blocks,
    along,
    mean_gradient,
    row_gradients,
    row_means,
    segment_means,
    select,
    valid_rows,
    zeros_wide,
)


class Settings(NamedTuple):
    """How DataInf is computed; constants of a compiled program."""

    damping: float = 0.1  # lambda of a block / mean squared gradient of its entries
    parameters: str = ".*"  # regular expression over parameter paths
    chunk: int = 8  # rows worked on at once
    max_bytes: int = 1 << 29  # fitted gradients are kept if all of them fit


class Rows(NamedTuple):
    """The fitted rows themselves, for gradients that are computed again rather than kept."""

    params: Params
    batch: Batch
    key: jax.Array


class DataInfState(NamedTuple):
    """What `fit` knows of the training gradients.

    Short-lived: ``rows`` refers to the very arrays that were fitted, so use the state before a
    train step that donates its parameters.
    """

    damping: Blocks  # lambda_l, a scalar each; 0 for a block whose gradients all vanish
    squares_B: Blocks  # |g_il|^2 of each row; 0 for a row without a valid target
    examples: jax.Array  # int32, n: rows with a valid target
    gradients: Blocks | None  # (rows in chunk order, *shape), where they fit in max_bytes
    rows: Rows | None = None  # where they do not


def fit(
    loss_fn: LossFn, settings: Settings, params: Params, batch: Batch, key: jax.Array
) -> DataInfState:
    """Measure the training gradients: one example for each row that has a valid target.

    Where the gradients are not kept, the caller adds ``rows`` to the state: were they returned
    from here, a compiled ``fit`` would copy every parameter.
    """
    selection = select(params, settings.parameters)
    chunks, keys_N = chunks_and_keys(batch, settings.chunk, key)
    padded = chunks.tokens_BT.shape[0] * chunks.tokens_BT.shape[1]
    keep = padded * sum(x.nbytes for x in selection.blocks.values()) <= settings.max_bytes

    def measure(_: None, xs: tuple[Batch, jax.Array]) -> tuple[None, tuple[Blocks, Blocks]]:
        gradients = row_gradients(loss_fn, selection, *xs)
        return None, (jax.tree.map(_squares, gradients), gradients if keep else {})

    _, (squares_NC, kept) = jax.lax.scan(measure, None, (chunks, keys_N))
    squares_B = from_chunks(squares_NC, batch.tokens_BT.shape[0])
    examples = valid_rows(batch).sum()
    damping = {
        name: settings.damping * mean_square(x, examples, selection.blocks[name].size)
        for name, x in squares_B.items()
    }
    gradients = {name: x.reshape(-1, *x.shape[2:]) for name, x in kept.items()} if keep else None
    return DataInfState(damping, squares_B, examples, gradients)


def precondition(loss_fn: LossFn, settings: Settings, state: DataInfState, v: Blocks) -> Blocks:
    """``q``: the swapped inverse applied to the probe gradient ``v``.

    A block whose training gradients all vanish has no curvature to divide by; it is left out
    (``q`` is 0 there), as the training rows cannot act through it.
    """

    def shrink(gradients: Blocks) -> Blocks:
        return {name: _shrink(v[name], g, state.damping[name]) for name, g in gradients.items()}

    if state.gradients is not None:
        total = shrink(state.gradients)
    else:
        assert state.rows is not None, "DataInfCalculator.fit adds the rows"
        params, batch, key = state.rows
        selection = select(params, settings.parameters)

        def add(total: Blocks, xs: tuple[Batch, jax.Array]) -> tuple[Blocks, None]:
            shrunk = shrink(row_gradients(loss_fn, selection, *xs))
            return jax.tree.map(jnp.add, total, shrunk), None

        total, _ = jax.lax.scan(add, zeros_wide(v), chunks_and_keys(batch, settings.chunk, key))
    n = state.examples.clip(min=1)
    return {name: (v[name] - total[name] / n) * _inverse(state.damping[name]) for name in v}


def probe_gradient(
    loss_fn: LossFn, settings: Settings, params: Params, batch: Batch, key: jax.Array
) -> Blocks:
    """``v``: gradient of the mean, over rows with a valid target, of each row's mean loss."""
    selection = select(params, settings.parameters)
    return mean_gradient(loss_fn, selection, batch, key, settings.chunk)


def score_fitted(loss_fn: LossFn, settings: Settings, state: DataInfState, q: Blocks) -> jax.Array:
    """(B,) influence of the very rows that were fitted: by their kept gradients, if there are."""
    if state.gradients is None:
        assert state.rows is not None, "DataInfCalculator.fit adds the rows"
        params, batch, key = state.rows
        return score_rows(loss_fn, settings, params, q, batch, key)
    products = sum(
        jnp.tensordot(_wide(g), q[name], axes=q[name].ndim, precision="highest")
        for name, g in state.gradients.items()
    )
    rows = next(iter(state.squares_B.values())).size
    return from_chunks(-jnp.reshape(products, (steps_of(rows, settings.chunk), -1)), rows)


def score_rows(
    loss_fn: LossFn,
    settings: Settings,
    params: Params,
    q: Blocks,
    batch: Batch,
    key: jax.Array,
) -> jax.Array:
    """(B,) influence of each row's mean loss; 0 for a row without a valid target."""
    return _score(loss_fn, settings, params, q, batch, key, row_means)


def score_documents(
    loss_fn: LossFn,
    settings: Settings,
    params: Params,
    q: Blocks,
    batch: Batch,
    max_segments: int,
    key: jax.Array,
) -> jax.Array:
    """(B, S) influence of the mean loss of each segment; 0 where there is nothing to learn."""

    def means(values_BT: jax.Array, rows: Batch) -> jax.Array:
        return segment_means(values_BT, rows, max_segments)

    return _score(loss_fn, settings, params, q, batch, key, means)


def _score(
    loss_fn: LossFn,
    settings: Settings,
    params: Params,
    q: Blocks,
    batch: Batch,
    key: jax.Array,
    means: Callable[[jax.Array, Batch], jax.Array],
) -> jax.Array:
    selection = select(params, settings.parameters)

    def score(_: None, xs: tuple[Batch, jax.Array]) -> tuple[None, jax.Array]:
        rows, chunk_key = xs
        return None, -means(along(loss_fn, selection, q, rows, chunk_key), rows)

    _, scores = jax.lax.scan(score, None, chunks_and_keys(batch, settings.chunk, key))
    return from_chunks(scores, batch.tokens_BT.shape[0])


# --- one block: gradients are (C, *shape), a row each ---


def mean_square(squares_B: jax.Array, examples: jax.Array, entries: int) -> jax.Array:
    """Mean of ``g_i^2`` over examples and a block's entries.

    Divided by one count after the other: their product leaves int32 at 128 examples of 2^24.
    """
    return squares_B.sum() / examples.clip(min=1) / float(entries)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _squares(gradients: jax.Array) -> jax.Array:
    """(C,) squared norms, at least in float32."""
    return jnp.square(_wide(gradients)).sum(axis=tuple(range(1, gradients.ndim)))


def _shrink(v: jax.Array, gradients: jax.Array, damping: jax.Array) -> jax.Array:
    """``sum_i g_i (v.g_i) / (lambda + |g_i|^2)``; products in full precision on every device."""
    wide = _wide(gradients)
    products = jnp.tensordot(wide, v, axes=v.ndim, precision="highest")
    divisor = damping + _squares(gradients)
    weights = jnp.where(divisor > 0, products / jnp.where(divisor > 0, divisor, 1), 0)
    return jnp.tensordot(weights, wide, axes=1, precision="highest")


def _inverse(damping: jax.Array) -> jax.Array:
    """``1 / lambda``, or 0 where lambda is 0 or too small to have a reciprocal; NaN stays NaN."""
    small = damping < jnp.finfo(damping.dtype).tiny
    return jnp.where(small, 0, 1 / jnp.where(small, 1, damping))
