"""Labels of a Fisher matrix: the true ones, draws from the model, or every label by its weight.

Shapes: B rows, T tokens, V outputs.

Drawn labels are independent, so of a document's outer product ``(sum_t r_t g_t)(...)'`` only
``sum_t r_t^2 E[g_t g_t']`` is left in expectation. The Gauss-Newton matrix of a loss that weighs
targets by ``w_t`` is ``sum_t w_t E[g_t g_t']``: drawn labels count by the *root* of their weight,
which tells where a document's loss is the mean of T targets (``1 / sqrt(T)`` each). The true
labels' gradient is the document's own, and counts by ``w_t``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError, DataError
from dh_jax.functions import LogitsFn, Params
from dh_jax.influence.chunks import chunks_and_keys, from_chunks
from dh_jax.influence.documents import target_counts, target_weights
from dh_jax.influence.objective import Objective, Scope

Labels = Literal["sampled", "true", "all"]
Labelling = tuple[np.ndarray, np.ndarray]  # targets_BT int32, weights_BT float32
Draw = Callable[[Params, Batch, jax.Array], list[Labelling]]


def sample_targets(logits_fn: LogitsFn, params: Params, batch: Batch, key: jax.Array) -> Batch:
    """The batch with every target drawn anew from the model's softmax; masks stay.

    Tokens stay too: each target is drawn given the true text before it, which makes the expected
    outer product of a document's gradient its Gauss-Newton matrix (Kunstner et al. 2019,
    arXiv:1905.12558).
    """
    drawn_BT = jax.random.categorical(key, logits_fn(params, batch))
    return batch._replace(targets_BT=drawn_BT.astype(batch.targets_BT.dtype))


def label_source(objective: Objective, scope: Scope, labels: Labels, samples: int = 1) -> Draw:
    """``(params, batch, key) -> [(targets, weights), ...]``, whose weighted sum is the Fisher.

    Args:
        objective: with ``logits``, unless labels are true.
        scope: for the size of a chunk.
        labels: ``sampled`` draws from the model; ``true`` is the empirical Fisher; ``all`` takes
            each of the V labels by the root of its probability, which is exact, but only where a
            document has one target, since roots of several do not add up.
        samples: draws a target, of sampled labels.

    Raises:
        ConfigError: there is no such kind of labels, fewer than one sample, or no ``logits``.
    """
    if labels not in ("sampled", "true", "all"):
        raise ConfigError(f"labels {labels!r}; take 'sampled', 'true' or 'all'")
    if samples < 1:
        raise ConfigError(f"samples is {samples}; the least is 1")
    logits_fn = objective.logits
    if labels == "true":
        return lambda params, batch, key: [
            (np.asarray(batch.targets_BT), np.ones(batch.targets_BT.shape, np.float32))
        ]
    if logits_fn is None:
        raise ConfigError(f"labels {labels!r} need Objective.logits, the model's LogitsFn")
    model: LogitsFn = logits_fn

    def chunked(
        of_rows: Callable[[Params, Batch, jax.Array], jax.Array],
    ) -> Callable[[Params, Batch, jax.Array], jax.Array]:
        @jax.jit
        def run(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
            def visit(_: None, xs: tuple[Batch, jax.Array]) -> tuple[None, jax.Array]:
                return None, of_rows(params, *xs)

            _, out = jax.lax.scan(visit, None, chunks_and_keys(batch, scope.chunk, key))
            return from_chunks(out, batch.tokens_BT.shape[0])

        return run

    if labels == "sampled":
        draw = chunked(lambda p, rows, k: sample_targets(model, p, rows, k).targets_BT)

        def sampled(params: Params, batch: Batch, key: jax.Array) -> list[Labelling]:
            ours = jax.tree.map(jnp.asarray, batch)
            w_BT = np.asarray(target_weights(ours, scope.max_segments, scope.reduction))
            weights_BT = (samples * np.where(w_BT > 0, w_BT, 1)) ** -0.5  # w times it is the root
            keys = jax.random.split(key, samples)
            return [(np.asarray(draw(params, batch, k)), weights_BT) for k in keys]

        return sampled
    roots = chunked(lambda p, rows, k: jnp.exp(0.5 * jax.nn.log_softmax(model(p, rows))))

    def every(params: Params, batch: Batch, key: jax.Array) -> list[Labelling]:
        most = int(target_counts(jax.tree.map(jnp.asarray, batch), scope.max_segments).max())
        if most > 1:
            raise DataError(
                f"a document has {most} targets; labels 'all' are exact for one only: take "
                "'sampled' with more samples"
            )
        roots_BTV = np.asarray(roots(params, batch, key), np.float32)
        shape = batch.targets_BT.shape
        return [
            (np.full(shape, v, np.int32), roots_BTV[..., v]) for v in range(roots_BTV.shape[-1])
        ]

    return every
