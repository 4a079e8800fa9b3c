"""What every process of a run must see alike: weights, decisions, states of all loaders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dh_jax.distributed.mesh import loader_shard


def from_first_host(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights that process 0 passes, on every process; call it on all of them.

    Loaders of one run must change their weights at the same step and to the same values, since
    each plans the whole order of rows by itself. Weights that come from arrays replicated over
    the mesh agree anyway; those that a person or a clock decides go through here::

        loader.set_weights(from_first_host(weights))

    Args:
        weights: source name -> weight, of the same names on every process.

    Returns:
        The same names with the values of process 0, to the last bit.
    """
    if jax.process_count() == 1:
        return dict(weights)
    values = np.array([weights[name] for name in sorted(weights)], np.float64)
    # As bytes: JAX would make float32 of float64.
    agreed = np.asarray(multihost_utils.broadcast_one_to_all(values.view(np.uint8)))
    shared = dict(zip(sorted(weights), agreed.view(np.float64).tolist(), strict=True))
    return {name: shared[name] for name in weights}


def gather(value: Any) -> list[Any]:
    """A JSON-able value of every process, in the order of processes; call it on all of them."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([text.size], np.int32)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(texts, lengths, strict=True)]


def of_all_shards(value: Any, mesh: Mesh) -> list[Any]:
    """A JSON-able value of every shard of rows, each once, in their order; call it everywhere."""
    index, count = loader_shard(mesh)
    if count == 1:
        return [value]
    by_index = dict(gather([index, value]))
    return [by_index[i] for i in range(count)]


def any_host(flag: bool) -> bool:
    """Whether any process says so; call it on all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array([flag])).any())


def wait_for_all(name: str) -> None:
    """Go on once every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
