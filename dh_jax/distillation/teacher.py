"""A teacher: any model that gives logits, or hidden states and a head, seen without gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dh_jax.batch import Batch, TopKLogits
from dh_jax.distillation.losses import CHUNK, Teacher, TeacherHead
from dh_jax.distillation.sparse import sample_teacher, top_k
from dh_jax.distributed.mesh import row_ways
from dh_jax.distributed.placement import on_mesh
from dh_jax.errors import ConfigError
from dh_jax.functions import HiddenFn, LogitsFn, Params, StatesFn, round_matrices
from dh_jax.unembedding import map_tokens, unembed

Array: TypeAlias = jax.Array


class TeacherWrapper(NamedTuple):
    """A model and its parameters; made by `wrap_teacher`."""

    function: Callable[[Params, Batch], Teacher]  # static; without gradients
    params: Params
    fingerprint: str | None  # of the weights, for a cache
    rows: int  # of a batch that are split over devices

    def __call__(self, batch: Batch) -> Teacher:
        """Logits, or hidden states and head, of every token of a batch."""
        return self.function(self.params, batch)

    def top_k(
        self, batch: Batch, k: int, temperature: float = 1.0, key: Array | None = None,
        vocabulary: int | None = None,
    ) -> TopKLogits:  # fmt: skip
        """The K most probable ids of every token, or with a ``key`` K draws; compiled.

        Of a teacher of hidden states, logits exist for a chunk of tokens at a time.

        Args:
            batch: on the devices where the parameters are.
            k: K.
            temperature: divides the logits.
            key: see `sparse.sample_teacher`.
            vocabulary: ids from here on are padding of the teacher's table, and left out.
        """
        return _entries(
            self.function, self.params, batch, k, temperature, key, vocabulary, CHUNK * self.rows
        )


def wrap_teacher(
    params: Params,
    *,
    logits_fn: LogitsFn | None = None,
    hidden_fn: HiddenFn | StatesFn | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    fingerprint: str | None = None,
) -> TeacherWrapper:
    """A teacher from one of the two functions; nothing is drawn at random, no gradient flows.

    Args:
        params: arrays, placed on the mesh if there is one.
        logits_fn: ``(params, batch) -> logits_BTV``.
        hidden_fn: ``(params, batch) -> (hidden_BTD, head)``, which spares the table of logits; or
            with states of chosen layers behind them.
        dtype: round the parameters' matrices to this type, ``bfloat16``; None leaves them.
        mesh: what `constrain` in the model means.
        fingerprint: of the weights; see `fingerprint_of`.

    Raises:
        ConfigError: not exactly one function is given.
    """
    if (logits_fn is None) == (hidden_fn is None):
        raise ConfigError("a teacher is a logits_fn or a hidden_fn; give one of the two")

    def function(params: Params, batch: Batch) -> Teacher:
        if hidden_fn is not None:
            return jax.lax.stop_gradient(TeacherHead(*hidden_fn(params, batch)))
        assert logits_fn is not None
        return jax.lax.stop_gradient(logits_fn(params, batch))

    if dtype is not None:
        params = round_matrices(params, dtype)
    if mesh is not None:
        function = on_mesh(function, mesh)
    return TeacherWrapper(function, params, fingerprint, 1 if mesh is None else row_ways(mesh))


@partial(jax.jit, static_argnames=("function", "k", "temperature", "vocabulary", "chunk"))
def _entries(
    function: Callable[[Params, Batch], Teacher],
    params: Params,
    batch: Batch,
    k: int,
    temperature: float,
    key: Array | None,
    vocabulary: int | None,
    chunk: int,
) -> TopKLogits:
    outputs = function(params, batch)
    assert not isinstance(outputs, TopKLogits)
    states, head = outputs[:2] if isinstance(outputs, TeacherHead) else (outputs, None)
    keys = None if key is None else jax.random.split(key, batch.tokens_BT.shape)

    def one(given: Any) -> TopKLogits:
        states_BC, data = given
        logits_BCV = states_BC if head is None else unembed(states_BC, head)
        logits_BCV = logits_BCV[..., :vocabulary]
        if data is None:
            return top_k(logits_BCV, k, temperature)
        return sample_teacher(logits_BCV, k, jax.random.wrap_key_data(data), temperature)

    data = None if keys is None else jax.random.key_data(keys)
    found: TopKLogits = map_tokens(one, (states, data), chunk)
    return found


def fingerprint_of(weights: Any, *facts: Any) -> str:
    """128 bits of BLAKE2b, in hex, over a model's weights.

    Args:
        weights: the folder of a checkpoint (its config.json and safetensors files are read), or
            a pytree of arrays.
        facts: what else decides the numbers, e.g. the type of activations.
    """
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    if isinstance(weights, str | Path):
        files = [*Path(weights).glob("*.safetensors"), Path(weights) / "config.json"]
        for name in sorted(files):
            digest.update(name.name.encode())
            with name.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        array = np.asarray(jnp.asarray(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
