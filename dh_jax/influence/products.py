"""Curvature times vectors: Hessian, Gauss-Newton and Fisher, never a matrix.

Shapes: B rows, T tokens, S documents of a row, V outputs, K vectors, P entries of all blocks.

All curvature in this room is that of the mean loss of a document, ``(1/n) sum_d h_d`` over the n
documents that have a target, where a document's loss sums (or averages) its targets' losses as
the scope says. The kernels here give ``sum_d h_d v`` of one batch; `accumulated` adds them over
batches and divides by n, so that how the data is split does not matter.

With ``J`` the Jacobian of logits or losses (Martens 2020, arXiv:1412.1193)::

    Hessian        h v = d/de grad L(theta + e v)             forward over reverse
    Gauss-Newton   h v = J_z' (H_out (J_z v))                 H_out of the loss in the logits
    Fisher         h v = sum_d g_d (g_d . v) = J_l' R' R J_l v    R sums targets by document

For a loss that is a negative log-likelihood, as cross-entropy, Gauss-Newton *is* the exact
Fisher matrix (labels in expectation under the model). The Fisher of the true labels is the
empirical one; the Fisher of labels drawn by `fisher.sample_targets` estimates the exact one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError
from dh_jax.functions import LogitsFn, LossFn, Params
from dh_jax.influence.chunks import chunks_and_keys
from dh_jax.influence.documents import document_sums, spread, target_counts, target_weights
from dh_jax.influence.fisher import sample_targets
from dh_jax.influence.gradients import Blocks, Selection, select, wide, zeros_wide
from dh_jax.influence.objective import Data, LogitsLoss, Objective, Scope, check_scope, checked

Curvature = Literal["hessian", "gauss_newton", "empirical_fisher", "sampled_fisher"]


class BatchProduct(Protocol):
    """``sum_d h_d v_k`` over one batch, for K stacked vectors (K, *shape)."""

    def __call__(self, params: Params, vectors: Blocks, batch: Batch, key: jax.Array) -> Blocks: ...


# --- kernels ---------------------------------------------------------------------------------


def hessian_product(
    loss_fn: LossFn,
    selection: Selection,
    vectors: Blocks,
    batch: Batch,
    key: jax.Array,
    weights_BT: jax.Array,
) -> Blocks:
    """``H v`` for H of ``sum_bt weights * loss``; the K vectors share one pass over the primal.

    The loss must have a forward derivative, which a function with only a ``custom_vjp`` has not.
    """

    def total(blocks: Blocks) -> jax.Array:
        return jnp.vdot(weights_BT, loss_fn(selection.merge(blocks), batch, key))

    def one(vector: Blocks) -> Blocks:
        moved: Blocks = jax.jvp(jax.grad(total), (selection.blocks,), (vector,))[1]
        return moved

    return jax.vmap(one)(vectors)


def gauss_newton_product(
    logits_fn: LogitsFn,
    logits_loss: LogitsLoss,
    selection: Selection,
    vectors: Blocks,
    batch: Batch,
    weights_BT: jax.Array,
) -> Blocks:
    """``G v``, positive semidefinite where the loss is convex in the logits.

    The Hessian in the logits acts by its own derivative, ``d/de grad(z + e u)``; for cross-entropy
    XLA sees ``p * u - p (p . u)``, and no V x V matrix.
    """

    def logits(blocks: Blocks) -> jax.Array:
        return logits_fn(selection.merge(blocks), batch)

    def total(z_BTV: jax.Array) -> jax.Array:
        return jnp.vdot(weights_BT, logits_loss(z_BTV, batch))

    z_BTV, push = jax.linearize(logits, selection.blocks)
    pull = jax.linear_transpose(push, selection.blocks)
    _, bend = jax.linearize(jax.grad(total), z_BTV)

    def one(vector: Blocks) -> Blocks:
        (moved,) = pull(bend(push(vector)))
        return moved

    return jax.vmap(one)(vectors)


def fisher_product(
    loss_fn: LossFn,
    selection: Selection,
    vectors: Blocks,
    batch: Batch,
    key: jax.Array,
    weights_BT: jax.Array,
    max_segments: int,
) -> Blocks:
    """``sum_d g_d (g_d . v)``: one forward and one reverse pass, no gradient per document."""

    def losses(blocks: Blocks) -> jax.Array:
        return loss_fn(selection.merge(blocks), batch, key)

    loss_BT, push = jax.linearize(losses, selection.blocks)
    pull = jax.linear_transpose(push, selection.blocks)

    def one(vector: Blocks) -> Blocks:
        slopes_BS = document_sums(push(vector) * weights_BT, batch, max_segments)
        (moved,) = pull((spread(slopes_BS, batch) * weights_BT).astype(loss_BT.dtype))
        return moved

    return jax.vmap(one)(vectors)


# --- over a batch, over all data -------------------------------------------------------------


def batch_product(objective: Objective, scope: Scope, curvature: Curvature) -> BatchProduct:
    """The kernel of one curvature, a chunk of rows at a time, compiled once a shape.

    Raises:
        ConfigError: the objective has no ``logits`` where they are needed, or no such curvature.
    """
    check_scope(scope)
    if curvature in ("gauss_newton", "sampled_fisher") and objective.logits is None:
        raise ConfigError(f"curvature {curvature!r} needs Objective.logits, the model's LogitsFn")
    if curvature not in ("hessian", "gauss_newton", "empirical_fisher", "sampled_fisher"):
        raise ConfigError(
            f"no curvature {curvature!r}; take 'hessian', 'gauss_newton' (the exact Fisher of a "
            "log-likelihood), 'empirical_fisher' or 'sampled_fisher'"
        )

    def chunk_product(
        params: Params, selection: Selection, vectors: Blocks, rows: Batch, key: jax.Array
    ) -> Blocks:
        loss, logits, S = objective.loss, objective.logits, scope.max_segments
        weights_BT = target_weights(rows, S, scope.reduction, wide(selection.blocks))
        if curvature == "hessian":
            return hessian_product(loss, selection, vectors, rows, key, weights_BT)
        if curvature == "gauss_newton":
            assert logits is not None
            return gauss_newton_product(
                logits, objective.logits_loss, selection, vectors, rows, weights_BT
            )
        if curvature == "sampled_fisher":
            assert logits is not None
            draw, key = jax.random.split(key)
            rows = sample_targets(logits, params, rows, draw)
            weights_BT = jnp.sqrt(weights_BT)  # which the product over labels squares: see fisher
        return fisher_product(loss, selection, vectors, rows, key, weights_BT, S)

    @jax.jit
    def product(params: Params, vectors: Blocks, batch: Batch, key: jax.Array) -> Blocks:
        selection = select(params, scope.parameters)
        narrow = {name: v.astype(selection.blocks[name].dtype) for name, v in vectors.items()}

        def add(total: Blocks, xs: tuple[Batch, jax.Array]) -> tuple[Blocks, None]:
            part = chunk_product(params, selection, narrow, *xs)
            return jax.tree.map(lambda t, p: t + p, total, part), None

        total, _ = jax.lax.scan(add, zeros_wide(vectors), chunks_and_keys(batch, scope.chunk, key))
        return total

    return product


def accumulated(
    product: BatchProduct, scope: Scope, params: Params, data: Data, key: jax.Array
) -> Callable[[Blocks], Blocks]:
    """``v -> (1/n) sum_d h_d v`` over all batches of the data.

    Args:
        product: from `batch_product`.
        scope: the one it was made with.
        params: where the curvature is taken.
        data: batches, gone through once for every call.
        key: random key, as the loss may use it; the same labels are drawn at every call.

    Returns:
        A symmetric linear map of blocks: one vector of the parameters' shapes, or K of them
        stacked along a new first axis. At least float32.
    """
    documents: list[int] = []  # counted at the first call; the data stays the same

    def apply(vectors: Blocks) -> Blocks:
        name, first = next(iter(vectors.items()))
        single = first.ndim == select(params, scope.parameters).blocks[name].ndim
        stacked = {n: v[None] for n, v in vectors.items()} if single else vectors
        total, counts = zeros_wide(stacked), []
        for _, batch, batch_key in checked(data, scope, key):
            total = _add(total, product(params, stacked, batch, batch_key))
            if not documents:
                counts.append(int(count_documents(batch, scope.max_segments)))
        if not documents:
            documents.append(max(sum(counts), 1))
        return {n: (t[0] if single else t) / documents[0] for n, t in total.items()}

    return apply


def count_documents(batch: Batch, max_segments: int) -> jax.Array:
    """Documents that have a target to learn, an int32 scalar."""
    return (target_counts(batch, max_segments) > 0).sum()


@jax.jit
def _add(total: Blocks, part: Blocks) -> Blocks:
    return jax.tree.map(jnp.add, total, part)
