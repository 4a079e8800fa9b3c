"""Finding wrong labels by the influence of adapters: is this text documentation or program?

Shapes: B rows, T tokens, N training documents, K clean queries. A row is 16 tokens of Python's
manual or of its standard library and a question; the one target is the answer. Adapters of rank 4
on queries and values of the real SmolLM2-135M learn the answers, a fifth of which are wrong.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import numpy as np
import optax

from benchmarks._corpus import TOKENIZER, texts
from dh_jax.batch import Batch
from dh_jax.config import LoraConfig, ModelConfig
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.influence.empirical_fisher import datainf, woodbury
from dh_jax.influence.estimator import gather_gradients, score
from dh_jax.influence.first_order import gradient_dot
from dh_jax.influence.objective import Objective, Scope
from dh_jax.influence.per_document import per_document
from dh_jax.models import lora
from dh_jax.models.gguf import convert_gguf
from dh_jax.models.pretrained import load_pretrained

FOLDER = Path(".bench") / "smollm2"
WINDOW, N, K, WRONG, SEEDS = 16, 300, 100, 0.2, 3
PROMPT, WORDS = "\n\nIs this English or Python? It is", (" English", " Python")
ADAPTERS = LoraConfig(rank=4, alpha=8.0, targets="query|value")
EPOCHS, ROWS, RATE = 2, 10, 1e-3


class Texts:
    """Tokens of both kinds of text, and those of the two words."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        manual = " ".join(topics[name] for name in sorted(topics))
        library = "\n".join(texts()[:200])[: len(manual)]
        self.tokens = [np.asarray(tokenizer.encode(x), np.int32) for x in (manual, library)]
        self.prompt = np.asarray(tokenizer.encode(PROMPT), np.int32)
        words = [tokenizer.encode(word)[:1] for word in WORDS]
        self.words = np.concatenate(words).astype(np.int32)

    def draw(self, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [count, T], a window and the question; 0 for the manual, 1 for program."""
        rng = np.random.default_rng(seed)
        label_N = rng.integers(0, 2, count)
        at_N = [rng.integers(0, len(self.tokens[k]) - WINDOW) for k in label_N]
        rows = [self.tokens[k][a : a + WINDOW] for k, a in zip(label_N, at_N, strict=True)]
        return np.stack([np.concatenate([row, self.prompt]) for row in rows]), label_N

    def batch(self, tokens_BT: np.ndarray, label_B: np.ndarray) -> Batch:
        """Rows of which only the last target, the word, counts."""
        shape = tokens_BT.shape
        places = np.ascontiguousarray(np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape))
        mask = places == shape[1] - 1
        targets = np.where(mask, self.words[label_B][:, None], 0).astype(np.int32)
        ones, zeros = np.ones(shape, np.int32), np.zeros(len(tokens_BT), np.int32)
        return Batch(tokens_BT, targets, mask, ones, places, zeros)


def fitted(loss: Any, params: Any, batches: list[Batch]) -> Any:
    optimizer = optax.adam(RATE)

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


def cut(batch: Batch) -> list[Batch]:
    """Batches of a few rows: gradients of a batch's documents are made at once."""
    return [
        jax.tree.map(lambda x, i=i: x[i : i + ROWS], batch)
        for i in range(0, len(batch.tokens_BT), ROWS)
    ]


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
    if not FOLDER.exists():
        convert_gguf(TOKENIZER, FOLDER)
    source = Texts(TokenizerWrapper.load(FOLDER, add_eos=False))
    model = load_pretrained(FOLDER, ModelConfig(dtype="float32", scan_layers=True))
    graph, _ = lora.adapt(model.graph, model.params, ADAPTERS, jax.random.key(1))
    loss = lora.loss_fn(graph, model.params)
    scope, key = Scope(chunk=ROWS), jax.random.key(0)
    objective = Objective(loss)
    estimators = {
        "gradient dot": gradient_dot(objective, scope),
        "DataInf": datainf(objective, scope),
        "exact damped empirical Fisher": woodbury(objective, scope),
    }
    gradients = jax.jit(per_document(objective, scope).gradients)
    found: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        tokens, label_N = source.draw(100 + seed, N + K)
        wrong_N = rng.permutation(N) < WRONG * N
        given_N = np.where(wrong_N, 1 - label_N[:N], label_N[:N])
        train, queries = source.batch(tokens[:N], given_N), source.batch(tokens[N:], label_N[N:])
        order = np.concatenate([rng.permutation(N) for _ in range(EPOCHS)]).reshape(-1, ROWS)
        _, start = lora.adapt(model.graph, model.params, ADAPTERS, jax.random.key(seed))
        batches = [jax.tree.map(lambda x, r=r: x[r], train) for r in order]
        params = fitted(loss, start, batches)
        losses_N, losses_K = (
            np.asarray(jax.jit(loss)(params, x, key)).sum(axis=1) for x in (train, queries)
        )
        print(f"seed {seed}: {losses_K.mean():.3f} nats a clean query", flush=True)
        each = {"plain loss": losses_N}
        for name, estimator in estimators.items():
            state = estimator.fit(params, cut(train), key)
            scores = score(estimator, params, state, cut(queries), cut(train), key)
            each[name] = scores.values_KN.mean(axis=0)
        g, v = (gather_gradients(gradients, scope, params, cut(x), key) for x in (train, queries))
        each["DataInf, the formula by a loop"] = reference(
            jax.tree.map(np.asarray, g), jax.tree.map(np.asarray, v)
        )
        for name, values in each.items():
            found.setdefault(name, []).append(auc(values, wrong_N))
            print(f"  {name}: {found[name][-1]:.3f}", flush=True)
    print(f"\nlabels: {WRONG:.0%} of {N} labels wrong, {K} clean queries, {SEEDS} seeds\n")
    print("| | AUC, mean over seeds | least | most |\n| --- | ---: | ---: | ---: |")
    for name, values in found.items():
        print(f"| {name} | {np.mean(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    gap = np.abs(np.subtract(found["DataInf"], found["DataInf, the formula by a loop"])).max()
    print(f"\nDataInf and its formula differ by at most {gap:.4f}.")


if __name__ == "__main__":
    main()
