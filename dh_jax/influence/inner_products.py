"""What a mixture's policy asks of gradients, from nothing but their inner products.

A model spread over processes has its gradients in pieces. Inner products add up over pieces, and
all that a policy sees is made of them, DataInf's scores as well (`dh_jax.influence.datainf`)::

    score_k = - sum_l (1/lambda_l) (v.g_k - (1/n) sum_i (g_k.g_i) (v.g_i) / (lambda_l + |g_i|^2))

Shapes: R rows of all sources, one after the other; Q target probes; N = R + Q gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dh_jax.errors import DataError
from dh_jax.influence.checks import CURE, refuse_non_finite


class InnerProducts(NamedTuple):
    """Of the gradients of rows' mean losses, then of probes (means over rows of such gradients).

    A row without a target has the gradient 0, and counts nowhere.
    """

    by_tensor: dict[str, np.ndarray]  # float64 [N, N]; all processes' pieces together
    entries: dict[str, int]  # of each tensor, whole
    valid: dict[str, np.ndarray]  # source -> bool, its rows that have a target, in order
    target_Q: dict[str, float]  # probe -> its weight; they sum to 1


def refuse_broken(products: InnerProducts) -> None:
    """Refuse gradients that are not finite.

    Raises:
        DataError: names the sources, or the probes, that they are of.
    """
    squares_N = np.sum([np.diag(table) for table in products.by_tensor.values()], axis=0)
    rows_R, probes_Q = np.split(squares_N, [_rows(products)])
    bad = [name for name, x in zip(products.target_Q, probes_Q, strict=True) if not np.isfinite(x)]
    if bad:
        named = ", ".join(f"probe {name!r}" for name in bad)
        raise DataError(f"{named}: gradient is not finite; {CURE}")
    refuse_non_finite("gradient", _by_source(products, rows_R))


def influence_of(products: InnerProducts, damping: float) -> np.ndarray:
    """(M,) mean DataInf influence of each source's rows on the target; positive = harmful.

    What `dh_jax.influence.sources.source_influence` gives.

    Args:
        products: finite.
        damping: lambda of a tensor as a multiple of its mean squared gradient.

    Raises:
        DataError: a score is not finite.
    """
    weights_Q = np.array([*products.target_Q.values()])
    n = max(sum(int(v.sum()) for v in products.valid.values()), 1)
    rows = _rows(products)
    scores_R = np.zeros(rows)
    for name, table in products.by_tensor.items():
        inner_RR, target_R = table[:rows, :rows], table[:rows, rows:] @ weights_Q
        squares_R = np.diag(inner_RR)
        ridge = damping * squares_R.sum() / n / products.entries[name]
        if ridge < np.finfo(np.float32).tiny:  # nothing acts through this tensor
            continue
        scores_R -= (target_R - inner_RR @ (target_R / (ridge + squares_R)) / n) / ridge
    scores = _by_source(products, scores_R)
    refuse_non_finite("influence", scores)
    return np.array([scores[m][v].mean() for m, v in products.valid.items()], np.float32)


def alignment_of(products: InnerProducts) -> tuple[np.ndarray, np.ndarray]:
    """(M,) dot product of each source's mean gradient with the target's, and (M,) its norm.

    What `dh_jax.influence.alignment.source_alignment` gives; positive = helpful.
    """
    weights_Q = np.array([*products.target_Q.values()])
    total_NN = np.sum([*products.by_tensor.values()], axis=0)
    rows = _rows(products)
    dots = _by_source(products, total_NN[:rows, rows:] @ weights_Q)
    place, norms = 0, []
    for valid in products.valid.values():
        inner = total_NN[place : place + len(valid), place : place + len(valid)]
        square = inner[np.ix_(valid, valid)].mean()
        norms.append(np.sqrt(max(square, 0.0)))  # sums of pieces are rounded
        place += len(valid)
    alignment_M = [dots[m][v].mean() for m, v in products.valid.items()]
    return np.array(alignment_M, np.float32), np.array(norms, np.float32)


def _rows(products: InnerProducts) -> int:
    return sum(map(len, products.valid.values()))


def _by_source(products: InnerProducts, values_R: np.ndarray) -> Mapping[str, np.ndarray]:
    cuts = np.cumsum([len(v) for v in products.valid.values()])[:-1]
    return dict(zip(products.valid, np.split(values_R, cuts), strict=True))
