"""Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import jax
from flax import nnx

from dh_jax.distributed.placement import constrain
from dh_jax.models.layers import Linear, RMSNorm, residual_scale
from dh_jax.models.rotary import rotate
from dh_jax.models.taps import Tape

if TYPE_CHECKING:
    from dh_jax.config import ModelConfig

Array: TypeAlias = jax.Array
Attend: TypeAlias = Callable[[Array, Array, Array], Array]
"""Queries ``[B, T, H, h]``, keys and values ``[B, T, K, h]`` to mixed values ``[B, T, H, h]``."""


class Attention(nnx.Module):
    """Projections around an `Attend`, which decides who sees whom and by which kernel."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width = head_width(config)
        inner, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        bias = config.qkv_bias
        self.query = Linear(config, config.width, inner, bias=bias, rngs=rngs)
        self.key = Linear(config, config.width, kv, bias=bias, rngs=rngs)
        self.value = Linear(config, config.width, kv, bias=bias, rngs=rngs)
        self.out = Linear(config, inner, config.width, scale=residual_scale(config), rngs=rngs)
        self.normalises = config.qk_norm
        if config.qk_norm:
            self.query_norm = RMSNorm(self.head_width, config.norm_epsilon)
            self.key_norm = RMSNorm(self.head_width, config.norm_epsilon)

    def __call__(
        self, x_BTD: Array, angles: tuple[Array, Array], attend: Attend, tape: Tape
    ) -> Array:
        B, T, _ = x_BTD.shape
        q = self.query(x_BTD, tape.inside("query")).reshape(B, T, self.heads, self.head_width)
        k = self.key(x_BTD, tape.inside("key")).reshape(B, T, self.kv_heads, self.head_width)
        v = self.value(x_BTD, tape.inside("value")).reshape(B, T, self.kv_heads, self.head_width)
        tape.show(query=q, key=k, value=v)
        if self.normalises:
            q = self.query_norm(q, tape.inside("query_norm"))
            k = self.key_norm(k, tape.inside("key_norm"))
        # From a share of the row to a share of the heads, and back.
        q, k, v = constrain(q, "BTHh"), constrain(k, "BTKh"), constrain(v, "BTKh")
        q, k, v = constrain(q, "BtHh"), constrain(k, "BtKh"), constrain(v, "BtKh")
        q, k = rotate(q, angles), rotate(k, angles)
        tape.show(rotated_query=q, rotated_key=k)
        mixed = constrain(constrain(attend(q, k, v), "BtHh"), "BTHh")
        return self.out(mixed.reshape(B, T, -1), tape.inside("out"))


def head_width(config: ModelConfig) -> int:
    """Elements of a head."""
    return config.width // config.heads if config.head_width is None else config.head_width
