"""Text from a decoder, a token at a time: greedy or sampled, with a cache of keys and values.

Prompts of a batch stand at the right of its first P columns, so that every row writes into the
same column. They are read in one pass (`_prefill`), and a compiled loop (`_decode`) then runs one
token at a time through the layers, each of which attends to the keys and values it kept. Both are
compiled once for a shape: rows, P (rounded up), new tokens; and for which filters are on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike, NDArray

from dh_jax.errors import ConfigError
from dh_jax.models.attention import Attend
from dh_jax.models.kernels import blocked
from dh_jax.models.rotary import rotary_angles
from dh_jax.models.taps import Tape

if TYPE_CHECKING:
    from dh_jax.models.decoder import Block, Decoder, Graph, Params

Array: TypeAlias = jax.Array

PROMPT_STEP = 64  # prompts are padded to a multiple of it, so that few lengths are compiled


class Sampling(NamedTuple):
    """How the next token is drawn. A filter that is None is off."""

    temperature: float | None = None  # None or 0: the likeliest token, whatever the filters
    top_k: int | None = None  # among the k likeliest (Fan et al. 2018), and their equals
    top_p: float | None = None  # among the likeliest that together have probability p
    # (Holtzman et al. 2020), and their equals; of what top_k left


GREEDY = Sampling()


class Generated(NamedTuple):
    """What was written behind B prompts, N tokens at most; host arrays."""

    tokens_BN: NDArray[np.int32]  # without the prompts; 0 behind a row's end
    lengths_B: NDArray[np.int32]  # tokens of each row, its stop token included
    stopped_B: NDArray[np.bool_]  # whether its last one is a stop token


class _State(NamedTuple):
    """A batch half written; S = P + N columns."""

    tokens_BS: Array  # int32
    column: Array  # int32, the next one to write; the one before has not been read yet
    starts_B: Array  # int32, the first column of each prompt
    lengths_B: Array  # int32, tokens written
    stopped_B: Array
    keys_B: Array  # random, a row's own: a row's text does not depend on how many others there are
    cache: dict[str, Array]  # keys and values of a layer [B, S, K, h]; one axis more if scanned


def generate(
    graph: Graph,
    params: Params,
    prompts: Sequence[ArrayLike],
    new_tokens: int,
    *,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    key: Array | None = None,
) -> Generated:
    """Continue token sequences.

    Args:
        graph: from `decoder.build`, `load_pretrained` or `lora.adapt`.
        params: its parameters; with adapters, from `lora.combine`. Kernels in the dtype of the
            activations save time where that is bfloat16.
        prompts: B sequences of ids, of any lengths from 1.
        new_tokens: N, the most that are written behind each. Positions are those of one document
            that goes on; a model made for fewer (``max_positions``) gets worse, with no error.
        stop_ids: a row ends behind the first of these.
        sampling: greedy unless it has a temperature.
        key: draws the tokens; None: ``jax.random.key(0)``. Row i depends on the key and on i.

    Raises:
        ConfigError: a prompt is empty or has an id outside the vocabulary, or a setting is out
            of its range.
    """
    *_, last = stream(
        graph, params, prompts, new_tokens, stop_ids=stop_ids, sampling=sampling, key=key,
        every=new_tokens,
    )  # fmt: skip
    return last


def stream(
    graph: Graph,
    params: Params,
    prompts: Sequence[ArrayLike],
    new_tokens: int,
    *,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    every: int = 1,
) -> Iterator[Generated]:
    """`generate`, looked at while it goes on: what there is after every ``every`` tokens.

    Raises:
        ConfigError: ``every`` is below 1; or as `generate`.
    """
    tokens_BP, starts_B = _aligned(graph, params, prompts, new_tokens)
    sampling = _checked(sampling)
    if every < 1:
        raise ConfigError(f"every is {every}; the least is 1")
    key = jax.random.key(0) if key is None else key
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(starts_B)))
    stop_ids_E = jnp.asarray(list(stop_ids), jnp.int32)
    state = _prefill(graph, new_tokens, params, tokens_BP, starts_B, keys_B, stop_ids_E, sampling)
    prompt, written = tokens_BP.shape[1], 1
    while True:
        found = jax.device_get((state.tokens_BS[:, prompt:], state.lengths_B, state.stopped_B))
        yield Generated(*found)
        if written == new_tokens or found[2].all():
            return
        written = min(written + every, new_tokens)
        state = _decode(graph, params, state, prompt + written, stop_ids_E, sampling)


def _aligned(
    graph: Graph, params: Params, prompts: Sequence[ArrayLike], new_tokens: int
) -> tuple[Array, Array]:
    """Prompts at the right of P columns, and where each begins."""
    rows = [np.asarray(prompt) for prompt in prompts]
    if new_tokens < 1:
        raise ConfigError(f"new_tokens is {new_tokens}; the least is 1")
    if not rows:
        raise ConfigError("there are no prompts; give at least one sequence of ids")
    vocab_size = len(params["embed"]["embedding"])
    for i, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            raise ConfigError(
                f"prompt {i} has shape {row.shape}; give at least one token, for example BOS"
            )
        strange = row[(row < 0) | (row >= vocab_size)]
        if len(strange):
            raise ConfigError(
                f"prompt {i} has the id {strange[0]}, but the model's vocabulary has {vocab_size}; "
                "give the tokenizer the model was trained with"
            )
    model: Any = nnx.merge(graph, params)
    longest = max(map(len, rows))
    limit = model.rotary.longest
    if limit is not None and longest + new_tokens > limit:
        raise ConfigError(
            f"{longest} tokens of a prompt and {new_tokens} new ones: rope_scaling 'dynamic' is "
            f"computed up to max_positions {limit}; write at most {max(limit - longest, 0)}"
        )
    columns = -(-longest // PROMPT_STEP) * PROMPT_STEP
    columns = columns if limit is None else min(columns, limit)
    tokens_BP = np.zeros((len(rows), columns), np.int32)
    for out_P, row in zip(tokens_BP, rows, strict=True):
        out_P[columns - len(row) :] = row
    starts_B = np.array([columns - len(row) for row in rows], np.int32)
    return jnp.asarray(tokens_BP), jnp.asarray(starts_B)


def _checked(sampling: Sampling) -> Sampling:
    """Filters without effect become None, which is part of what is compiled."""
    temperature, top_k, top_p = sampling
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature}; it must be 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}; the least is 1, and None leaves all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if not temperature:
        return GREEDY
    return sampling._replace(top_p=None if top_p == 1 else top_p)


# --- the compiled part -----------------------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    graph: Graph,
    new_tokens: int,
    params: Params,
    tokens_BP: Array,
    starts_B: Array,
    keys_B: Array,
    stop_ids_E: Array,
    sampling: Sampling,
) -> _State:
    """Read the prompts; write the first token."""
    model: Decoder = nnx.merge(graph, params)
    B, P = tokens_BP.shape
    positions_BP = jnp.arange(P) - starts_B[:, None]
    segment_ids_BP = (positions_BP >= 0).astype(jnp.int32)

    def keep(given: dict[str, Array], left: dict[str, Array]) -> Attend:
        del given

        def attend(q_BTHh: Array, k_BTKh: Array, v_BTKh: Array) -> Array:
            room = ((0, 0), (0, new_tokens), (0, 0), (0, 0))
            left["key"], left["value"] = jnp.pad(k_BTKh, room), jnp.pad(v_BTKh, room)
            return blocked(q_BTHh, k_BTKh, v_BTKh, segment_ids_BP)

        return attend

    hidden_BPD, cache = _forward(model, tokens_BP, positions_BP.clip(min=0), keep, {})
    state = _State(
        tokens_BS=jnp.pad(tokens_BP, ((0, 0), (0, new_tokens))),
        column=jnp.int32(P),
        starts_B=starts_B,
        lengths_B=jnp.zeros(B, jnp.int32),
        stopped_B=jnp.zeros(B, bool),
        keys_B=keys_B,
        cache=cache,
    )
    return _write(state, model.logits(hidden_BPD[:, -1:])[:, 0], stop_ids_E, sampling)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    graph: Graph,
    params: Params,
    state: _State,
    until: int,
    stop_ids_E: Array,
    sampling: Sampling,
) -> _State:
    """Write on up to column ``until``, or till every row has stopped."""
    model: Decoder = nnx.merge(graph, params)
    columns = state.tokens_BS.shape[1]

    def going_on(state: _State) -> Array:
        return (state.column < until) & ~state.stopped_B.all()

    def one_token(state: _State) -> _State:
        last = state.column - 1
        seen_BS = jnp.arange(columns) <= last
        seen_BS = seen_BS & (jnp.arange(columns) >= state.starts_B[:, None])

        def keep(given: dict[str, Array], left: dict[str, Array]) -> Attend:
            def attend(q_BTHh: Array, k_BTKh: Array, v_BTKh: Array) -> Array:
                for name, new in (("key", k_BTKh), ("value", v_BTKh)):
                    left[name] = jax.lax.dynamic_update_slice_in_dim(given[name], new, last, 1)
                return jax.nn.dot_product_attention(
                    q_BTHh, left["key"], left["value"], mask=seen_BS[:, None, None],
                    implementation="xla",
                )  # fmt: skip

            return attend

        tokens_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BS, last, 1, axis=1)
        positions_B1 = (last - state.starts_B)[:, None]
        hidden_B1D, cache = _forward(model, tokens_B1, positions_B1, keep, state.cache)
        logits_BV = model.logits(hidden_B1D)[:, 0]
        return _write(state._replace(cache=cache), logits_BV, stop_ids_E, sampling)

    return jax.lax.while_loop(going_on, one_token, state)


def _forward(
    model: Decoder, tokens_BT: Array, positions_BT: Array, keep: Any, cache: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """Hidden states and the new cache; ``keep(given, left)`` attends with a layer's part of it."""
    angles = rotary_angles(model.rotary, positions_BT)

    def one(block: Block, x_BTD: Array, given: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        left: dict[str, Array] = {}
        return block(x_BTD, angles, keep(given, left), Tape()), left

    return model.through(tokens_BT, one, cache, Tape())


def _write(state: _State, logits_BV: Array, stop_ids_E: Array, sampling: Sampling) -> _State:
    """Choose the next token of every row that has not stopped."""
    keys_B = jax.vmap(jax.random.fold_in, (0, 0))(state.keys_B, state.lengths_B)
    tokens_B = jnp.where(state.stopped_B, 0, choose(logits_BV, sampling, keys_B))
    stops_B = (tokens_B[:, None] == stop_ids_E).any(1)
    return state._replace(
        tokens_BS=jax.lax.dynamic_update_slice_in_dim(
            state.tokens_BS, tokens_B[:, None], state.column, axis=1
        ),
        column=state.column + 1,
        lengths_B=state.lengths_B + ~state.stopped_B,
        stopped_B=state.stopped_B | stops_B,
    )


def choose(logits_BV: Array, sampling: Sampling, keys_B: Array) -> Array:
    """The next token of every row, int32 ``[B]``; greedy where the temperature is None."""
    if sampling.temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    kept_BV = truncate(logits_BV, sampling)
    return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)


def truncate(logits_BV: Array, sampling: Sampling) -> Array:
    """Logits over the temperature, minus infinity where a filter leaves a token out."""
    if sampling.temperature is not None:
        logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return logits_BV
    falling_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
    kept_B = jnp.full(len(logits_BV), logits_BV.shape[-1])  # how many of the likeliest
    if sampling.top_k is not None:
        kept_B = jnp.minimum(kept_B, sampling.top_k)
    if sampling.top_p is not None:
        within_BV = jnp.arange(falling_BV.shape[-1]) < kept_B[:, None]
        shares_BV = jax.nn.softmax(falling_BV, where=within_BV, axis=-1)
        before_BV = jnp.cumsum(shares_BV, axis=-1) - shares_BV
        kept_B = ((before_BV < sampling.top_p) & within_BV).sum(-1)
    least_B1 = jnp.take_along_axis(falling_BV, kept_B[:, None] - 1, axis=-1)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
