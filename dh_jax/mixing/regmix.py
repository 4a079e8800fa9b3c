"""RegMix's pure parts: mixtures to try, a regression on what they gave, the best it predicts.

Training the proxies is no part of it. NumPy, since this runs once and on the host.

Shapes: N proxies, M sources, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dh_jax.errors import ConfigError

RIDGES = tuple(10.0**k for k in range(-8, 3))  # strengths that are compared


class Regression(NamedTuple):
    """A ridge regression of loss on the features of a mixture."""

    quadratic: bool
    centre_F: np.ndarray  # float64, mean of the features
    coefficients_F: np.ndarray  # float64
    intercept: float  # nats
    error: float  # root mean square error of leave-one-out predictions, nats
    left_out_N: np.ndarray  # float64, each proxy's loss as predicted by a fit on all others, nats


def sample_mixtures(
    rng: np.random.Generator,
    prior_M: np.ndarray,
    count: int,
    *,
    strengths: tuple[float, float] = (0.1, 5.0),
    least: float = 2e-4,
) -> np.ndarray:
    """(N, M) mixtures to train proxies on, from Dirichlet distributions about a prior.

    Args:
        rng: where randomness comes from.
        prior_M: the configured weights.
        count: N.
        strengths: least and greatest total concentration; drawn evenly in the logarithm.
        least: smaller shares become 0.

    References:
        Liu et al. 2025, arXiv:2407.01492, section 3.1, and the released code, which tempers the
        prior by a square root, as we do. Deviation: no limit on epochs (bounds are the policy's).
    """
    prior_M = np.sqrt(np.asarray(prior_M, np.float64))
    prior_M = prior_M / prior_M.sum()
    low, high = np.log(strengths)
    strength_N = np.exp(rng.uniform(low, high, count))
    # A Dirichlet is a normalised row of gammas; tiny concentrations can make all of them 0.
    weights_NM = rng.standard_gamma(prior_M * strength_N[:, None]) + prior_M * 1e-12
    weights_NM /= weights_NM.sum(axis=1, keepdims=True)
    weights_NM[weights_NM < least] = 0
    return np.asarray(weights_NM / weights_NM.sum(axis=1, keepdims=True))


def fit(weights_NM: np.ndarray, losses_N: np.ndarray, *, quadratic: bool = True) -> Regression:
    """Regress the target's loss on the weights; the ridge is chosen by leaving one out.

    Args:
        weights_NM: mixtures that proxies were trained on.
        losses_N: what each gave, nats a target.
        quadratic: with all products of two weights; else linear.

    Returns:
        The regression; ``error`` says how far it predicts a mixture it has not seen.

    References:
        Liu et al. 2025, arXiv:2407.01492, section 3.2: linear regression, or LightGBM. Deviation:
        ridge on quadratic features in place of boosted trees, which want the paper's 512 proxies;
        with a few dozen of them, products are what the data can tell.

    Raises:
        ConfigError: fewer than 3 proxies, or a loss that is not finite.
    """
    losses_N = np.asarray(losses_N, np.float64)
    if len(losses_N) < 3 or not np.isfinite(losses_N).all():
        raise ConfigError(
            f"{len(losses_N)} proxies, {int(np.isfinite(losses_N).sum())} with a finite loss; "
            "a regression needs at least 3, all finite"
        )
    features_NF = _features(weights_NM, quadratic)
    centre_F, intercept = features_NF.mean(axis=0), losses_N.mean()
    u_NK, s_K, v_KF = np.linalg.svd(features_NF - centre_F, full_matrices=False)
    centred_N = losses_N - intercept
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for ridge in RIDGES:
        shrink_K = s_K**2 / (s_K**2 + ridge)
        leverage_N = (u_NK**2 * shrink_K).sum(axis=1) + 1 / len(losses_N)
        residual_N = centred_N - u_NK @ (shrink_K * (u_NK.T @ centred_N))
        left_out_N = losses_N - residual_N / (1 - leverage_N).clip(min=1e-6)
        error = float(np.sqrt(np.mean((losses_N - left_out_N) ** 2)))
        if best is None or error < best[0]:
            coefficients_F = v_KF.T @ (s_K / (s_K**2 + ridge) * (u_NK.T @ centred_N))
            best = error, coefficients_F, left_out_N
    assert best is not None
    error, coefficients_F, left_out_N = best
    return Regression(quadratic, centre_F, coefficients_F, float(intercept), error, left_out_N)


def predict(regression: Regression, weights_NM: np.ndarray) -> np.ndarray:
    """(N,) predicted losses, nats a target."""
    features_NF = _features(weights_NM, regression.quadratic)
    centred_NF = features_NF - regression.centre_F
    return np.asarray(centred_NF @ regression.coefficients_F + regression.intercept)


def best_weights(
    rng: np.random.Generator,
    regression: Regression,
    prior_M: np.ndarray,
    *,
    candidates: int = 100_000,
    top: int = 100,
) -> np.ndarray:
    """(M,) the mean of the ``top`` mixtures of lowest predicted loss among random candidates.

    References:
        Liu et al. 2025, arXiv:2407.01492, section 3.3 (a million candidates, the mean of 100).
    """
    weights_NM = sample_mixtures(rng, prior_M, candidates)
    predicted_N = predict(regression, weights_NM)
    chosen = np.argpartition(predicted_N, top)[:top]
    return np.asarray(weights_NM[chosen].mean(axis=0))


def _features(weights_NM: np.ndarray, quadratic: bool) -> np.ndarray:
    weights_NM = np.asarray(weights_NM, np.float64)
    if not quadratic:
        return weights_NM
    rows, columns = np.triu_indices(weights_NM.shape[1])
    return np.concatenate([weights_NM, weights_NM[:, rows] * weights_NM[:, columns]], axis=1)
