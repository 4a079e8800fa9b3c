"""Leaving one document out of softmax regression on digits, and training to the end again.

Shapes: N documents, K queries, D inputs with a 1, C classes, P = D C parameters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _digits
from dh_jax.influence.ekfac import ekfac
from dh_jax.influence.estimator import score
from dh_jax.influence.first_order import gradient_dot
from dh_jax.influence.newton import newton_step
from dh_jax.influence.objective import Objective, Scope

N, K, LEFT_OUT, CLASSES = 1200, 100, 60, 10
RIDGES = (1e-3, 3e-4)  # of the mean loss


def probabilities(theta_DC: np.ndarray, x_ND: np.ndarray) -> np.ndarray:
    z = x_ND @ theta_DC
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def hessian(theta_DC: np.ndarray, x_ND: np.ndarray, ridge: float) -> np.ndarray:
    """Of the summed loss with its ridge."""
    p = probabilities(theta_DC, x_ND)
    D, P = x_ND.shape[1], theta_DC.size
    H = np.zeros((D, CLASSES, D, CLASSES))
    for a in range(CLASSES):
        for b in range(CLASSES):
            weights = p[:, a] * ((a == b) - p[:, b])
            H[:, a, :, b] = (x_ND * weights[:, None]).T @ x_ND
    return H.reshape(P, P) + ridge * np.eye(P)


def minimum(theta_DC: np.ndarray, x_ND: np.ndarray, y_N: np.ndarray, ridge: float) -> np.ndarray:
    """By Newton's method, in float64, to a gradient of 1e-9."""
    onehot = np.eye(CLASSES)[y_N]
    for _ in range(50):
        slope = x_ND.T @ (probabilities(theta_DC, x_ND) - onehot) + ridge * theta_DC
        if np.abs(slope).max() < 1e-9:
            return theta_DC
        step = np.linalg.solve(hessian(theta_DC, x_ND, ridge), slope.ravel())
        theta_DC = theta_DC - step.reshape(theta_DC.shape)
    raise SystemExit("Newton's method did not end")


def losses(theta_DC: np.ndarray, x_KD: np.ndarray, y_K: np.ndarray) -> np.ndarray:
    return -np.log(probabilities(theta_DC, x_KD)[np.arange(len(y_K)), y_K])


def main() -> None:
    print(f"\none: {LEFT_OUT} of {N} documents left out, {K} queries\n")
    print("| | ridge | Pearson | slope of the truth on it |\n| --- | ---: | ---: | ---: |")
    for ridge in RIDGES:
        compare(ridge)


def compare(ridge: float) -> None:
    images, labels = _digits.digits()
    x = np.concatenate([images, np.ones((len(images), 1))], axis=1).astype(np.float64)
    train, queries = np.arange(N), np.arange(N, N + K)
    theta = minimum(np.zeros((65, CLASSES)), x[train], labels[train], N * ridge)
    with_all_K = losses(theta, x[queries], labels[queries])
    out = np.random.default_rng(0).permutation(N)[:LEFT_OUT]
    actual_KN = np.stack(
        [
            losses(minimum(theta, x[rest], labels[rest], N * ridge), x[queries], labels[queries])
            - with_all_K
            for rest in (np.delete(train, d) for d in out)
        ],
        axis=1,
    )

    def change(theta_DC: np.ndarray, rows: np.ndarray) -> np.ndarray:
        p = probabilities(theta_DC, x[rows]) - np.eye(CLASSES)[labels[rows]]
        return (x[rows][:, :, None] * p[:, None, :]).reshape(len(rows), -1)

    g, v = change(theta, out), change(theta, queries)
    first_order_KN = v @ np.linalg.solve(hessian(theta, x[train], N * ridge), g.T)

    params = {"0": {"kernel": jnp.asarray(theta[:-1]), "bias": jnp.asarray(theta[-1])}}
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    objective = _digits.objective(images, layers=1)
    plain = Objective(objective.loss, objective.logits)
    key, scope = jax.random.key(0), Scope(chunk=200)
    batches = [_digits.as_batch(rows, labels) for rows in (train, queries, out)]
    foretold = {"influence function (dense, float64)": first_order_KN}
    for name, estimator in {
        "one Newton step": newton_step(plain, scope, ridge=ridge),
        "EK-FAC, all labels": ekfac(objective, scope, labels="all"),
        "gradient dot": gradient_dot(plain, scope),
    }.items():
        state = estimator.fit(params, batches[:1], key)
        scores = score(estimator, params, state, batches[1:2], batches[2:], key).values_KN
        foretold[name] = -scores / (1 if name == "one Newton step" else N)
    for name, guess_KN in foretold.items():
        r = np.corrcoef(guess_KN.ravel(), actual_KN.ravel())[0, 1]
        slope = (guess_KN * actual_KN).sum() / np.square(guess_KN).sum()
        print(f"| {name} | {ridge} | {r:.4f} | {slope:.2f} |")


if __name__ == "__main__":
    main()
