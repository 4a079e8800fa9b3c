"""Kronecker factors of one tensor's curvature: summed, decomposed, corrected, inverted.

Shapes: B rows, T tokens, S documents, U uses of a tensor, I inputs (a bias's 1 is the last), O
outputs, V ids, D width, K vectors. Scanned tensors begin with an axis of layers everywhere.

`ekfac` says what the factors are for and where the formulas come from.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch
from dh_jax.influence.documents import document_sums
from dh_jax.influence.gradients import Blocks
from dh_jax.influence.parts import Lookup, Outer, Part, gather_equal_ids, is_scanned
from dh_jax.influence.tiles import fold_documents


class Kernel(NamedTuple):
    """Of a kernel, with its bias as last row."""

    inputs_II: jax.Array  # Q_A, eigenvectors in columns
    outputs_OO: jax.Array  # Q_D
    eigenvalues_IO: jax.Array  # Lambda


class Table(NamedTuple):
    """Of an embedding table; ids are their own basis."""

    outputs_DD: jax.Array
    eigenvalues_VD: jax.Array


class Diagonal(NamedTuple):
    """Of a scale, or of a bias without its kernel."""

    eigenvalues_D: jax.Array


Factor: TypeAlias = Kernel | Table | Diagonal
Factors: TypeAlias = dict[str, Factor]  # by path of the tensor


class Covariance(NamedTuple):
    """Sums of the first pass over one tensor's tokens."""

    inputs: jax.Array | None  # sum a a' [I, I]; of a table, (V, 1), how often each id comes
    outputs: jax.Array  # sum d d' [O, O]; of a vector, sum over documents of g_d^2 [D]


# --- sums ------------------------------------------------------------------------------------


def covariance(
    part: Part, mask_BT: jax.Array, batch: Batch, max_segments: int, shape: tuple[int, ...]
) -> Covariance:
    """A batch's share in the first pass.

    Args:
        part: of the tensor.
        mask_BT: 1 at tokens of documents that have a target, 0 elsewhere.
        batch: packed rows.
        max_segments: S.
        shape: of the tensor.
    """
    if is_scanned(part):
        return jax.vmap(lambda p: covariance(p, mask_BT, batch, max_segments, shape[1:]))(part)
    if isinstance(part, Outer):
        a = part.activation_BTUI * mask_BT[..., None, None]
        return Covariance(_einsum("btui,btuj->ij", a, a), _outputs(part.cotangent_BTUO))
    if isinstance(part, Lookup):
        uses_BTU = jnp.broadcast_to(mask_BT[..., None], part.ids_BTU.shape)
        counts_V = jnp.zeros(shape[0], mask_BT.dtype).at[part.ids_BTU].add(uses_BTU)
        return Covariance(counts_V[:, None], _outputs(part.cotangent_BTUD))
    return Covariance(None, correction(part, Diagonal(jnp.zeros(())), batch, max_segments))


def correction(part: Part, factor: Factor, batch: Batch, max_segments: int) -> jax.Array:
    """A batch's share in the second pass: sum over documents of squares in the factor's basis."""
    if is_scanned(part):
        each = jax.vmap(lambda p, f: correction(p, f, batch, max_segments))
        return each(part, factor)
    if isinstance(part, Outer):
        assert isinstance(factor, Kernel)
        a = _einsum("btui,ij->btuj", part.activation_BTUI, factor.inputs_II)
        d = _einsum("btuo,op->btup", part.cotangent_BTUO, factor.outputs_OO)

        def add(total: jax.Array, g: jax.Array, _: jax.Array, done_B: jax.Array) -> jax.Array:
            return total + _einsum("bio,b->io", g * g, done_B.astype(g.dtype))

        start = jnp.zeros((a.shape[-1], d.shape[-1]), a.dtype)
        return fold_documents(a, d, batch.segment_ids_BT, max_segments, add, start)
    if isinstance(part, Lookup):
        assert isinstance(factor, Table)
        d = _einsum("btuo,op->btup", part.cotangent_BTUD, factor.outputs_DD)
        rows_BTUD, first_BTU = gather_equal_ids(Lookup(part.ids_BTU, d), batch)
        squares = jnp.square(rows_BTUD) * first_BTU[..., None]
        return jnp.zeros(factor.eigenvalues_VD.shape, d.dtype).at[part.ids_BTU].add(squares)
    by_width = jnp.moveaxis(part.value_BTD, -1, 0)
    return jnp.square(document_sums(by_width, batch, max_segments)).sum(axis=(1, 2))


def _outputs(cotangent_BTUO: jax.Array) -> jax.Array:
    return _einsum("btuo,btup->op", cotangent_BTUO, cotangent_BTUO)


# --- from sums to factors --------------------------------------------------------------------


def factor_of(sums: Covariance, tokens: float, documents: float) -> Factor:
    """K-FAC's factor: eigenvectors, and eigenvalues' outer product scaled to a document.

    Args:
        sums: over all documents.
        tokens: how many outer products ``inputs`` is the sum of.
        documents: n, how many documents ``outputs`` is the sum over.
    """
    dtype = sums.outputs.dtype
    if sums.inputs is None:
        return Diagonal(sums.outputs / documents)
    outputs, q_outputs = eigenbasis(sums.outputs / documents)
    if sums.inputs.shape[-1] == 1 < sums.inputs.shape[-2]:
        values = np.asarray(sums.inputs, np.float64) / tokens * outputs[..., None, :]
        return Table(jnp.asarray(q_outputs, dtype), jnp.asarray(values, dtype))
    inputs, q_inputs = eigenbasis(sums.inputs / tokens)
    values = inputs[..., :, None] * outputs[..., None, :]
    return Kernel(*(jnp.asarray(x, dtype) for x in (q_inputs, q_outputs, values)))


def eigenbasis(covariance: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (at least 0) and eigenvectors, in float64 by LAPACK on the host.

    Float32 decompositions of covariances fail to converge, or lose orthogonality, at widths met
    in practice; and as a host call this needs no device that has an eigensolver.
    """
    wide = np.asarray(covariance, np.float64)
    values, vectors = np.linalg.eigh((wide + wide.swapaxes(-1, -2)) / 2)
    return values.clip(min=0), vectors


# --- inverse ---------------------------------------------------------------------------------


def preconditioned(
    factors: Factors,
    vectors: Blocks,
    biases: dict[str, str],
    damping: float = 0.0,
    shift: float | jax.Array = 0.0,
) -> Blocks:
    """``(H + lambda I)^-1 v`` for K stacked vectors; 0 where a tensor has no curvature at all.

    Args:
        factors: from an estimator's ``fit``.
        vectors: by path, ``(K, *shape)``.
        biases: kernels whose bias is their last row, and that bias.
        damping: lambda of a tensor (of a layer, where scanned) over its mean eigenvalue.
        shift: added to that lambda, for all tensors alike.
    """
    out: Blocks = {}
    for path, factor in factors.items():
        bias = biases.get(path)
        v = vectors[path]
        if bias is not None:
            v = jnp.concatenate([v, vectors[bias][..., None, :]], axis=-2)
        moved = _solve(factor, v, damping, shift)
        if bias is not None:
            out[bias] = moved[..., -1, :]
            moved = moved[..., :-1, :]
        out[path] = moved
    return out


def _solve(factor: Factor, v: jax.Array, damping: float, shift: float | jax.Array) -> jax.Array:
    values = factor[-1]
    axes = (-1,) if isinstance(factor, Diagonal) else (-2, -1)
    damped = values + damping * values.mean(axis=axes, keepdims=True) + shift
    inverse = jnp.where(damped > 0, 1 / jnp.where(damped > 0, damped, 1), 0)
    if isinstance(factor, Diagonal):
        return v * inverse
    if isinstance(factor, Table):
        v = _einsum("k...vp,...po->k...vo", v, factor.outputs_DD) * inverse
        return _einsum("k...vp,...op->k...vo", v, factor.outputs_DD)
    v = _einsum("...ji,k...jo->k...io", factor.inputs_II, v)
    v = _einsum("k...ip,...po->k...io", v, factor.outputs_OO) * inverse
    v = _einsum("...ij,k...jo->k...io", factor.inputs_II, v)
    return _einsum("k...ip,...op->k...io", v, factor.outputs_OO)


def _einsum(formula: str, *operands: jax.Array) -> jax.Array:
    """In full precision on every device."""
    return jnp.einsum(formula, *operands, precision="highest")
