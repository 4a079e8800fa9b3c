"""Low-rank queries: a query's kernels as thin factors, which take a fraction of the memory.

Shapes: K queries, I inputs, O outputs, r rank.

A query's gradient of one kernel is nearly of low rank (Grosse et al. 2023, arXiv:2308.03296,
section 3.2.2 keep 32). With ``v ~ L R`` the product with a document's gradient needs no gradient::

    <v, sum_t a_t d_t'>  ~  sum_t (a_t' L) . (R d_t)

which takes ``r (I + O)`` multiplications a token and query in place of ``I O``. L R is the best
approximation of its rank, the truncated singular value decomposition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.errors import ConfigError

Vectors = Mapping[str, "jax.Array | Thin"]


class Thin(NamedTuple):
    """K matrices ``L R``; of a scanned tensor with an axis of layers behind K."""

    left_KIr: jax.Array
    right_KrO: jax.Array


def dense(vector: jax.Array | Thin) -> jax.Array:
    """(K, *shape) what the factors stand for."""
    if isinstance(vector, Thin):
        return jnp.matmul(vector.left_KIr, vector.right_KrO, precision="highest")
    return vector


def mean_query(prepared: Vectors) -> dict[str, jax.Array]:
    """(1, *shape) the mean of K prepared queries, whole."""

    def mean(vector: jax.Array | Thin) -> jax.Array:
        if isinstance(vector, Thin):
            left, right = vector
            total = jnp.einsum("k...ir,k...ro->...io", left, right, precision="highest")
            return total[None] / len(left)
        return vector.mean(axis=0, keepdims=True)

    return {path: mean(vector) for path, vector in prepared.items()}


def thinned(
    prepared: Mapping[str, jax.Array], kernels: frozenset[str], rank: int
) -> tuple[dict[str, jax.Array | Thin], np.ndarray]:
    """Prepared queries with their kernels as thin factors.

    Args:
        prepared: by path, (K, *shape) each.
        kernels: paths of the matrices (`PerDocument.kernels`); others stay whole, and so do those
            with no more than ``rank`` rows or columns.
        rank: r.

    Returns:
        The queries, and (K,) the relative error of each: the norm of what was left out of all its
        tensors over the norm of the whole. A score is off by at most this times the score of a
        document whose gradient lies along the query.

    Raises:
        ConfigError: there are no kernels (gradients do not come by taps), or rank is below 1.
    """
    if rank < 1:
        raise ConfigError(f"low_rank is {rank}; the least is 1")
    if not kernels:
        raise ConfigError(
            "low-rank queries need gradients by taps and an estimator that scores by inner "
            "products of gradients; leave low_rank out"
        )
    out: dict[str, jax.Array | Thin] = {}
    lost_K, whole_K = np.zeros(1), np.zeros(1)
    for path, vector in prepared.items():
        flat = np.asarray(vector).reshape(len(vector), -1)
        whole_K = whole_K + np.square(flat, dtype=np.float64).sum(axis=1)
        if path in kernels and rank < min(vector.shape[-2:]):
            out[path], more_K = _factored(np.asarray(vector), rank)
            lost_K = lost_K + more_K
        else:
            out[path] = vector
    error_K = np.sqrt(lost_K / np.where(whole_K > 0, whole_K, 1))
    return out, np.broadcast_to(error_K, whole_K.shape)


def _factored(matrices: np.ndarray, rank: int) -> tuple[Thin, np.ndarray]:
    """(K, ..., I, O) as factors, and (K,) the squared norm of what they leave out.

    By the eigenvectors of the smaller of ``v v'`` and ``v' v``, in float64: a tenth of the time
    of a full decomposition.
    """
    *outer, inputs, outputs = matrices.shape
    left = np.empty((*outer, inputs, rank), matrices.dtype)
    right = np.empty((*outer, rank, outputs), matrices.dtype)
    lost = np.empty(outer)
    for at in np.ndindex(*outer):
        v = matrices[at].astype(np.float64)
        tall = inputs > outputs
        values, vectors = np.linalg.eigh(v.T @ v if tall else v @ v.T)  # ascending
        kept = vectors[:, -rank:]
        left[at], right[at] = (v @ kept, kept.T) if tall else (kept, kept.T @ v)
        lost[at] = values[:-rank].clip(min=0).sum()
    thin = Thin(jnp.asarray(left), jnp.asarray(right))
    return thin, lost.reshape(len(matrices), -1).sum(axis=1)
