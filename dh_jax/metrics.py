"""What the log says of a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dh_jax.batch import Batch, checksum
from dh_jax.data.loader import Loader
from dh_jax.distributed.agreement import of_all_shards
from dh_jax.distributed.mesh import loader_shard


class StepMetrics(NamedTuple):
    """What one training step reports; scalars float32 but for the per-source arrays."""

    loss: jax.Array  # mean nats a target over the global batch, before the update
    grad_norm: jax.Array
    loss_M: jax.Array  # the same by source; 0 for a source without targets in the batch
    targets_M: jax.Array


def train_record(
    step: int,
    metrics: StepMetrics,
    learning_rate: float,
    loader: Loader,
    mesh: Mesh,
    rows: Batch,
) -> dict[str, Any]:
    """What the log says of one step; called on every process.

    Args:
        step: from 1.
        metrics: of the step.
        learning_rate: that it was made with.
        loader: behind the batch.
        mesh: of the run.
        rows: this host's part of the batch.
    """
    tokens = tokens_by_source(loader, mesh)
    return {
        "kind": "train",
        "step": step,
        "loss": float(metrics.loss),
        "grad_norm": float(metrics.grad_norm),
        "learning_rate": learning_rate,
        "tokens": sum(tokens.values()),
        # Of one host's rows nothing can be told about the whole batch.
        "batch": checksum(rows) if loader_shard(mesh)[1] == 1 else None,
        "weights": loader.weights,
        "loss_by_source": {
            name: float(loss)
            for name, loss, targets in zip(
                loader.names, metrics.loss_M, metrics.targets_M, strict=True
            )
            if targets > 0
        },
        "tokens_by_source": tokens,
    }


def tokens_by_source(loader: Loader, mesh: Mesh) -> dict[str, int]:
    """Tokens that training was given so far, on all hosts together."""
    own = {name: source["tokens"] for name, source in loader.stats()["sources"].items()}
    if not loader.streamed:  # every host draws the rows of all
        return own
    shards = of_all_shards(own, mesh)
    return {name: sum(shard[name] for shard in shards) for name in own}
