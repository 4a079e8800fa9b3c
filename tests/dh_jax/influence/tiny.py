"""Small losses over `Batch`, written apart from the library's models."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch

VOCAB, WIDTH = 11, 4

# Compiled whole, since each operation of its own takes a tenth of a second to compile.
drawn = functools.partial(jax.jit, static_argnames="dtype")


@drawn
def sequence_params(key, dtype=jnp.float32):
    keys = jax.random.split(key, 3)
    draw = [jax.random.normal(k, s, dtype) for k, s in zip(keys, SHAPES, strict=True)]
    return {
        "embed": draw[0],
        "mix": {"kernel": draw[1]},
        "head": {"kernel": draw[2], "bias": jnp.zeros(VOCAB, dtype)},
    }


SHAPES = ((VOCAB, WIDTH), (WIDTH, WIDTH), (WIDTH, VOCAB))


def cross_entropy(logits_BTV, batch):
    log_p = jax.nn.log_softmax(logits_BTV)
    nats = -jnp.take_along_axis(log_p, batch.targets_BT[..., None], axis=-1)[..., 0]
    return jnp.where(batch.loss_mask_BT, nats, 0)


@jax.jit
def sequence_logits(params, batch):
    """Next token from its own embedding and the mean of its document so far."""
    x = params["embed"][batch.tokens_BT]
    ids, t = batch.segment_ids_BT, jnp.arange(batch.tokens_BT.shape[1])
    seen = (ids[:, :, None] == ids[:, None, :]) & (t[:, None] >= t)
    share = seen / seen.sum(axis=-1, keepdims=True)
    past = jnp.einsum("bts,bsd->btd", share.astype(x.dtype), x)
    h = x + jnp.tanh(past @ params["mix"]["kernel"])
    return h @ params["head"]["kernel"] + params["head"]["bias"]


@jax.jit
def sequence_loss(params, batch, key):
    return cross_entropy(sequence_logits(params, batch), batch)


@drawn
def mlp_params(key, dtype=jnp.float32):
    a, b = jax.random.split(key)
    return {
        "in": jax.random.normal(a, (VOCAB, 6), dtype),
        "out": jax.random.normal(b, (6, VOCAB), dtype),
    }


@jax.jit
def mlp_loss(params, batch, key):
    """A two-layer perceptron of each token alone."""
    x = jax.nn.one_hot(batch.tokens_BT, VOCAB, dtype=params["in"].dtype)
    return cross_entropy(jnp.tanh(x @ params["in"]) @ params["out"], batch)


def pack(rows, length, source=0):
    """Rows of documents (integer arrays) as a NumPy Batch; targets never cross a document."""
    shape = (len(rows), length)
    tokens, targets, ids, positions = (np.zeros(shape, np.int32) for _ in range(4))
    mask = np.zeros(shape, bool)
    for b, documents in enumerate(rows):
        at = 0
        for s, document in enumerate(documents, start=1):
            n = len(document)
            tokens[b, at : at + n] = document
            targets[b, at : at + n - 1] = document[1:]
            mask[b, at : at + n - 1] = True
            ids[b, at : at + n] = s
            positions[b, at : at + n] = np.arange(n)
            at += n
    return Batch(tokens, targets, mask, ids, positions, np.full(len(rows), source, np.int32))


def random_rows(rng, rows, length):
    """Rows of one to four random documents that do not quite fill them."""
    out = []
    for _ in range(rows):
        cuts = np.sort(rng.choice(np.arange(2, length - 1), rng.integers(0, 4), replace=False))
        edges = [0, *cuts, length - int(rng.integers(0, 2))]
        out.append([rng.integers(0, VOCAB, b - a) for a, b in itertools.pairwise(edges)])
    return out


def target_counts(batch, max_segments):
    """(B, S) valid targets of each document, by NumPy."""
    own = batch.segment_ids_BT[..., None] == np.arange(1, max_segments + 1)
    return (own & batch.loss_mask_BT[..., None]).sum(axis=1)
