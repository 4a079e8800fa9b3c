"""One door to per-document gradients, whether they come plainly or by taps.

Shapes: B rows, S documents of a row, K vectors. Estimators see only this: norms, inner products
and weighted sums of the documents' gradients, tensor by tensor, a chunk of rows at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch
from dh_jax.functions import Params
from dh_jax.influence import documents, parts
from dh_jax.influence.chunks import chunks_and_keys, from_chunks
from dh_jax.influence.gradients import Blocks, along, select
from dh_jax.influence.objective import Objective, Scope, check_scope
from dh_jax.influence.sketch import Sketch, project
from dh_jax.influence.taps import capture, coverage, tapped_paths
from dh_jax.influence.thin import dense

Tree = TypeVar("Tree")

ROOM = 1 << 28  # bytes that a chunk's gradients may fill where products could do without them


class PerDocument(NamedTuple):
    """Functions of (params, ..., batch, key); all but `blocks` and `coverage` belong under jit.

    Vectors of `products`, `moments` and `by_token` may be `thin.Thin` for ``kernels``.
    """

    blocks: Callable[[Params], Blocks]  # the tensors covered
    coverage: Callable[[Params], float]  # their share of all trainable entries
    gradients: Callable[[Params, Batch, jax.Array], Blocks]  # (B, S, *shape)
    squares: Callable[[Params, Batch, jax.Array], Blocks]  # (B, S) |g_d|^2 a tensor
    products: Callable[[Params, Blocks, Batch, jax.Array], jax.Array]  # (B, S, K) in all tensors
    products_each: Callable[[Params, Blocks, Batch, jax.Array], Blocks]  # (B, S, K) a tensor
    moments: Callable[..., tuple[jax.Array, jax.Array]]  # as products, and |g_d|^2: (B, S)
    by_token: Callable[[Params, Blocks, Batch, jax.Array], jax.Array]  # (B, T, K), a target each
    combine: Callable[[Params, Blocks, Batch, jax.Array], Blocks]  # (K, B, S) -> (K, *shape)
    sketched: Callable[[Sketch, Params, Batch, jax.Array], jax.Array]  # (B, S, k)
    health: Callable[[Params, Batch, jax.Array], jax.Array]  # (B, S), finite where all is well
    kernels: frozenset[str] = frozenset()  # tensors whose vectors may be thin


def per_document(objective: Objective, scope: Scope) -> PerDocument:
    """By taps where the objective has them, else by plain differentiation of its loss."""
    check_scope(scope)
    return plain(objective, scope) if objective.tapped is None else tapped(objective, scope)


def plain(objective: Objective, scope: Scope) -> PerDocument:
    """For any loss: gradients of a chunk's documents exist all at once (but see `products`)."""
    S, reduction, loss = scope.max_segments, scope.reduction, objective.loss

    def blocks(params: Params) -> Blocks:
        return select(params, scope.parameters).blocks

    def gradients(params: Params, rows: Batch, key: jax.Array) -> Blocks:
        selection = select(params, scope.parameters)
        each = documents.document_gradients(loss, selection, rows, key, S, reduction)
        return {path: g.astype(scope.dtype) for path, g in each.items()}

    def squares(params: Params, rows: Batch, key: jax.Array) -> Blocks:
        each = gradients(params, rows, key)
        return {path: jnp.square(g).sum(axis=range(2, g.ndim)) for path, g in each.items()}

    def products(params: Params, vectors: Blocks, rows: Batch, key: jax.Array) -> jax.Array:
        selection = select(params, scope.parameters)
        if _forms_gradients(vectors, len(rows.tokens_BT), S):
            each = gradients(params, rows, key)
            return sum((_inner(g, vectors[p]) for p, g in each.items()), jnp.zeros(()))
        slopes_KBS = documents.document_products(loss, selection, vectors, rows, key, S, reduction)
        return jnp.moveaxis(slopes_KBS, 0, -1)

    def products_each(params: Params, vectors: Blocks, rows: Batch, key: jax.Array) -> Blocks:
        each = gradients(params, rows, key)
        return {path: _inner(g, vectors[path]) for path, g in each.items()}

    def moments(
        params: Params, vectors: Blocks, rows: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        each = gradients(params, rows, key)
        products_BSK = sum((_inner(g, vectors[p]) for p, g in each.items()), jnp.zeros(()))
        sizes = (jnp.square(g).sum(axis=range(2, g.ndim)) for g in each.values())
        return products_BSK, sum(sizes, jnp.zeros(()))

    def combine(params: Params, weights: Blocks, rows: Batch, key: jax.Array) -> Blocks:
        each = gradients(params, rows, key)
        return {
            path: jnp.tensordot(weights[path], g, axes=2, precision="highest")
            for path, g in each.items()
        }

    def sketched(sketch: Sketch, params: Params, rows: Batch, key: jax.Array) -> jax.Array:
        each = gradients(params, rows, key)
        flat = {p: g.reshape(-1, *g.shape[2:]) for p, g in each.items()}
        total = sum((project(sketch, p, g) for p, g in flat.items()), jnp.zeros(()))
        return total.reshape(len(rows.tokens_BT), S, sketch.size)

    def health(params: Params, rows: Batch, key: jax.Array) -> jax.Array:
        return sum(squares(params, rows, key).values(), jnp.zeros(()))

    return _chunked(
        PerDocument(
            blocks,
            lambda params: select(params, scope.parameters).coverage,
            gradients,
            squares,
            products,
            products_each,
            moments,
            _by_token(objective, scope),
            combine,
            sketched,
            health,
        ),
        scope,
    )


def _forms_gradients(vectors: Blocks, rows: int, segments: int) -> bool:
    """Whether gradients of a chunk's documents are the shorter way to their products with K
    vectors: a reverse pass a segment instead of a forward-mode pass a vector, where they fit."""
    each = [(v.dtype.itemsize, *v.shape) for v in vectors.values()]
    size = rows * segments * sum(bytes_ * math.prod(shape) for bytes_, _, *shape in each)
    return each[0][1] > segments and size <= ROOM


def tapped(objective: Objective, scope: Scope) -> PerDocument:
    """By taps: no document's gradient of more than one tensor exists, except in `gradients`."""
    S = scope.max_segments
    layers = tapped_paths(objective, scope).values()  # refuses at once what cannot be tapped
    kernels = frozenset(x.weight for x in layers if x.kind == "linear")

    def seen(params: Params, rows: Batch, key: jax.Array) -> parts.Parts:
        return capture(objective, scope, params, rows, key).parts

    def blocks(params: Params) -> Blocks:
        chosen = select(params, scope.parameters).blocks
        layers = tapped_paths(objective, scope).values()
        return {p: chosen[p] for x in layers for p in (x.weight, x.bias) if p in chosen}

    def gradients(params: Params, rows: Batch, key: jax.Array) -> Blocks:
        shapes = blocks(params)
        return {
            path: parts.gradients(part, rows, S, shapes[path].shape)
            for path, part in seen(params, rows, key).items()
        }

    def squares(params: Params, rows: Batch, key: jax.Array) -> Blocks:
        found = seen(params, rows, key)
        return {path: parts.squares(part, rows, S) for path, part in found.items()}

    def products_each(params: Params, vectors: Blocks, rows: Batch, key: jax.Array) -> Blocks:
        found = seen(params, rows, key)
        return {path: parts.products(p, vectors[path], rows, S) for path, p in found.items()}

    def products(params: Params, vectors: Blocks, rows: Batch, key: jax.Array) -> jax.Array:
        each = products_each(params, vectors, rows, key)
        return sum(each.values(), jnp.zeros(()))

    def moments(
        params: Params, vectors: Blocks, rows: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        found = seen(params, rows, key)  # once: XLA then forms a kernel's gradient once as well
        each = [parts.products(p, vectors[path], rows, S) for path, p in found.items()]
        sizes = [parts.squares(p, rows, S) for p in found.values()]
        return sum(each[1:], each[0]), sum(sizes[1:], sizes[0])

    def combine(params: Params, weights: Blocks, rows: Batch, key: jax.Array) -> Blocks:
        shapes = blocks(params)
        return {
            path: parts.combine(part, weights[path], rows, shapes[path].shape)
            for path, part in seen(params, rows, key).items()
        }

    def sketched(sketch: Sketch, params: Params, rows: Batch, key: jax.Array) -> jax.Array:
        shapes = blocks(params)
        each = [
            parts.sketched(part, sketch, path, rows, S, shapes[path].shape)
            for path, part in seen(params, rows, key).items()
        ]
        return sum(each[1:], each[0])

    def health(params: Params, rows: Batch, key: jax.Array) -> jax.Array:
        return capture(objective, scope, params, rows, key).health_BS

    return _chunked(
        PerDocument(
            blocks,
            lambda params: coverage(objective, scope, params),
            gradients,
            squares,
            products,
            products_each,
            moments,
            _by_token(objective, scope),
            combine,
            sketched,
            health,
            kernels,
        ),
        scope,
    )


def _by_token(objective: Objective, scope: Scope) -> Callable[..., jax.Array]:
    """Shares of targets in `products`: one forward-mode pass a vector, whatever the gradients."""

    def by_token(params: Params, vectors: Blocks, rows: Batch, key: jax.Array) -> jax.Array:
        pattern = f"^(?:{'|'.join(map(re.escape, vectors))})$"
        selection = select(params, pattern)

        def one(vector: Blocks) -> jax.Array:
            return along(objective.loss, selection, vector, rows, key)

        slopes_KBT = jax.lax.map(one, {path: dense(v) for path, v in vectors.items()})
        weights_BT = documents.target_weights(
            rows, scope.max_segments, scope.reduction, slopes_KBT.dtype
        )
        return jnp.moveaxis(slopes_KBT * weights_BT, 0, -1)

    return by_token


# --- a chunk of rows at a time ---------------------------------------------------------------


def _chunked(whole: PerDocument, scope: Scope) -> PerDocument:
    def per_row(of_rows: Callable[[Batch, jax.Array], Tree], batch: Batch, key: jax.Array) -> Tree:
        """Results that begin with rows, in the batch's order."""

        def visit(_: None, xs: tuple[Batch, jax.Array]) -> tuple[None, Tree]:
            return None, of_rows(*xs)

        _, out = jax.lax.scan(visit, None, chunks_and_keys(batch, scope.chunk, key))
        return from_chunks(out, batch.tokens_BT.shape[0])

    def combine(params: Params, weights: Blocks, batch: Batch, key: jax.Array) -> Blocks:
        """As `per_row`, but summed: the weights are cut into chunks along with the rows."""
        rows = batch.tokens_BT.shape[0]
        chunks, keys_N = chunks_and_keys(batch, scope.chunk, key)
        steps, size = chunks.tokens_BT.shape[:2]

        def cut(weights_KBS: jax.Array) -> jax.Array:
            padded = jnp.pad(weights_KBS, ((0, 0), (0, steps * size - rows), (0, 0)))
            K, _, S = padded.shape
            return padded.reshape(K, size, steps, S).transpose(2, 0, 1, 3)

        def add(total: Blocks, xs: tuple[Batch, jax.Array, Blocks]) -> tuple[Blocks, None]:
            rows_C, chunk_key, weights_C = xs
            part = whole.combine(params, weights_C, rows_C, chunk_key)
            return jax.tree.map(jnp.add, total, part), None

        blocks = whole.blocks(params)
        K = len(next(iter(weights.values())))
        start = {p: jnp.zeros((K, *b.shape), scope.dtype) for p, b in blocks.items()}
        total, _ = jax.lax.scan(add, start, (chunks, keys_N, jax.tree.map(cut, weights)))
        return total

    return PerDocument(
        whole.blocks,
        whole.coverage,
        lambda params, batch, key: per_row(
            lambda rows, k: whole.gradients(params, rows, k), batch, key
        ),
        lambda params, batch, key: per_row(
            lambda rows, k: whole.squares(params, rows, k), batch, key
        ),
        lambda params, vectors, batch, key: per_row(
            lambda rows, k: whole.products(params, vectors, rows, k), batch, key
        ),
        lambda params, vectors, batch, key: per_row(
            lambda rows, k: whole.products_each(params, vectors, rows, k), batch, key
        ),
        lambda params, vectors, batch, key: per_row(
            lambda rows, k: whole.moments(params, vectors, rows, k), batch, key
        ),
        lambda params, vectors, batch, key: per_row(
            lambda rows, k: whole.by_token(params, vectors, rows, k), batch, key
        ),
        combine,
        lambda sketch, params, batch, key: per_row(
            lambda rows, k: whole.sketched(sketch, params, rows, k), batch, key
        ),
        lambda params, batch, key: per_row(
            lambda rows, k: whole.health(params, rows, k), batch, key
        ),
        whole.kernels,
    )


def _inner(gradients: jax.Array, vectors: jax.Array) -> jax.Array:
    """(B, S, K) inner products of (B, S, *shape) with (K, *shape)."""
    flat, others = gradients.reshape(*gradients.shape[:2], -1), vectors.reshape(len(vectors), -1)
    return jnp.einsum("bsp,kp->bsk", flat, others, precision="highest")
