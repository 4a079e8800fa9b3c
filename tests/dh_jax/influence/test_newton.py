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


def test_a_ridge_keeps_the_directions_of_little_curvature():
    """Features of scale 500 beside others of scale 1, in float32, against dense float64: all
    curvature along the latter lies under the rounding of the former."""
    rng = np.random.default_rng(1)
    n, width, ridge = 40, 12, 2e-2
    x = (rng.normal(size=(n, width)) * np.where(np.arange(width) < 3, 500, 1)).astype(np.float32)
    w = rng.normal(size=(width, 2)) / np.where(np.arange(width) < 3, 1000, 2)[:, None]
    y = (rng.random(n) < 0.5).astype(np.int32)

    def of_rows(params, batch):
        return jnp.asarray(x)[batch.tokens_BT] @ params["kernel"]

    def nats(params, batch, key):
        log_p = jax.nn.log_softmax(of_rows(params, batch))
        return -jnp.take_along_axis(log_p, batch.targets_BT[..., None], axis=-1)[..., 0]

    wide = x.astype(np.float64)
    z = wide @ w
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    bend = np.einsum("nv,vw->nvw", p, np.eye(2)) - np.einsum("nv,nw->nvw", p, p)
    h = np.einsum("ni,nj,nvw->nivjw", wide, wide, bend).reshape(n, 2 * width, 2 * width)
    g = (wide[:, :, None] * (p - np.eye(2)[y])[:, None]).reshape(n, -1)
    H = h.sum(axis=0) + n * ridge * np.eye(2 * width)
    want = np.stack([-g @ np.linalg.solve(H - h[i], g[i]) for i in range(n)], axis=1)

    one = np.ones((n, 1), np.int32)
    tokens = np.arange(n, dtype=np.int32)[:, None]
    batch = Batch(tokens, y[:, None], one > 0, one, 0 * one, np.zeros(n, np.int32))
    estimator = newton_step(Objective(nats, of_rows), Scope(), ridge=ridge)
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    state = estimator.fit(params, [batch], KEY)
    got = score(estimator, params, state, [batch], [batch], KEY).values_KN
    assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)


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
