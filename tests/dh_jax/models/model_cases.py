"""Small decoders of every family, and packed rows written without the library."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch
from dh_jax.config import ModelConfig
from dh_jax.models import decoder

V = 61
# Weights ten times the usual, so that attention is far from uniform and errors show.
LLAMA = ModelConfig(width=24, layers=2, heads=6, kv_heads=2, mlp_width=40, init_scale=0.2)
FAMILIES = {
    "llama": LLAMA,
    "llama untied": dataclasses.replace(LLAMA, tied=False, head_width=10),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, rope_theta=1e6),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_width=8, tied=False),
}


def build(config: ModelConfig, seed: int = 7, vocab_size: int = V) -> tuple[decoder.Graph, Any]:
    """A model whose scales and biases are drawn too, so that one in the wrong place shows."""
    graph, params = decoder.build(config, vocab_size, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    drawn = [
        x if name.endswith(("kernel", "embedding")) else jnp.float32(rng.uniform(0.5, 1.5, x.shape))
        for name, x in zip(by_path(params), leaves, strict=True)
    ]
    return graph, jax.tree.unflatten(tree, drawn)


def by_path(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def words(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(0, V, length)


def pack(rows: list[list[np.ndarray]], length: int) -> Batch:
    """Documents to rows, written without the library: the last token of each has no target."""
    tokens, targets, segments, positions = np.zeros((4, len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for b, documents in enumerate(rows):
        start = 0
        for s, document in enumerate(documents, start=1):
            end = start + len(document)
            tokens[b, start:end], segments[b, start:end] = document, s
            positions[b, start:end] = np.arange(len(document))
            targets[b, start : end - 1], mask[b, start : end - 1] = document[1:], True
            start = end
    return Batch(tokens, targets, mask, segments, positions, np.zeros(len(rows), np.int32))


def packed_rows(length: int = 50) -> Batch:
    rng = np.random.default_rng(4)
    return pack([[words(rng, 20), words(rng, 25)], [words(rng, 50)], [words(rng, 7)]], length)
