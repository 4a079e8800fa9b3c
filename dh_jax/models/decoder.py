"""A decoder of the Llama family in Flax NNX, whose attention never crosses a document.

RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021), grouped-query attention
(Ainslie et al. 2023) and SwiGLU (Shazeer 2020), as put together by Llama (Touvron et al. 2023);
no biases. Rotation follows the half-split convention of Hugging Face's checkpoints.

The rest of the library sees pure functions: `build` gives a static graph and a plain nested
dictionary of parameters; `loss_fn` and `logits_fn` turn the graph into functions of both.
Parameter paths read ``layers/0/attention/query/kernel``; kernels are ``[inputs, outputs]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from dh_jax.config import validate_model
from dh_jax.distributed.placement import constrain
from dh_jax.errors import ConfigError

if TYPE_CHECKING:
    from dh_jax.batch import Batch
    from dh_jax.config import ModelConfig
    from dh_jax.functions import LogitsFn, LossFn

Array: TypeAlias = jax.Array
Params: TypeAlias = dict[str, Any]  # nested, string keys, float32 leaves
Graph: TypeAlias = nnx.GraphDef["Decoder"]

LOSS_CHUNK = 1024  # targets whose logits exist at one time


# --- layers ----------------------------------------------------------------------------------


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale``, in float32 whatever the type of ``x``."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x_BTD: Array) -> Array:
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...]).astype(x_BTD.dtype)


def rotary_angles(positions_BT: Array, head_width: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of ``position * theta ** (-2 i / head_width)``, ``[B, T, head_width/2]``."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHh: Array, angles: tuple[Array, Array]) -> Array:
    """Turn element ``i`` of every head against element ``i + head_width/2``, in float32."""
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHh.dtype)


def attend(q_BTHh: Array, k_BTKh: Array, v_BTKh: Array, segment_ids_BT: Array) -> Array:
    """Softmax attention to earlier tokens of the same segment, ``[B, T, H, h]``.

    Queries go in four blocks (of at least 128), each against the keys up to its own end: the
    upper triangle is mostly skipped, which is worth 1.4 to 1.8 times on a CPU. Masked scores
    become exact zeros after the softmax, so other documents leave no trace, not even in
    rounding. Padding is segment 0 and sees padding only, so no row of scores is empty.
    """
    tokens = q_BTHh.shape[1]
    block = max(128, -(-tokens // 4))
    blocks = []
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        same = segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
        causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        blocks.append(
            jax.nn.dot_product_attention(
                q_BTHh[:, start:end],
                k_BTKh[:, :end],
                v_BTKh[:, :end],
                mask=(same & causal)[:, None],
                implementation="xla",  # cuDNN's has no forward mode (jvp)
            )
        )
    return jnp.concatenate(blocks, axis=1)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width = _head_width(config)
        inner, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        self.query = _linear(config, config.width, inner, rngs)
        self.key = _linear(config, config.width, kv, rngs)
        self.value = _linear(config, config.width, kv, rngs)
        self.out = _linear(config, inner, config.width, rngs, residual=True)

    def __call__(self, x_BTD: Array, angles: tuple[Array, Array], segment_ids_BT: Array) -> Array:
        B, T, _ = x_BTD.shape
        q = self.query(x_BTD).reshape(B, T, self.heads, self.head_width)
        k = self.key(x_BTD).reshape(B, T, self.kv_heads, self.head_width)
        v = self.value(x_BTD).reshape(B, T, self.kv_heads, self.head_width)
        q, k, v = constrain(q, "BTHh"), constrain(k, "BTKh"), constrain(v, "BTKh")
        mixed = attend(rotate(q, angles), rotate(k, angles), v, segment_ids_BT)
        return self.out(constrain(mixed, "BTHh").reshape(B, T, -1))


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.gate = _linear(config, config.width, config.mlp_width, rngs)
        self.up = _linear(config, config.width, config.mlp_width, rngs)
        self.down = _linear(config, config.mlp_width, config.width, rngs, residual=True)

    def __call__(self, x_BTD: Array) -> Array:
        return self.down(constrain(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD), "BTF"))


class Block(nnx.Module):
    """One layer: attention, then the feed-forward, each normalised before and added."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_BTD: Array, angles: tuple[Array, Array], segment_ids_BT: Array) -> Array:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), angles, segment_ids_BT)
        x_BTD = constrain(x_BTD, "BTD")
        return constrain(x_BTD + self.mlp(self.mlp_norm(x_BTD)), "BTD")


class Decoder(nnx.Module):
    """Tokens to hidden states; `logits` is apart, so that a loss can take it in chunks."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs) -> None:
        validate_model(config)
        if vocab_size < 1:
            raise ConfigError(f"vocab_size is {vocab_size}; the least is 1")
        self.head_width, self.theta = _head_width(config), config.rope_theta
        normal = nnx.initializers.normal(config.init_scale)
        self.embed = nnx.Embed(
            vocab_size, config.width, dtype=config.dtype, embedding_init=normal, rngs=rngs
        )
        names = [str(i) for i in range(config.layers)]
        self.layers = nnx.Dict({name: Block(config, rngs=rngs) for name in names})
        self.final_norm = RMSNorm(config.width, config.norm_epsilon)
        self.head = None if config.tied else _linear(config, config.width, vocab_size, rngs)

    def __call__(self, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array) -> Array:
        """Hidden states after the last norm, ``[B, T, D]`` in the config's dtype.

        Args:
            tokens_BT: int32 ids; one outside the vocabulary gives NaN, not a neighbour's row.
            positions_BT: int32, from 0 in every segment.
            segment_ids_BT: int32; tokens see earlier tokens of their own segment only.
        """
        angles = rotary_angles(positions_BT, self.head_width, self.theta)
        x_BTD = constrain(constrain(self.embed(tokens_BT), "bTd"), "BTD")
        for i in range(len(self.layers)):
            x_BTD = self.layers[str(i)](x_BTD, angles, segment_ids_BT)
        return self.final_norm(x_BTD)

    def logits(self, hidden_BTD: Array) -> Array:
        """Unnormalised log-probabilities of the next token, ``[B, T, V]`` float32."""
        if self.head is None:
            kernel_DV = self.embed.embedding[...].T
        else:
            kernel_DV = self.head.kernel[...]
        kernel_DV = kernel_DV.astype(hidden_BTD.dtype)
        logits_BTV = jnp.matmul(hidden_BTD, kernel_DV, preferred_element_type=jnp.float32)
        return constrain(logits_BTV, "BTV")


def _linear(
    config: ModelConfig, inputs: int, outputs: int, rngs: nnx.Rngs, *, residual: bool = False
) -> nnx.Linear:
    """No bias; layers that write to the residual stream start smaller (GPT-2, section 2.3)."""
    scale = config.init_scale / (2 * config.layers) ** 0.5 if residual else config.init_scale
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=config.dtype,
        kernel_init=nnx.initializers.normal(scale),
        rngs=rngs,
    )


def _head_width(config: ModelConfig) -> int:
    if config.head_width is None:
        return config.width // config.heads
    return config.head_width


# --- building --------------------------------------------------------------------------------


def build(config: ModelConfig, vocab_size: int, key: Array) -> tuple[Graph, Params]:
    """A new decoder: its static graph and its parameters, drawn from ``key``.

    Not under one jit: each draw is compiled once a shape rather than once a layer, which for 30
    layers is 5 seconds against 35.

    Raises:
        ConfigError: the config describes no decoder (see `validate_model`).
    """
    return abstract_graph(config, vocab_size), _initialise(config, vocab_size, key)


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


def _initialise(config: ModelConfig, vocab_size: int, key: Array) -> Params:
    model = Decoder(config, vocab_size, rngs=nnx.Rngs(key))
    params: Params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return params


# --- the functions others see ----------------------------------------------------------------


def loss_fn(graph: Graph, chunk: int = LOSS_CHUNK) -> LossFn:
    """Next-token cross-entropy of the decoder behind ``graph``.

    Args:
        graph: from `build`.
        chunk: targets (of all rows together) whose logits exist at one time. The backward pass
            makes them again, so no ``[B, T, V]`` table is ever held; on a CPU with a vocabulary
            of 8,192 this costs no time. On a mesh multiply it by the number of devices.

    Returns:
        ``(params, batch, key) -> loss_BT`` in float32 nats, 0 where the loss mask is False.
        Forward and reverse mode both work.
    """

    def loss(params: Params, batch: Batch, key: Array) -> Array:
        del key  # nothing is drawn at random
        model = nnx.merge(graph, params)
        hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        loss_BT = _chunked_cross_entropy(model.logits, hidden_BTD, batch.targets_BT, chunk)
        return jnp.where(batch.loss_mask_BT, loss_BT, 0.0)

    return loss


def logits_fn(graph: Graph) -> LogitsFn:
    """``(params, batch) -> logits_BTV`` float32 of the decoder behind ``graph``."""

    def logits(params: Params, batch: Batch) -> Array:
        model = nnx.merge(graph, params)
        hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        return model.logits(hidden_BTD)

    return logits


def cross_entropy(logits_BTV: Array, targets_BT: Array) -> Array:
    """``logsumexp(logits) - logits[target]``, nats."""
    at_target = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - at_target


def _chunked_cross_entropy(
    logits_of: Callable[[Array], Array], hidden_BTD: Array, targets_BT: Array, chunk: int
) -> Array:
    """Cross-entropy of about ``chunk`` targets at a time.

    Chunks run along T and keep all rows, so rows sharded over devices stay where they are.
    """
    B, T, _ = hidden_BTD.shape
    if chunk >= B * T:
        return cross_entropy(logits_of(hidden_BTD), targets_BT)
    length = max(1, chunk // B)
    count = -(-T // length)

    def split(x_BT: Array) -> Array:  # [count, B, length, ...]
        widths = [(0, 0), (0, count * length - T)] + [(0, 0)] * (x_BT.ndim - 2)
        padded = jnp.pad(x_BT, widths)
        return padded.reshape(B, count, length, *x_BT.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(part: tuple[Array, Array]) -> Array:
        return cross_entropy(logits_of(part[0]), part[1])

    losses = jax.lax.map(one, (split(hidden_BTD), split(targets_BT)))
    return losses.swapaxes(0, 1).reshape(B, count * length)[:, :T]


# --- what it costs ---------------------------------------------------------------------------


def count_parameters(params: Params) -> int:
    """Elements of all parameters (or of `abstract_params`); tied weights count once."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(config: ModelConfig, vocab_size: int, row_length: int) -> float:
    """Training FLOPs a token, forward and backward (PaLM, Chowdhery et al. 2022, appendix B).

    ``6 N + 12 L H h T``: N weights of matrix multiplications (with the head, tied or not; without
    the embedding's look-up), L layers, H heads of width h, rows of T tokens. By that convention
    attention counts the whole square of T, and what is computed twice counts once.
    """
    inner = config.heads * _head_width(config)
    kv = config.kv_heads * _head_width(config)
    layer = config.width * (2 * inner + 2 * kv) + 3 * config.width * config.mlp_width
    weights = config.layers * layer + config.width * vocab_size
    return 6.0 * weights + 12.0 * config.layers * inner * row_length
