"""RegMix's parts on losses whose best mixture is known."""

from __future__ import annotations

import numpy as np
import pytest

from dh_jax.errors import ConfigError
from dh_jax.mixing import regmix

PRIOR = np.array([0.4, 0.3, 0.2, 0.1])
BEST = np.array([0.1, 0.5, 0.15, 0.25])


def bowl(weights):
    return 2 + 3 * np.square(weights - BEST).sum(axis=-1)


def test_mixtures_are_mixtures_from_nearly_single_sources_to_the_tempered_prior():
    mixtures = regmix.sample_mixtures(np.random.default_rng(0), PRIOR, 20_000)
    np.testing.assert_allclose(mixtures.sum(axis=1), 1)
    assert ((mixtures == 0) | (mixtures >= 2e-4)).all()
    np.testing.assert_allclose(
        mixtures.mean(axis=0), np.sqrt(PRIOR) / np.sqrt(PRIOR).sum(), atol=0.01
    )
    assert (mixtures.max(axis=1) > 0.99).mean() > 0.1


def test_the_regression_finds_the_bottom_of_a_bowl():
    rng = np.random.default_rng(1)
    tried = regmix.sample_mixtures(rng, PRIOR, 60)
    model = regmix.fit(tried, bowl(tried) + rng.normal(0, 1e-3, 60))
    found = regmix.best_weights(rng, model, PRIOR, candidates=50_000, top=50)
    np.testing.assert_allclose(found, BEST, atol=0.05)
    assert found.sum() == pytest.approx(1)
    unseen = regmix.sample_mixtures(rng, PRIOR, 500)
    error = np.sqrt(np.mean((regmix.predict(model, unseen) - bowl(unseen)) ** 2))
    assert error < 0.01 and model.error == pytest.approx(1e-3, rel=1.5)


def test_leaving_one_out_is_what_refitting_without_it_predicts(monkeypatch):
    """The closed form against as many fits as there are proxies, at one strength."""
    rng = np.random.default_rng(2)
    tried = regmix.sample_mixtures(rng, PRIOR, 12)
    losses = bowl(tried) + rng.normal(0, 0.3, 12)
    monkeypatch.setattr(regmix, "RIDGES", (0.05,))
    model = regmix.fit(tried, losses, quadratic=False)
    errors = []
    for i in range(12):
        keep = np.arange(12) != i
        x, y = tried[keep], losses[keep]
        # A ridge that leaves the intercept alone, about the mean of all rows' features.
        one = np.column_stack([np.ones(11), x - tried.mean(axis=0)])
        penalty = np.diag([0, *[0.05] * 4])
        solution = np.linalg.solve(one.T @ one + penalty, one.T @ y)
        errors.append(losses[i] - np.array([1, *(tried[i] - tried.mean(axis=0))]) @ solution)
    assert model.error == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-6)


def test_a_linear_regression_of_linear_losses_is_exact():
    rng = np.random.default_rng(3)
    slope = np.array([1.0, -2.0, 0.5, 3.0])
    tried = regmix.sample_mixtures(rng, PRIOR, 10)
    model = regmix.fit(tried, tried @ slope, quadratic=False)
    unseen = regmix.sample_mixtures(rng, PRIOR, 10)
    np.testing.assert_allclose(regmix.predict(model, unseen), unseen @ slope, atol=1e-6)


@pytest.mark.parametrize("losses", [[1.0, 2.0], [1.0, np.nan, 2.0, 3.0]])
def test_proxies_without_a_loss_are_refused(losses):
    tried = regmix.sample_mixtures(np.random.default_rng(0), PRIOR, len(losses))
    with pytest.raises(ConfigError, match="at least 3, all finite"):
        regmix.fit(tried, np.array(losses))
