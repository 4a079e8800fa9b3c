"""Finding wrong labels by the influence of adapters: is this text prose or program?

Shapes: B rows, N training documents, K clean queries. A row is 32 letters and, as target of the
last one, one of two labels. A tiny decoder is first trained to read both kinds of text, then
adapters of rank 4 on all its linear layers learn the labels, of which a fifth are wrong.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import _text
from benchmarks._corpus import texts
from dh_jax.batch import Batch
from dh_jax.config import LoraConfig
from dh_jax.influence.empirical_fisher import datainf, woodbury
from dh_jax.influence.estimator import gather_gradients, score
from dh_jax.influence.first_order import gradient_dot
from dh_jax.influence.objective import Objective, Scope
from dh_jax.influence.per_document import per_document
from dh_jax.models import decoder, lora

LENGTH, N, K, WRONG, SEEDS = 32, 300, 100, 0.2, 5
LABELS = (61, 62)  # letters that hardly come
STEPS = 400


def windows(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, LENGTH) letters and 0 for prose, 1 for program."""
    rng = np.random.default_rng(seed)
    prose = " ".join(_text.topics[name] for name in sorted(_text.topics))
    kinds = [re.sub(r"\s+", " ", text).lower() for text in (prose, " ".join(texts()[:200]))]
    both = kinds[0] + kinds[1]
    common = sorted(sorted(set(both)), key=both.count, reverse=True)[: LABELS[0]]
    ids = {letter: i for i, letter in enumerate(common)}
    label_N = rng.integers(0, 2, count)
    at_N = [rng.integers(0, len(kinds[k]) - LENGTH) for k in label_N]
    rows = [kinds[k][a : a + LENGTH] for k, a in zip(label_N, at_N, strict=True)]
    letters = [[ids.get(letter, 63) for letter in row] for row in rows]
    return np.array(letters, np.int32), label_N


def as_batch(letters: np.ndarray, label_N: np.ndarray | None = None) -> Batch:
    """With labels only the last target counts; without, all letters but the first are targets."""
    shape = letters.shape
    last = np.zeros(len(letters), np.int32) if label_N is None else np.take(LABELS, label_N)
    targets = np.concatenate([letters[:, 1:], last[:, None]], axis=1).astype(np.int32)
    is_last = np.broadcast_to(np.arange(shape[1]) == shape[1] - 1, shape)
    mask = ~is_last if label_N is None else is_last
    places = np.ascontiguousarray(np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape))
    ones, zeros = np.ones(shape, np.int32), np.zeros(len(letters), np.int32)
    return Batch(letters, targets, np.ascontiguousarray(mask), ones, places, zeros)


def fitted(loss: Any, params: Any, batches: list[Batch], rate: float) -> Any:
    optimizer = optax.adam(rate)

    @jax.jit
    def step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
        slope = jax.grad(
            lambda p: loss(p, batch, jax.random.key(0)).sum() / batch.loss_mask_BT.sum()
        )(params)
        updates, state = optimizer.update(slope, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for batch in batches:
        params, state = step(params, state, batch)
    return params


def auc(score_N: np.ndarray, wrong_N: np.ndarray) -> float:
    """How often a wrong label scores above a right one."""
    above = score_N[wrong_N][:, None] > score_N[~wrong_N]
    return float(above.mean())


def reference(gradients: dict[str, np.ndarray], probe: dict[str, np.ndarray]) -> np.ndarray:
    """DataInf's formula, document by document, in float64; the mean query's scores."""
    total = np.zeros(N)
    for path, stored in gradients.items():
        g = stored.reshape(N, -1).astype(np.float64)
        v = probe[path].reshape(K, -1).astype(np.float64).mean(axis=0)
        level = 0.1 * np.mean(g**2)
        if level == 0:
            continue
        moved = np.zeros_like(v)
        for g_i in g:
            moved += (v - (v @ g_i) / (level + g_i @ g_i) * g_i) / (N * level)
        total -= g @ moved
    return total


def main() -> None:
    base_graph, base = decoder.build(_text.CONFIG, _text.VOCAB, jax.random.key(0))
    letters, _ = windows(1, 32 * STEPS)
    batches = [as_batch(letters[i : i + 32]) for i in range(0, len(letters), 32)]
    base = fitted(decoder.loss_fn(base_graph), base, batches, 3e-3)
    config = LoraConfig(rank=4, alpha=8.0, targets="attention|mlp")
    graph, _ = lora.adapt(base_graph, base, config, jax.random.key(1))
    loss = lora.loss_fn(graph, base)
    scope, key = Scope(chunk=50), jax.random.key(0)
    objective = Objective(loss)
    estimators = {
        "gradient dot": gradient_dot(objective, scope),
        "DataInf": datainf(objective, scope),
        "exact damped empirical Fisher": woodbury(objective, scope),
    }
    door = per_document(objective, scope)
    gradients = jax.jit(door.gradients)
    found: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        letters, label_N = windows(100 + seed, N + K)
        wrong_N = rng.permutation(N) < WRONG * N
        given_N = np.where(wrong_N, 1 - label_N[:N], label_N[:N])
        train, queries = as_batch(letters[:N], given_N), as_batch(letters[N:], label_N[N:])
        order = np.concatenate([rng.permutation(N) for _ in range(10)]).reshape(-1, 30)
        _, start = lora.adapt(base_graph, base, config, jax.random.key(seed))
        params = fitted(loss, start, [jax.tree.map(lambda x, r=r: x[r], train) for r in order], 3e-3)
        each = {"plain loss": np.asarray(loss(params, train, key)).sum(axis=1)}
        for name, estimator in estimators.items():
            state = estimator.fit(params, [train], key)
            scores = score(estimator, params, state, [queries], [train], key)
            each[name] = scores.values_KN.mean(axis=0)
        g, v = (gather_gradients(gradients, scope, params, [x], key) for x in (train, queries))
        each["DataInf, the formula by a loop"] = reference(
            jax.tree.map(np.asarray, g), jax.tree.map(np.asarray, v)
        )
        each["mean query loss"] = np.asarray(loss(params, queries, key)).sum(axis=1)
        for name, values in each.items():
            if name == "mean query loss":
                print(f"seed {seed}: {values.mean():.3f} nats a clean query")
            else:
                found.setdefault(name, []).append(auc(values, wrong_N))
    print(f"\nlabels: {WRONG:.0%} of {N} labels wrong, {K} clean queries, {SEEDS} seeds\n")
    print("| | AUC, mean over seeds | least | most |\n| --- | ---: | ---: | ---: |")
    for name, values in found.items():
        print(f"| {name} | {np.mean(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    gap = np.abs(np.subtract(found["DataInf"], found["DataInf, the formula by a loop"])).max()
    print(f"\nDataInf and its formula differ by at most {gap:.4f}.")


if __name__ == "__main__":
    main()
