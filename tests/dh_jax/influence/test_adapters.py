"""Estimators on low-rank adapters beside a frozen decoder, and LESS's features of Adam's steps."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dh_jax.config import LoraConfig, ModelConfig
from dh_jax.errors import ConfigError
from dh_jax.influence.empirical_fisher import datainf, woodbury
from dh_jax.influence.estimator import score
from dh_jax.influence.objective import Objective, Scope
from dh_jax.influence.projection import Adam, projection
from dh_jax.influence.sketch import Sketch, project
from dh_jax.models import decoder, lora
from tests.dh_jax.influence import tiny

KEY = jax.random.key(3)
N, K, T = 5, 2, 6
SCOPE = Scope(chunk=3)


@functools.cache
def problem():
    """A loss over adapters, adapters that are not at their start, rows, and their gradients."""
    config = ModelConfig(width=8, layers=1, heads=2, kv_heads=2, mlp_width=8, max_positions=T)
    graph, base = decoder.build(config, tiny.VOCAB, KEY)
    graph, adapters = lora.adapt(graph, base, LoraConfig(rank=2, targets="query|up"), KEY)
    loss = lora.loss_fn(graph, jax.tree.map(lambda x: 5 * x, base))
    keys = iter(jax.random.split(KEY, 8))
    adapters = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), adapters)
    rng = np.random.default_rng(0)
    train, probe = (
        tiny.pack([[rng.integers(0, tiny.VOCAB, T)] for _ in range(count)], T) for count in (N, K)
    )

    slope = jax.jit(jax.grad(lambda adapters, row: loss(adapters, row, KEY).sum()))

    def slopes(batch):
        rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(len(batch[0]))]
        return [slope(adapters, row) for row in rows]

    return loss, adapters, train, probe, slopes(train), slopes(probe)


@pytest.mark.slow
def test_datainf_and_the_damped_fisher_of_adapters_are_their_formulas():
    loss, adapters, train, probe, g, v = problem()
    dense_g, dense_v = (np.array([ravel_pytree(x)[0] for x in y], np.float64) for y in (g, v))

    level = 0.1 * np.square(dense_g).mean()
    fisher = dense_g.T @ dense_g / N + level * np.eye(dense_g.shape[1])
    want = -dense_v @ np.linalg.solve(fisher, dense_g.T)
    estimator = woodbury(Objective(loss), SCOPE)
    state = estimator.fit(adapters, [train], KEY)
    got = score(estimator, adapters, state, [probe], [train], KEY).values_KN
    assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)
    assert estimator.coverage(adapters) == 1  # of what is trained

    want = np.zeros((K, N))
    for leaves_g, leaves_v in zip(*(zip(*map(jax.tree.leaves, x)) for x in (g, v)), strict=True):  # noqa: B905
        G, V = (np.array([np.ravel(x) for x in y], np.float64) for y in (leaves_g, leaves_v))
        level = 0.1 * np.square(G).mean()
        inverse = sum(np.eye(G.shape[1]) - np.outer(x, x) / (level + x @ x) for x in G) / (
            N * level
        )
        want -= V @ inverse @ G.T
    estimator = datainf(Objective(loss), SCOPE)
    state = estimator.fit(adapters, [train], KEY)
    got = score(estimator, adapters, state, [probe], [train], KEY).values_KN
    assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


@pytest.mark.slow
def test_features_of_adams_steps_are_those_of_an_update_on_each_document():
    optax = pytest.importorskip("optax")
    loss, adapters, train, probe, g, v = problem()
    optimizer = optax.scale_by_adam()
    state = optimizer.init(adapters)
    for slope in g[:3]:
        _, state = optimizer.update(slope, state)
    sketch = Sketch(64)

    def sketched(tree):
        flat = {"/".join(k.key for k in path): x for path, x in jax.tree.leaves_with_path(tree)}
        phi = np.array(sum(project(sketch, path, x[None])[0] for path, x in flat.items()))
        return phi / np.linalg.norm(phi)

    steps = [optimizer.update(slope, state)[0] for slope in g]
    want = -np.array([sketched(x) for x in v]) @ np.array([sketched(x) for x in steps]).T
    adam = Adam(state.count, state.mu, state.nu)
    estimator = projection(Objective(loss), SCOPE, size=64, kernel="cosine", adam=adam)
    fitted = estimator.fit(adapters, [train], KEY)
    got = score(estimator, adapters, fitted, [probe], [train], KEY).values_KN
    np.testing.assert_allclose(got, want, atol=1e-5)
    plain = -np.array([sketched(x) for x in v]) @ np.array([sketched(x) for x in g]).T
    assert np.abs(want - plain).max() > 0.05  # the steps are not the gradients
    with pytest.raises(ConfigError, match="adam belongs to kernel 'cosine'"):
        projection(Objective(loss), SCOPE, kernel="trak", adam=adam)
