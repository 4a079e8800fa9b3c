"""Small inputs of distillation losses, and how results are compared."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dh_jax.distillation.divergences import DIVERGENCES, Divergence
from dh_jax.distillation.losses import Kind

SLOW = pytest.mark.slow
QUICK = ("forward_kl",)  # the others compile as long, so they are for `make slow`
EACH = [pytest.param(name, marks=() if name in QUICK else SLOW) for name in DIVERGENCES]

B, T, D, V, K = 2, 6, 5, 17, 4
BETA = 0.3
CHUNKS = (1, 2, 4, 10, 12)  # of 12 tokens: by one, uneven, all at once


def drawn(seed=0, teacher_vocabulary=V):
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.normal(size=(B, T, D)).astype(np.float32),
        "kernel": rng.normal(size=(D, V)).astype(np.float32),
        "bias": rng.normal(size=V).astype(np.float32),
        "teacher": (2 * rng.normal(size=(B, T, teacher_vocabulary))).astype(np.float32),
        "targets": rng.integers(0, V, (B, T)).astype(np.int32),
        "mask": rng.random((B, T)) < 0.7,
        "weights": rng.normal(size=(B, T)).astype(np.float32),
    }


def gradients_of(loss_of, weights, *arrays):
    """Losses, and the gradients of their weighted sum in ``arrays``."""

    def total(*arrays):
        loss_BT = loss_of(*arrays)
        return (weights * loss_BT).sum(), loss_BT

    compute = jax.jit(jax.grad(total, argnums=tuple(range(len(arrays))), has_aux=True))
    found, loss_BT = compute(*arrays)
    return loss_BT, found


def close(found, expected, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert a.shape == b.shape
        scale = max(1.0, float(np.abs(b).max(initial=0.0)))
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)


def kind_of(name, **rest):
    return Kind(Divergence(name, BETA), **rest)
