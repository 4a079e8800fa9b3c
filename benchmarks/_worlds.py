"""Synthetic worlds whose best static mixture can be searched for, and a model small enough to.

A *language* says how likely each token is after the two before it. A source is a mixture of
languages, perhaps noisy, perhaps with few rows; a target is another mixture of languages, which
may change halfway. Training, probe and evaluation rows are drawn apart, and checked to be.

Shapes: M sources, L languages, P phases of the target, V tokens, N rows, T tokens of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from dh_jax.batch import Batch

M, L, P, V, T, WIDTH = 6, 8, 2, 24, 16, 24
ROWS = 8192  # of a source that is not scarce: under 3 epochs even if nothing else is read
PROBE_ROWS, EVAL_ROWS = 128, 512  # of each phase; a probe set is small, as real ones are
WORLDS = ("mixture", "scarce", "noisy", "outside", "transfer", "drift")

Floats = npt.NDArray[np.float64]


class World(NamedTuple):
    """What sources and target are made of."""

    cdf_LVVV: Floats  # cumulative probability of the next token after the last and the one before
    source_ML: Floats  # share of a source's rows in each language
    noise_M: Floats  # share of its tokens that are replaced at random
    rows_M: npt.NDArray[np.int32]  # rows it has; they repeat
    target_PL: Floats  # share of the target's rows in each language


class Data(NamedTuple):
    """Rows of a world, drawn by a seed; tokens int8, one more a row than there are targets."""

    train_MNT: npt.NDArray[np.int8]
    rows_M: npt.NDArray[np.int32]
    probe_PNT: npt.NDArray[np.int8]
    eval_PNT: npt.NDArray[np.int8]
    sources_MNT: npt.NDArray[np.int8]  # evaluation rows of every source, with its noise


def languages(seed: int) -> Floats:
    """(L, V, V, V) probabilities: six languages of their own and two that are related.

    Each has words that it likes (half of the vocabulary) and a grammar. Language 6 is halfway
    between 0 and 1; language 7 has the words of 0 and the grammar of 3.
    """
    rng = np.random.default_rng(seed)
    here_LVV = rng.normal(0, 1.3, (6, V, V))
    before_LVV = rng.normal(0, 0.9, (6, V, V))
    words_LV = np.where(rng.random((6, V)) < 0.5, 2.0, 0.0)
    here_LVV, before_LVV = (
        np.concatenate([g, 0.6 * (g[:1] + g[1:2]), g[3:4]]) for g in (here_LVV, before_LVV)
    )
    words_LV = np.concatenate([words_LV, (words_LV[:1] + words_LV[1:2]) / 2, words_LV[:1]])
    logits = here_LVV[:, :, None] + before_LVV[:, None] + words_LV[:, None, None]
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def world(name: str, seed: int) -> World:
    """One of `WORLDS`, of languages drawn by ``seed``.

    mixture: the target is .5, .3, .2 of three sources. scarce: the target's own source has 12
    rows, and half of another is in its language. noisy: half of the tokens of the target's own
    source are noise, and half of another's rows are clean. outside: no source is in the target's
    language, which is halfway between two. transfer: the target has the words of source 0 but
    the grammar of source 3. drift: the target is source 0's language at first, then source 1's.
    """
    own = np.eye(L)
    source_ML, noise_M, rows_M = np.eye(M, L), np.zeros(M), np.full(M, ROWS, np.int32)
    target_PL = np.tile(own[{"outside": 6, "transfer": 7}.get(name, 0)], (P, 1))
    if name == "mixture":
        target_PL[:] = 0.5 * own[0] + 0.3 * own[1] + 0.2 * own[2]
    if name == "drift":
        target_PL[1] = own[1]
    if name in ("scarce", "noisy"):
        source_ML[1] = 0.5 * own[0] + 0.5 * own[4]
    if name == "scarce":
        rows_M[0] = 12
    if name == "noisy":
        noise_M[0] = 0.5
    return World(np.cumsum(languages(seed), axis=-1), source_ML, noise_M, rows_M, target_PL)


def draw(world: World, seed: int) -> Data:
    """Rows of every kind; no row of a probe is one of the evaluation."""
    rng = np.random.default_rng((seed, 17))

    def rows(share_L: Floats, noise: float, count: int) -> npt.NDArray[np.int8]:
        language_N = rng.choice(L, count, p=share_L)
        tokens_NT = np.zeros((count, T + 3), np.int64)
        tokens_NT[:, :2] = rng.integers(0, V, (count, 2))
        for t in range(2, T + 3):
            cdf_NV = world.cdf_LVVV[language_N, tokens_NT[:, t - 1], tokens_NT[:, t - 2]]
            following_N = (rng.random((count, 1)) >= cdf_NV[:, :-1]).sum(axis=1)
            replaced_N = rng.random(count) < noise
            tokens_NT[:, t] = np.where(replaced_N, rng.integers(0, V, count), following_N)
        return tokens_NT[:, 2:].astype(np.int8)

    clean = np.zeros(M)
    train, sources = (
        np.stack([rows(*pair, count) for pair in zip(world.source_ML, noise, strict=True)])
        for noise, count in ((world.noise_M, ROWS), (clean, EVAL_ROWS))
    )
    probe, judged = (
        np.stack([rows(share_L, 0, count) for share_L in world.target_PL])
        for count in (PROBE_ROWS, EVAL_ROWS)
    )
    seen = {row.tobytes() for row in probe.reshape(-1, T + 1)}
    assert not any(row.tobytes() in seen for row in judged.reshape(-1, T + 1)), "disjoint"
    return Data(train, world.rows_M, probe, judged, sources)


def as_batch(tokens_NT: jax.Array, sources_N: jax.Array | None = None) -> Batch:
    """Rows as the library's noun. A row's first target has only one token before it; masked."""
    tokens_NT = tokens_NT.astype(jnp.int32)
    positions_NT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), tokens_NT[:, :-1].shape)
    ids_N = jnp.zeros(len(tokens_NT), jnp.int32) if sources_N is None else sources_N
    ones_NT = jnp.ones_like(positions_NT)
    return Batch(
        tokens_NT[:, :-1], tokens_NT[:, 1:], positions_NT > 0, ones_NT, positions_NT, ids_N
    )


# --- the model ---------------------------------------------------------------------------------


def init_params(key: jax.Array) -> dict[str, jax.Array]:
    """1,752 parameters: one hidden layer over the last two tokens."""
    shapes = {"last": (V, WIDTH), "before": (V, WIDTH), "out": (WIDTH, V)}
    keys = jax.random.split(key, len(shapes))
    drawn = {
        n: 0.3 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }
    return drawn | {"bias": jnp.zeros(V)}


def loss_fn(params: dict[str, jax.Array], batch: Batch, key: jax.Array) -> jax.Array:
    """(B, T) nats of the next token given the last two."""
    before_BT = jnp.pad(batch.tokens_BT, ((0, 0), (1, 0)))[:, :-1]
    hidden = jnp.tanh(params["last"][batch.tokens_BT] + params["before"][before_BT])
    logits_BTV = hidden @ params["out"] + params["bias"]
    chosen_BT = jnp.take_along_axis(logits_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
    return jnp.where(batch.loss_mask_BT, jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT, 0)
