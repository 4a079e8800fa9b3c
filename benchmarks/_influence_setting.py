"""Models and data of `benchmarks.influence`, which torch children read from ``.bench/influence``.

Two Llamas over random text: *small* (2 layers, width 128, 0.37 M parameters, 8 rows of 64 tokens)
for products and DataInf, *wide* (4 layers, width 128, 256 rows of 64 tokens, 16 queries) for
EK-FAC. Speed does not depend on what the text says.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dh_jax.batch import Batch
from dh_jax.config import ModelConfig
from dh_jax.influence.objective import Objective
from dh_jax.models import decoder, tapped
from dh_jax.models.pretrained import save_pretrained

FOLDER = Path(".bench/influence")
VOCAB, LENGTH = 256, 64


def config(name: str) -> ModelConfig:
    layers, mlp = {"small": (2, 256), "wide": (4, 384)}[name]
    return ModelConfig(
        width=128,
        layers=layers,
        heads=4,
        kv_heads=4,
        mlp_width=mlp,
        tied=False,
        max_positions=LENGTH,
    )


def params_of(name: str) -> Any:
    """Drawn the same every time, wider than usual so that attention is not uniform."""
    params = decoder.build(config(name), VOCAB, jax.random.key(0))[1]
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)


def objective(name: str) -> Objective:
    graph = decoder.abstract_graph(config(name), VOCAB)
    return Objective(
        decoder.loss_fn(graph),
        decoder.logits_fn(graph),
        tapped=tapped.tapped_loss_fn(graph),
        layers=tapped.tapped_layers(graph, decoder.abstract_params(config(name), VOCAB)),
        zero_taps=partial(tapped.zero_taps, graph),
    )


def windows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (count, LENGTH + 1), dtype=np.int32)


def as_batch(windows: np.ndarray) -> Batch:
    shape = (len(windows), LENGTH)
    ones = np.ones(shape, np.int32)
    places = np.ascontiguousarray(np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape))
    zeros = np.zeros(len(windows), np.int32)
    return Batch(windows[:, :-1], windows[:, 1:], ones > 0, ones, places, zeros)


def write() -> None:
    """The weights as Hugging Face folders."""
    for name in ("small", "wide"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        FOLDER.mkdir(parents=True, exist_ok=True)
        save_pretrained(FOLDER / name, config(name), params_of(name))
