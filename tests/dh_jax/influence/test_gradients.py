"""Selection of parameters, chunks of rows, and gradients against finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dh_jax.errors import ConfigError
from dh_jax.influence.chunks import from_chunks, to_chunks
from dh_jax.influence.gradients import row_gradients, select
from tests.dh_jax.influence import tiny

PARAMS = {
    "layers": [{"up": jnp.ones((2, 3)), "down": jnp.ones(4)}, {"up": jnp.zeros((1, 2))}],
    "step": jnp.int32(3),
}


def test_selection_by_path_and_back():
    selection = select(PARAMS, r"/up$")
    assert sorted(selection.blocks) == ["layers/0/up", "layers/1/up"]
    assert selection.coverage == 8 / 12  # integers are not trainable
    merged = selection.merge({k: v + 5 for k, v in selection.blocks.items()})
    np.testing.assert_array_equal(merged["layers"][0]["up"], np.full((2, 3), 6))
    np.testing.assert_array_equal(merged["layers"][0]["down"], np.ones(4))
    assert merged["step"] == 3
    assert select(PARAMS).coverage == 1


def test_a_flax_nnx_state_can_be_selected_from():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    selection = select(state, "kernel")
    assert [x.shape for x in selection.blocks.values()] == [(2, 3)]
    merged = selection.merge({k: v * 0 for k, v in selection.blocks.items()})
    assert jax.tree.structure(merged) == jax.tree.structure(state)
    np.testing.assert_array_equal(merged["kernel"][...], np.zeros((2, 3)))


def test_bad_patterns_are_refused():
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        select(PARAMS, "(")
    with pytest.raises(ConfigError, match=r"'step' matches none of 3 .* layers/0/down"):
        select(PARAMS, "step")


@pytest.mark.parametrize(
    ("rows", "most"), [(1, 1), (1, 8), (8, 8), (9, 8), (7, 3), (12, 5), (10, 4), (5, 1)]
)
def test_chunks_hold_every_row_once_and_repeats_have_nothing_to_learn(rows, most):
    batch = tiny.pack([[np.full(3, b % tiny.VOCAB)] for b in range(rows)], 4)
    batch = batch._replace(source_ids_B=np.arange(rows, dtype=np.int32))
    chunks = jax.jit(to_chunks, static_argnums=1)(batch, most)
    steps, size = chunks.source_ids_B.shape
    assert size <= most and steps == -(-rows // most)
    again = from_chunks(chunks, rows)
    jax.tree.map(np.testing.assert_array_equal, again, batch)
    learnt = np.asarray(chunks.source_ids_B)[np.asarray(chunks.loss_mask_BT).any(axis=-1)]
    assert sorted(learnt) == list(range(rows))


def test_row_gradients_agree_with_finite_differences():
    with jax.enable_x64(True):
        params = tiny.sequence_params(jax.random.PRNGKey(0), jnp.float64)
        batch = tiny.pack(tiny.random_rows(np.random.default_rng(0), 3, 9), 9)
        got = row_gradients(tiny.sequence_loss, select(params), batch, jax.random.PRNGKey(1))

        def means(kernel):
            moved = params | {"mix": {"kernel": jnp.asarray(kernel)}}
            loss = np.asarray(tiny.sequence_loss(moved, batch, None))
            return loss.sum(axis=1) / batch.loss_mask_BT.sum(axis=1)

        kernel, small = np.asarray(params["mix"]["kernel"]), 1e-6
        for i, j in ((0, 0), (1, 3), (3, 2)):
            nudge = np.zeros_like(kernel)
            nudge[i, j] = small
            slope = (means(kernel + nudge) - means(kernel - nudge)) / (2 * small)
            np.testing.assert_allclose(got["mix/kernel"][:, i, j], slope, rtol=1e-6, atol=1e-9)
