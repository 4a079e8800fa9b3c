"""Handwritten digits (scikit-learn's copy of the UCI set) and a small perceptron over `Batch`.

Shapes: B rows, K queries. A row is one image: its only token is the image's number, its only
target the digit. 64 -> 32 -> 32 -> 10, 3,466 parameters.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._lds import Recipe
from dh_jax.batch import Batch
from dh_jax.functions import TappedLayer, cross_entropy
from dh_jax.influence.objective import Objective

SIZES = (64, 32, 32, 10)
TRAIN, QUERIES = 1200, 200
RECIPE = Recipe(
    40, 50, optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.05, momentum=0.9))
)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1], float32 [1797, 64], and labels, in an order drawn once."""
    path = Path(".bench/digits/sklearn/datasets/data/digits.csv.gz")
    if not path.exists():
        raise SystemExit(
            "the digits are missing: pip install --no-deps --target .bench/digits scikit-learn"
        )
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    table = table[np.random.default_rng(0).permutation(len(table))]
    return table[:, :64] / 16, table[:, 64].astype(np.int32)


def as_batch(numbers: np.ndarray, labels: np.ndarray) -> Batch:
    shape = (len(numbers), 1)
    tokens = np.asarray(numbers, np.int32).reshape(shape)
    targets = labels[numbers].astype(np.int32).reshape(shape)
    one, zero = np.ones(shape, np.int32), np.zeros(shape, np.int32)
    return Batch(tokens, targets, one > 0, one, zero, zero[:, 0])


def init(key: jax.Array, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """As torch begins: uniformly within one over the root of the inputs."""
    out = {}
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        key, k, bias = jax.random.split(key, 3)
        bound = a**-0.5
        out[str(i)] = {
            "kernel": jax.random.uniform(k, (a, b), minval=-bound, maxval=bound),
            "bias": jax.random.uniform(bias, (b,), minval=-bound, maxval=bound),
        }
    return out


def forward(params: dict[str, Any], x: jax.Array, taps: dict[str, jax.Array] | None = None) -> Any:
    """Logits, and what met each layer."""
    met = {}
    for i in range(len(params)):
        layer = params[str(i)]
        met[str(i)] = x
        x = x @ layer["kernel"] + layer["bias"]
        if taps is not None and str(i) in taps:
            x = x + taps[str(i)]
        if i + 1 < len(params):
            x = jax.nn.relu(x)
    return x, met


def objective(images: np.ndarray, layers: int = 3) -> Objective:
    """The perceptron as the library sees it; images are looked up by number."""
    table = jnp.asarray(images)

    def logits(params: Any, batch: Batch) -> jax.Array:
        return forward(params, table[batch.tokens_BT])[0]

    def loss(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        nats = cross_entropy(logits(params, batch), batch.targets_BT)
        return jnp.where(batch.loss_mask_BT, nats, 0.0)

    def tapped(params: Any, taps: Any, batch: Batch, key: jax.Array) -> Any:
        z, met = forward(params, table[batch.tokens_BT], taps)
        nats = cross_entropy(z, batch.targets_BT)
        kept = {name: x for name, x in met.items() if name in taps}
        return jnp.where(batch.loss_mask_BT, nats, 0.0), kept

    def zero_taps(params: Any, batch: Batch) -> dict[str, jax.Array]:
        shape = batch.tokens_BT.shape
        return {name: jnp.zeros((*shape, x["bias"].size)) for name, x in params.items()}

    names = [str(i) for i in range(layers)]
    found = {n: TappedLayer("linear", f"{n}/kernel", f"{n}/bias") for n in names}
    return Objective(loss, logits, tapped=tapped, layers=found, zero_taps=zero_taps)


def row_loss(images: np.ndarray, labels: np.ndarray) -> Any:
    """``(params, numbers) -> mean loss``, for training."""
    table, truth = jnp.asarray(images), jnp.asarray(labels)

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        return cross_entropy(forward(params, table[rows])[0], truth[rows]).mean()

    return loss


def query_losses(images: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> Any:
    table, truth = jnp.asarray(images[numbers]), jnp.asarray(labels[numbers])
    return lambda params: cross_entropy(forward(params, table)[0], truth)
