"""From inner products alone comes what the gradients themselves give."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dh_jax.errors import DataError
from dh_jax.influence.alignment import source_alignment
from dh_jax.influence.calculator import DataInfCalculator
from dh_jax.influence.inner_products import (
    InnerProducts,
    alignment_of,
    influence_of,
    refuse_broken,
)
from dh_jax.influence.sources import source_influence
from tests.dh_jax.influence import tiny

KEY = jax.random.PRNGKey(3)
T = 16
TARGETS = {"second": 0.25, "first": 0.75}
CALCULATOR = DataInfCalculator(tiny.sequence_loss, damping=0.2)


def rows_of(rng, count):
    return {
        name: tiny.pack([[row] for row in rng.integers(0, tiny.VOCAB, (count, T))], T)
        for name in ("first", "second", "third")
    }


def products_of(params, sources, probes):
    """Row by row with plain autodiff, in float64; the table of one tensor after the other."""

    def gradient(batch, rows):
        def mean(params):
            loss_BT = tiny.sequence_loss(params, batch, KEY) * batch.loss_mask_BT
            each = [loss_BT[b].sum() / max(batch.loss_mask_BT[b].sum(), 1) for b in rows]
            return sum(each) / len(each)

        found = jax.tree_util.tree_flatten_with_path(jax.grad(mean)(params))[0]
        return {jax.tree_util.keystr(p): np.asarray(x, np.float64).ravel() for p, x in found}

    rows = [gradient(x, [b]) for x in sources.values() for b in range(len(x.tokens_BT))]
    rows += [gradient(probes[name], range(len(probes[name].tokens_BT))) for name in TARGETS]
    tables = {}
    for name in rows[0]:
        stacked = np.stack([row[name] for row in rows])
        tables[name] = stacked @ stacked.T
    return InnerProducts(
        tables,
        {name: rows[0][name].size for name in tables},
        {name: x.loss_mask_BT.any(1) for name, x in sources.items()},
        TARGETS,
    )


@pytest.fixture(scope="module")
def measured():
    rng = np.random.default_rng(0)
    params = tiny.sequence_params(KEY)
    sources, probes = rows_of(rng, 3), rows_of(rng, 2)
    sources["second"].loss_mask_BT[1] = False
    return params, sources, probes, products_of(params, sources, probes)


def test_influence_is_that_of_the_gradients(measured):
    params, sources, probes, products = measured
    want = source_influence(CALCULATOR, params, sources, probes, TARGETS, KEY)
    refuse_broken(products)
    np.testing.assert_allclose(influence_of(products, 0.2), want, rtol=2e-5)


def test_alignment_and_norms_are_those_of_the_gradients(measured):
    params, sources, probes, products = measured
    want = source_alignment(CALCULATOR, params, sources, probes, TARGETS, KEY)
    np.testing.assert_allclose(alignment_of(products), want, rtol=2e-5)


def test_a_tensor_through_which_nothing_acts_counts_nothing(measured):
    products = measured[-1]
    count = len(next(iter(products.by_tensor.values())))
    still = products._replace(
        by_tensor=products.by_tensor | {"still": np.zeros((count, count))},
        entries=products.entries | {"still": 7},
    )
    np.testing.assert_array_equal(influence_of(still, 0.2), influence_of(products, 0.2))


@pytest.mark.parametrize(
    ("place", "said"), [(3, "source 'second' \\(1 of 3 rows\\)"), (10, "probe 'first'")]
)
def test_a_gradient_that_is_not_finite_is_named(measured, place, said):
    products = measured[-1]
    tables = {name: table.copy() for name, table in products.by_tensor.items()}
    tables[next(iter(tables))][place] = np.nan
    with pytest.raises(DataError, match=said):
        refuse_broken(products._replace(by_tensor=tables))
