"""Linear datamodeling scores: do sums of scores foretell what retraining on subsets does?

Shapes: K queries, N training documents, M subsets, R runs, P parameters.

For each query the losses of the models retrained on the subsets are compared, by Spearman's rank
correlation, with the sums of its scores over each subset (Park et al. 2023, arXiv:2303.14186).
Positive scores are harmful, so a larger sum foretells a larger loss.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

FOLDER = Path(".bench/attribution")


class Truth(NamedTuple):
    """What retraining gave."""

    subsets_MN: np.ndarray  # bool, half of the documents each
    losses_SMK: np.ndarray  # of the queries, for every seed and subset

    def with_seeds(self, count: int) -> Truth:
        return self._replace(losses_SMK=self.losses_SMK[:count])


class Recipe(NamedTuple):
    """How a model is trained, the whole one and those on subsets alike."""

    epochs: int
    batch: int
    optimizer: optax.GradientTransformation


Init = Callable[[jax.Array], Any]
MeanLoss = Callable[[Any, jax.Array], jax.Array]  # (params, rows of a batch) -> mean loss


def half_subsets(N: int, M: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = np.zeros((M, N), bool)
    for row in out:
        row[rng.permutation(N)[: N // 2]] = True
    return out


def trainer(init: Init, loss: MeanLoss, recipe: Recipe) -> Callable[..., Any]:
    """``(rows_n, key) -> params``: one training run on the documents of these numbers.

    An epoch goes through all of them in a new order; what does not fill a batch is left out.
    """

    def run(rows_n: jax.Array, key: jax.Array) -> Any:
        start, order = jax.random.split(key)
        steps = len(rows_n) // recipe.batch
        params = init(start)

        def epoch(carry: Any, k: jax.Array) -> tuple[Any, None]:
            mixed = jax.random.permutation(k, rows_n)[: steps * recipe.batch]

            def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
                params, state = carry
                slope = jax.grad(loss)(params, rows)
                updates, state = recipe.optimizer.update(slope, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, carry, mixed.reshape(steps, recipe.batch))

        keys = jax.random.split(order, recipe.epochs)
        (params, _), _ = jax.lax.scan(epoch, (params, recipe.optimizer.init(params)), keys)
        return params

    return run


def retrained(
    name: str,
    train: Callable[..., Any],
    query_losses: Callable[[Any], jax.Array],
    subsets_MN: np.ndarray,
    seeds: int,
    together: int,
) -> Truth:
    """Losses of models retrained on every subset, ``seeds`` times; kept on disk a seed at a time.

    Args:
        name: of the file; it says all that the result depends on.
        train: from `trainer`.
        query_losses: ``params -> loss_K``.
        subsets_MN: see `half_subsets`.
        seeds: runs a subset.
        together: runs in one program.
    """
    rows_Mn = jnp.asarray([np.flatnonzero(row) for row in subsets_MN])
    go = jax.jit(jax.vmap(lambda rows, key: query_losses(train(rows, key))))
    every = []
    for seed in range(seeds):
        path = FOLDER / f"{name}-{seed}.npy"
        if not path.exists():
            FOLDER.mkdir(parents=True, exist_ok=True)
            keys = jax.random.split(jax.random.key(1000 + seed), len(rows_Mn))
            parts = [
                np.asarray(go(rows_Mn[i : i + together], keys[i : i + together]))
                for i in range(0, len(rows_Mn), together)
            ]
            np.save(path, np.concatenate(parts))
        every.append(np.load(path))
    return Truth(subsets_MN, np.stack(every))


def lds(scores_KN: np.ndarray, truth: Truth) -> tuple[float, float]:
    """Mean rank correlation over queries, and its standard error (jackknife over ten groups of
    subsets, which all queries share)."""
    foretold_MK = truth.subsets_MN @ np.asarray(scores_KN, np.float64).T
    losses_MK = truth.losses_SMK.mean(axis=0)
    M = len(losses_MK)
    folds = [np.arange(M) % 10 != i for i in range(10)]
    left = [_spearman(foretold_MK[keep], losses_MK[keep]) for keep in folds]
    error = (9 / 10 * np.square(left - np.mean(left)).sum()) ** 0.5
    return _spearman(foretold_MK, losses_MK), float(error)


def ceiling(truth: Truth) -> float:
    """What the mean over all seeds is worth: split-half rank correlation, stepped up."""
    half = len(truth.losses_SMK) // 2
    if not half:
        return float("nan")
    a, b = truth.losses_SMK[:half].mean(axis=0), truth.losses_SMK[half : 2 * half].mean(axis=0)
    r = _spearman(a, b)
    return (2 * r / (1 + r)) ** 0.5


def _spearman(a_MK: np.ndarray, b_MK: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(x, axis=0), axis=0).astype(float) for x in (a_MK, b_MK)]
    a, b = (x - x.mean(axis=0) for x in ranks)
    return float(np.mean((a * b).sum(axis=0) / (len(a) ** 3 - len(a)) * 12))
