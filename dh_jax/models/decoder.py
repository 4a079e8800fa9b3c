"""A decoder of the Llama family in Flax NNX, whose attention never crosses a document.

RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021), grouped-query attention
(Ainslie et al. 2023) and SwiGLU (Shazeer 2020), as put together by Llama (Touvron et al. 2023);
with biases of queries, keys and values it is Qwen2, with normalised queries and keys Qwen3.

The rest of the library sees pure functions: `build` gives a static graph and a plain nested
dictionary of parameters; `loss_fn` and `logits_fn` (and `dh_jax.models.tapped`) turn the graph into
functions of both. Parameter paths read ``layers/0/attention/query/kernel``; kernels are ``[inputs,
outputs]``. With ``scan_layers`` they read ``layers/attention/query/kernel`` and every array of a
layer begins with an axis of all layers (`stack_layers`, `unstack_layers`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from dh_jax.config import validate_model
from dh_jax.distributed.mesh import place, token_ways
from dh_jax.distributed.placement import constrain
from dh_jax.errors import ConfigError
from dh_jax.functions import Head
from dh_jax.models.attention import Attend, Attention, head_width
from dh_jax.models.kernels import KERNELS
from dh_jax.models.layers import MLP, Linear, RMSNorm, product
from dh_jax.models.losses import chunked_cross_entropy
from dh_jax.models.rotary import rotary, rotary_angles
from dh_jax.models.taps import Tape, named, under

if TYPE_CHECKING:
    from dh_jax.batch import Batch
    from dh_jax.config import ModelConfig
    from dh_jax.functions import HiddenFn, LogitsFn, LossFn

Array: TypeAlias = jax.Array
Params: TypeAlias = dict[str, Any]  # nested, string keys, float32 leaves
Graph: TypeAlias = nnx.GraphDef["Decoder"]

OneLayer: TypeAlias = Callable[["Block", Array, dict[str, Array]], tuple[Array, dict[str, Array]]]

LOSS_TABLE = 2**26  # elements of logits that exist at one time on a device: 256 MiB


Placed: TypeAlias = Callable[[str, Any], Any]
"""``(path, module) -> module``, called with each part as it is made: where it is moved, before the
next one is."""


def _as_made(path: str, module: Any) -> Any:
    return module


class Block(nnx.Module):
    """One layer: attention, then the feed-forward, each normalised before and added."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x_BTD: Array, angles: tuple[Array, Array], attend: Attend, tape: Tape
    ) -> Array:
        y_BTD = self.attention_norm(x_BTD, tape.inside("attention_norm"))
        x_BTD = x_BTD + self.attention(y_BTD, angles, attend, tape.inside("attention"))
        x_BTD = constrain(x_BTD, "BTD")
        y_BTD = self.mlp_norm(x_BTD, tape.inside("mlp_norm"))
        x_BTD = constrain(x_BTD + self.mlp(y_BTD, tape.inside("mlp")), "BTD")
        tape.show(hidden=x_BTD)
        return x_BTD


class Decoder(nnx.Module):
    """Tokens to hidden states; `logits` is apart, so that a loss can take it in chunks.

    Raises:
        ConfigError: the vocabulary is empty.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs, placed: Placed = _as_made
    ) -> None:
        validate_model(config)
        if vocab_size < 1:
            raise ConfigError(f"vocab_size is {vocab_size}; the least is 1")
        self.rotary, self.remat, self.count = rotary(config), config.remat, config.layers
        normal = nnx.initializers.normal(config.init_scale)
        table = nnx.Embed(
            vocab_size, config.width, dtype=config.dtype, embedding_init=normal, rngs=rngs
        )
        self.embed = placed("embed", table)
        self.scanned, self.kernel = config.scan_layers, config.attention
        self.precision = config.precision
        self.layers: Any
        if config.scan_layers:  # the plan of one; its parameters are those of all, stacked
            self.layers = Block(config, rngs=rngs)
        else:
            names = [str(i) for i in range(config.layers)]
            self.layers = nnx.Dict(
                {name: placed(f"layers/{name}", Block(config, rngs=rngs)) for name in names}
            )
        self.final_norm = RMSNorm(config.width, config.norm_epsilon)
        head = None if config.tied else Linear(config, config.width, vocab_size, rngs=rngs)
        self.head = None if head is None else placed("head", head)

    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segment_ids_BT: Array,
        tape: Tape | None = None,
    ) -> Array:
        """Hidden states after the last norm, ``[B, T, D]`` in the config's dtype.

        Args:
            tokens_BT: int32 ids; one outside the vocabulary gives NaN, not a neighbour's row.
            positions_BT: int32, from 0 in every segment.
            segment_ids_BT: int32; tokens see earlier tokens of their own segment only.
            tape: taps to add, and where to leave activations.
        """
        tape = tape or Tape()
        angles, attend = self.seeing(positions_BT, segment_ids_BT)

        def one(block: Block, x_BTD: Array, taps: dict[str, Array]) -> tuple[Array, Any]:
            inner = Tape(taps, measuring=tape.measuring)
            x_BTD = block(x_BTD, angles, attend, inner)
            return x_BTD, inner.kept

        x_BTD, kept = self.through(tokens_BT, one, tape.taps_of("layers"), tape)
        tape.kept.update(named(kept, "layers"))
        return x_BTD

    def through(
        self, tokens_BT: Array, one: OneLayer, given: dict[str, Array], tape: Tape
    ) -> tuple[Array, dict[str, Array]]:
        """From tokens to the last norm, each layer as ``one`` has it; see `each_layer`."""
        x_BTD, left = self.each_layer(one, self.embedded(tokens_BT, tape), given)
        return self.final_norm(x_BTD, tape.inside("final_norm")), left

    def embedded(self, tokens_BT: Array, tape: Tape) -> Array:
        """What the first layer receives."""
        # As the look-up leaves it, then by rows: XLA would gather the rows of all devices else.
        x_BTD = constrain(constrain(self.embed(tokens_BT), "bTd"), "BTD")
        return tape.inside("embed")(tokens_BT, x_BTD)

    def seeing(
        self, positions_BT: Array, segment_ids_BT: Array
    ) -> tuple[tuple[Array, Array], Attend]:
        """What every layer is given: the angles of positions, and who sees whom."""
        kernel = KERNELS[self.kernel]
        # Attention sees whole rows (of some heads), and so needs these whole.
        positions_BT = constrain(positions_BT, "Bt")
        segment_ids_BT = constrain(segment_ids_BT, "Bt")

        def attend(q_BTHh: Array, k_BTKh: Array, v_BTKh: Array) -> Array:
            return kernel(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT)

        return rotary_angles(self.rotary, positions_BT), attend

    def each_layer(
        self, one: Callable[..., tuple[Any, Any]], x_BTD: Any, given: dict[str, Array]
    ) -> tuple[Any, dict[str, Array]]:
        """Take ``x_BTD`` through all layers, however their parameters lie.

        Args:
            one: ``(block, x_BTD, given) -> (x_BTD, left)``; gets a layer's part of ``given``.
            x_BTD: what goes from layer to layer, an array or a pytree that begins with it.
            given: arrays by name. ``3/query`` is layer 3's ``query``; where layers are scanned,
                ``query`` has an entry for each layer along its first axis.

        Returns:
            The last ``x_BTD``, and what ``one`` left, named as ``given`` is.
        """

        def called(graph: Any, state: Any, x_BTD: Any, given: Any) -> tuple[Any, Any]:
            return one(nnx.merge(graph, state), x_BTD, given)

        if self.remat != "none":
            policy = getattr(jax.checkpoint_policies, self.remat)
            # Inside a scan nothing could be merged with the forward pass anyway.
            called = jax.checkpoint(
                called, policy=policy, static_argnums=0, prevent_cse=not self.scanned
            )
        if self.scanned:
            graph, states = nnx.split(self.layers)
            return jax.lax.scan(
                lambda x, xs: called(graph, xs[0], x, xs[1]), x_BTD, (states, given)
            )
        left: dict[str, Array] = {}
        for name in map(str, range(self.count)):
            x_BTD, kept = called(*nnx.split(self.layers[name]), x_BTD, under(given, name))
            left |= named(kept, name)
        return x_BTD, left

    def logits(self, hidden_BTD: Array) -> Array:
        """Unnormalised log-probabilities of the next token, ``[B, T, V]`` float32."""
        if self.head is None:
            kernel_DV = self.embed.embedding[...].T
        else:
            kernel_DV = self.head.kernel[...]
        kernel_DV = kernel_DV.astype(hidden_BTD.dtype)
        return constrain(product(hidden_BTD, kernel_DV, self.precision, jnp.float32), "BTV")

    def unembedding(self) -> Head:
        """The weights of `logits`, for losses that make logits themselves."""
        if self.head is None:
            return Head(embedding_VD=self.embed.embedding[...])
        return Head(kernel_DV=self.head.kernel[...])


# --- building --------------------------------------------------------------------------------


def build(
    config: ModelConfig,
    vocab_size: int,
    key: Array,
    shardings: Callable[[Params], Params] | None = None,
) -> tuple[Graph, Params]:
    """A new decoder: its static graph and its parameters, drawn from ``key``.

    Not under one jit: each draw is compiled once a shape rather than once a layer, which for 30
    layers is 5 seconds against 35.

    Args:
        config: of the decoder.
        vocab_size: V.
        key: draws the parameters, the same ones wherever they are placed.
        shardings: from arrays by path to their places, to which each layer goes before the next
            is drawn, so that no device ever holds the whole model; None: the default device.

    Raises:
        ConfigError: the config describes no decoder (see `validate_model`).
    """
    return abstract_graph(config, vocab_size), _initialise(config, vocab_size, key, shardings)


def abstract_graph(config: ModelConfig, vocab_size: int) -> Graph:
    """The static half of the model; no array is made."""
    model = nnx.eval_shape(lambda: Decoder(config, vocab_size, rngs=nnx.Rngs(0)))
    return nnx.graphdef(model)


def abstract_params(config: ModelConfig, vocab_size: int) -> Params:
    """The parameters as shapes and dtypes (`jax.ShapeDtypeStruct`), at no cost in memory."""
    params: Params = jax.eval_shape(
        lambda key: _initialise(config, vocab_size, key), jax.random.key(0)
    )
    return params


def _initialise(
    config: ModelConfig,
    vocab_size: int,
    key: Array,
    shardings: Callable[[Params], Params] | None = None,
) -> Params:
    # Both layouts are drawn alike, so that a seed means the same model in either.
    plain = dataclasses.replace(config, scan_layers=False)

    def placed(path: str, module: Any) -> Any:
        if shardings is not None:
            state = nnx.state(module, nnx.Param)
            params = {path: nnx.to_pure_dict(state)}
            nnx.replace_by_pure_dict(state, place(params, shardings(params))[path])
            nnx.update(module, state)
        return module

    model = Decoder(plain, vocab_size, rngs=nnx.Rngs(key), placed=placed)
    params: Params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    params = stack_layers(params) if config.scan_layers else params
    return params if shardings is None else place(params, shardings(params))


def stack_layers(params: Params) -> Params:
    """The layout of ``scan_layers``: arrays of all layers as one, along a new first axis."""
    layers = params["layers"]
    each = [layers[str(i)] for i in range(len(layers))]
    return params | {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *each)}


def unstack_layers(params: Params) -> Params:
    """`stack_layers` undone."""
    layers = params["layers"]
    count = len(jax.tree.leaves(layers)[0])
    each = {str(i): jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)}
    return params | {"layers": each}


# --- the functions others see ----------------------------------------------------------------


def loss_fn(graph: Graph, chunk: int | None = None) -> LossFn:
    """Next-token cross-entropy of the decoder behind ``graph``.

    Args:
        graph: from `build`.
        chunk: targets (of all rows together) whose logits exist at one time; None: as many as
            `LOSS_TABLE` has room for, on each device that tokens are split over. Where that is
            not all of them the backward pass makes the logits again, one product in four of
            the head's, so that no ``[B, T, V]`` table is ever held.

    Returns:
        ``(params, batch, key) -> loss_BT`` in float32 nats, 0 where the loss mask is False.
        Forward and reverse mode both work.
    """

    def loss(params: Params, batch: Batch, key: Array) -> Array:
        del key  # nothing is drawn at random
        return loss_of(nnx.merge(graph, params), batch, chunk, Tape())

    return loss


def loss_of(model: Decoder, batch: Batch, chunk: int | None, tape: Tape) -> Array:
    """The loss of a merged model; `loss_fn` and its tapped sibling say what it is."""
    if chunk is None:  # one is cut from all rows, so it grows with the ways that they are split
        rows = len(model.embed.embedding)
        chunk = max(1, LOSS_TABLE // rows) * token_ways(jax.sharding.get_abstract_mesh())
    hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, tape)
    loss_BT = chunked_cross_entropy(model.logits, hidden_BTD, batch.targets_BT, chunk)
    return jnp.where(batch.loss_mask_BT, loss_BT, 0.0)


def hidden_fn(graph: Graph) -> HiddenFn:
    """``(params, batch) -> (hidden_BTD, head)``: the decoder without its last matrix product."""

    def hidden(params: Params, batch: Batch) -> tuple[Array, Head]:
        model = nnx.merge(graph, params)
        hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        return hidden_BTD, model.unembedding()

    return hidden


def logits_fn(graph: Graph) -> LogitsFn:
    """``(params, batch) -> logits_BTV`` float32 of the decoder behind ``graph``."""

    def logits(params: Params, batch: Batch) -> Array:
        model = nnx.merge(graph, params)
        hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        return model.logits(hidden_BTD)

    return logits


# --- what it costs ---------------------------------------------------------------------------


def count_parameters(params: Any) -> int:
    """Elements of all parameters (or of `abstract_params`); tied weights count once."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(config: ModelConfig, vocab_size: int, row_length: int) -> float:
    """Training FLOPs a token, forward and backward (PaLM, Chowdhery et al. 2022, appendix B).

    ``6 N + 12 L H h T``: N weights of matrix multiplications (with the head, tied or not; without
    the embedding's look-up), L layers, H heads of width h, rows of T tokens. By that convention
    attention counts the whole square of T, and what is computed twice counts once.
    """
    inner = config.heads * head_width(config)
    kv = config.kv_heads * head_width(config)
    layer = config.width * (2 * inner + 2 * kv) + 3 * config.width * config.mlp_width
    weights = config.layers * layer + config.width * vocab_size
    return 6.0 * weights + 12.0 * config.layers * inner * row_length
