"""English prose (Python's own reference manual) and a tiny decoder that reads it by letters.

Shapes: B rows, T tokens, K queries. A row is one document of 64 letters, of which no two overlap.
"""

from __future__ import annotations

import re
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._lds import Recipe
from dh_jax.batch import Batch
from dh_jax.config import ModelConfig
from dh_jax.influence.objective import Objective
from dh_jax.models import decoder, tapped

LENGTH = 64
TRAIN, QUERIES = 256, 64
VOCAB = 64
CONFIG = ModelConfig(
    width=32, layers=2, heads=4, kv_heads=4, mlp_width=72, tied=False, max_positions=LENGTH
)
RECIPE = Recipe(12, 8, optax.adamw(3e-3, b2=0.99, weight_decay=1e-2))


def rows() -> np.ndarray:
    """(TRAIN + QUERIES, LENGTH + 1) ids of letters, windows drawn from all over the manual."""
    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics))).lower()
    common = sorted(sorted(set(text)), key=text.count, reverse=True)[: VOCAB - 1]
    ids = {letter: i for i, letter in enumerate(sorted(common))}
    codes = np.array([ids.get(letter, VOCAB - 1) for letter in text], np.int32)
    width = LENGTH + 1
    windows = codes[: len(codes) // width * width].reshape(-1, width)
    chosen = np.random.default_rng(0).permutation(len(windows))[: TRAIN + QUERIES]
    return windows[chosen]


def as_batch(windows: np.ndarray) -> Batch:
    shape = (len(windows), LENGTH)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    ones, zeros = np.ones(shape, np.int32), np.zeros(len(windows), np.int32)
    return Batch(windows[:, :-1], windows[:, 1:], ones > 0, ones, places, zeros)


def objective(*, taps: bool) -> Objective:
    graph = decoder.abstract_graph(CONFIG, VOCAB)
    loss, logits = decoder.loss_fn(graph), decoder.logits_fn(graph)
    if not taps:
        return Objective(loss, logits)
    return Objective(
        loss,
        logits,
        tapped=tapped.tapped_loss_fn(graph),
        layers=tapped.tapped_layers(graph, decoder.abstract_params(CONFIG, VOCAB)),
        zero_taps=partial(tapped.zero_taps, graph),
    )


def init(key: jax.Array) -> Any:
    return decoder.build(CONFIG, VOCAB, key)[1]


def row_loss(windows: np.ndarray) -> Any:
    """``(params, numbers) -> mean loss``, for training."""
    loss, table = decoder.loss_fn(decoder.abstract_graph(CONFIG, VOCAB)), jnp.asarray(windows)

    def mean(params: Any, numbers: jax.Array) -> jax.Array:
        batch = jax.tree.map(jnp.asarray, as_batch_traced(table[numbers]))
        return loss(params, batch, jax.random.key(0)).mean()

    return mean


def as_batch_traced(windows: jax.Array) -> Batch:
    shape = (len(windows), LENGTH)
    ones = jnp.ones(shape, jnp.int32)
    places = jnp.broadcast_to(jnp.arange(LENGTH), shape)
    zeros = jnp.zeros(len(windows), jnp.int32)
    return Batch(windows[:, :-1], windows[:, 1:], ones > 0, ones, places, zeros)


def query_losses(windows: np.ndarray) -> Any:
    """``params -> loss_K``, the mean over each query's letters."""
    loss, table = decoder.loss_fn(decoder.abstract_graph(CONFIG, VOCAB)), jnp.asarray(windows)
    return lambda params: loss(params, as_batch_traced(table), jax.random.key(0)).mean(axis=1)
