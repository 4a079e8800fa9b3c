"""First-order measurements against gradients taken plainly in one piece."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dh_jax.errors import ConfigError, DataError
from dh_jax.influence.alignment import source_alignment, target_loss
from dh_jax.influence.calculator import DataInfCalculator
from tests.dh_jax.influence import tiny

KEY = jax.random.PRNGKey(5)
CALCULATOR = DataInfCalculator(tiny.sequence_loss, chunk=3)


def rows(seed, count=5, length=12):
    rng = np.random.default_rng(seed)
    return tiny.pack([[rng.integers(0, tiny.VOCAB, length)] for _ in range(count)], length)


SOURCES = {"a": rows(0), "b": rows(1), "c": rows(2)}
PROBES = {"p": rows(3, 4), "q": rows(4, 7)}
TARGETS = {"p": 0.25, "q": 0.75}


def plain_gradient(params, batch, parameters=lambda path: True):
    def loss(params):
        loss_BT = tiny.sequence_loss(params, batch, KEY)
        return (loss_BT.sum(1) / batch.loss_mask_BT.sum(1)).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    return np.asarray(ravel_pytree(gradient)[0], np.float64)


def test_alignment_is_the_dot_product_of_mean_gradients():
    params = tiny.sequence_params(KEY)
    alignment_M, norm_M = source_alignment(CALCULATOR, params, SOURCES, PROBES, TARGETS, KEY)
    v = sum(w * plain_gradient(params, PROBES[name]) for name, w in TARGETS.items())
    gradients = [plain_gradient(params, batch) for batch in SOURCES.values()]
    np.testing.assert_allclose(alignment_M, [g @ v for g in gradients], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm_M, [np.linalg.norm(g) for g in gradients], rtol=1e-5)


def test_only_selected_parameters_count():
    params = tiny.sequence_params(KEY)
    head = DataInfCalculator(tiny.sequence_loss, parameters="head")
    _, whole_M = source_alignment(CALCULATOR, params, SOURCES, PROBES, TARGETS, KEY)
    _, part_M = source_alignment(head, params, SOURCES, PROBES, TARGETS, KEY)
    assert (part_M < whole_M).all() and (part_M > 0).all()


def test_target_loss_is_the_weighted_mean_of_the_probes():
    params = tiny.sequence_params(KEY)
    got = target_loss(CALCULATOR, params, PROBES, TARGETS, KEY)
    means = {
        name: float(tiny.sequence_loss(params, b, KEY).sum() / b.loss_mask_BT.sum())
        for name, b in PROBES.items()
    }
    assert got == pytest.approx(sum(w * means[name] for name, w in TARGETS.items()), rel=1e-5)


def test_rows_at_fault_are_named():
    params = tiny.sequence_params(KEY)
    empty = SOURCES["b"]._replace(loss_mask_BT=np.zeros_like(SOURCES["b"].loss_mask_BT))
    with pytest.raises(DataError, match="source 'b': none of its 5 rows"):
        source_alignment(CALCULATOR, params, SOURCES | {"b": empty}, PROBES, TARGETS, KEY)
    with pytest.raises(DataError, match="probe 'q': none of its 5 rows"):
        target_loss(CALCULATOR, params, PROBES | {"q": empty}, TARGETS, KEY)
    with pytest.raises(ConfigError, match="no rows for probe 'q'"):
        target_loss(CALCULATOR, params, {"p": PROBES["p"]}, TARGETS, KEY)
    params["embed"] = jnp.full_like(params["embed"], jnp.nan)
    with pytest.raises(DataError, match="probe 'p': gradient is not finite"):
        source_alignment(CALCULATOR, params, SOURCES, PROBES, TARGETS, KEY)
    with pytest.raises(DataError, match="probe 'p': the loss is nan"):
        target_loss(CALCULATOR, params, PROBES, TARGETS, KEY)
