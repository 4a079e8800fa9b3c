"""One Newton step against really leaving documents out, on softmax regression."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError, DataError
from dh_jax.influence.estimator import score
from dh_jax.influence.newton import newton_step
from dh_jax.influence.objective import Objective, Scope

KEY = jax.random.PRNGKey(0)
N, PROBES, CLASSES, WIDTH, RIDGE = 160, 20, 4, 6, 0.02

rng = np.random.default_rng(0)
INPUTS = np.concatenate([rng.normal(size=(N + PROBES, WIDTH)), np.ones((N + PROBES, 1))], axis=1)
TRUTH = rng.normal(size=(WIDTH + 1, CLASSES))
LABELS = (INPUTS @ TRUTH + rng.gumbel(size=(N + PROBES, CLASSES))).argmax(axis=1)


def logits(params, batch):
    """Tokens are numbers of examples."""
    return jnp.asarray(INPUTS)[batch.tokens_BT] @ params["kernel"]


def loss(params, batch, key):
    log_p = jax.nn.log_softmax(logits(params, batch))
    picked = jnp.take_along_axis(log_p, batch.targets_BT[..., None], axis=-1)[..., 0]
    return jnp.where(batch.loss_mask_BT, -picked, 0)


def examples(numbers, row=1):
    """Examples as documents of one token, ``row`` of them to a row."""
    tokens = np.asarray(numbers, np.int32).reshape(-1, row)
    ids = np.broadcast_to(np.arange(1, row + 1, dtype=np.int32), tokens.shape)
    mask, zeros = np.ones(tokens.shape, bool), np.zeros(len(tokens), np.int32)
    return Batch(tokens, LABELS[tokens].astype(np.int32), mask, ids, 0 * tokens, zeros)


def minimum(kept):
    """The minimum of the mean loss plus ridge, by Newton's method in NumPy; n counts all."""
    x, y, w = INPUTS[kept], np.eye(CLASSES)[LABELS[kept]], np.zeros((WIDTH + 1, CLASSES))
    for _ in range(30):
        z = x @ w
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        gradient = x.T @ (p - y) + N * RIDGE * w
        bend = np.einsum("nv,vw->nvw", p, np.eye(CLASSES)) - np.einsum("nv,nw->nvw", p, p)
        H = np.einsum("ni,nj,nvw->ivjw", x, x, bend).reshape(w.size, w.size)
        step = np.linalg.solve(H + N * RIDGE * np.eye(w.size), gradient.ravel()).reshape(w.shape)
        w = w - step
        if np.abs(step).max() < 1e-12:
            return w
    raise AssertionError("no minimum found")


def probe_losses(w):
    z = INPUTS[N:] @ w
    return np.log(np.exp(z).sum(axis=1)) - z[np.arange(PROBES), LABELS[N:]]


@pytest.mark.parametrize("row", [1, 4])
def test_scores_are_the_changes_of_leaving_one_out(row):
    full = minimum(np.arange(N))
    truth = np.stack(
        [probe_losses(full) - probe_losses(minimum(np.delete(np.arange(N), i))) for i in range(N)],
        axis=1,
    )
    with jax.enable_x64(True):
        scope = Scope(max_segments=row, dtype="float64", chunk=20)
        estimator = newton_step(Objective(loss, logits), scope, ridge=RIDGE)
        params, data = {"kernel": jnp.asarray(full)}, [examples(np.arange(N), row)]
        state = estimator.fit(params, data, KEY)
        probe = [examples(np.arange(N, N + PROBES))]
        got = score(estimator, params, state, probe, data, KEY).values_KN
    assert np.corrcoef(got.ravel(), truth.ravel())[0, 1] > 0.995
    assert 0.95 < np.polyfit(got.ravel(), truth.ravel(), 1)[0] < 1.05


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match=r"needs Objective\.logits"):
        newton_step(Objective(loss), Scope())
    with pytest.raises(ConfigError, match="ridge is -1"):
        newton_step(Objective(loss, logits), Scope(), ridge=-1.0)
    large = {"kernel": jnp.zeros((WIDTH + 1, CLASSES)), "more": jnp.zeros(9000)}
    estimator = newton_step(Objective(loss, logits), Scope())
    with pytest.raises(ConfigError, match="a dense matrix of 9,028 parameters, above 8,192"):
        estimator.fit(large, [examples([0, 1])], KEY)
    with pytest.raises(DataError, match="nothing to invert"):
        blank = examples([0])
        blank = blank._replace(loss_mask_BT=np.zeros_like(blank.loss_mask_BT))
        estimator.fit({"kernel": jnp.zeros((WIDTH + 1, CLASSES))}, [blank], KEY)
