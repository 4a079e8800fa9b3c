"""From hidden states to losses of tokens, a few tokens at a time.

The logits of all tokens are a table of B x T x V, most of what a step with a large vocabulary
would hold. Here they exist for one chunk of tokens only. Chunks run along T and keep all rows, so
rows sharded over devices stay where they are. Further shapes: N chunks, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from dh_jax.distributed.placement import constrain
from dh_jax.functions import Head

Array: TypeAlias = jax.Array


# (logits_BCV, part, whole) -> (loss_BC, the gradient of each loss in its logits, BCV). ``part``
# is what belongs to the chunk's tokens, ``whole`` what belongs to all (weights of a teacher).
Score: TypeAlias = Callable[[Array, Any, Any], tuple[Array, Array]]


def unembed(hidden_BTD: Array, head: Head) -> Array:
    """Logits ``[B, T, V]`` in float32, summed in float32 whatever the type of ``hidden_BTD``."""
    if head.embedding_VD is not None:
        weights, equation = head.embedding_VD, "btd,vd->btv"
    else:
        assert head.kernel_DV is not None, "a head has a kernel or an embedding"
        weights, equation = head.kernel_DV, "btd,dv->btv"
    logits_BTV = jnp.einsum(
        equation, hidden_BTD, weights.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
    )
    if head.bias_V is not None:
        logits_BTV = logits_BTV + head.bias_V.astype(jnp.float32)
    if head.cap is not None:
        logits_BTV = head.cap * jnp.tanh(logits_BTV / head.cap)
    return constrain(logits_BTV, "BTV")


def map_tokens(function: Callable[[Any], Any], tree: Any, chunk: int) -> Any:
    """``function`` of about ``chunk`` tokens at a time.

    Args:
        function: from arrays ``[B, C, ...]`` to arrays ``[B, C, ...]``.
        tree: arrays ``[B, T, ...]``; where chunks do not divide T they are padded with zeros.
        chunk: tokens of all rows together.

    Returns:
        What ``function`` gives, for all T.
    """
    B, T = jax.tree.leaves(tree)[0].shape[:2]
    if chunk >= B * T:
        return function(tree)
    return _join(jax.lax.map(function, _split(tree, chunk)), T)


def _split(tree: Any, chunk: int) -> Any:
    """[B, T, ...] -> [N, B, C, ...], padded with zeros."""
    B, T = jax.tree.leaves(tree)[0].shape[:2]
    length = min(max(1, chunk // B), T)
    count = -(-T // length)

    def split(x: Array) -> Array:
        widths = [(0, 0), (0, count * length - T)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, widths)
        return padded.reshape(B, count, length, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def _join(tree: Any, T: int) -> Any:
    """[N, B, C, ...] -> [B, T, ...]."""

    def join(x: Array) -> Array:
        count, B, length = x.shape[:3]
        return x.swapaxes(0, 1).reshape(B, count * length, *x.shape[3:])[:, :T]

    return jax.tree.map(join, tree)


# --- losses from logits ----------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def token_losses(score: Score, logits_BTV: Array, part: Any, whole: Any) -> Array:
    """Losses of tokens whose derivative in the logits is the one that ``score`` states.

    Forward and reverse mode work, and both again. ``part`` and ``whole`` are constants.
    """
    return score(logits_BTV, part, whole)[0]


@token_losses.defjvp
def _token_losses_jvp(score: Score, primals: Any, tangents: Any) -> tuple[Array, Array]:
    loss_BT, slope_BTV = score(*primals)
    return loss_BT, (slope_BTV * tangents[0]).sum(axis=-1)


# --- losses from hidden states ---------------------------------------------------------------


def chunked_losses(
    score: Score, hidden_BTD: Array, head: Head, part: Any, whole: Any, mask_BT: Array, chunk: int
) -> Array:
    """`token_losses` of ``unembed(hidden_BTD, head)``, 0 where the mask is False.

    The backward pass makes the logits again. Forward and reverse mode work.
    """

    @jax.checkpoint
    def one(given: Any) -> Array:
        hidden_BCD, part, mask_BC = given
        loss_BC = token_losses(score, unembed(hidden_BCD, head), part, whole)
        return jnp.where(mask_BC, loss_BC, 0.0)

    losses_BT: Array = map_tokens(one, (hidden_BTD, part, mask_BT), chunk)
    return losses_BT


@partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def fused_losses(
    score: Score, hidden_BTD: Array, head: Head, part: Any, whole: Any, mask_BT: Array, chunk: int
) -> Array:
    """`chunked_losses` whose gradients are made in the forward pass, where logits exist anyway.

    That spares making them again, if all tokens of the mask weigh alike in what is
    differentiated, as in any mean or sum; the gradient of their sum is then only scaled. Where
    they do not, the backward pass goes over the chunks again. Both are exact. Reverse mode only,
    in ``hidden_BTD`` and the arrays of ``head`` but its cap.

    Sums are float32. The gradient of the logits is rounded to the type of ``hidden_BTD`` before
    it meets hidden states and weights, as every matrix product of that type does.
    """
    return chunked_losses(score, hidden_BTD, head, part, whole, mask_BT, chunk)


def _forward(
    score: Score, hidden_BTD: Array, head: Head, part: Any, whole: Any, mask_BT: Array, chunk: int
) -> tuple[Array, Any]:
    weight_BT = mask_BT.astype(jnp.float32)
    loss_BT, of_sum = _with_gradients(score, hidden_BTD, head, part, whole, weight_BT, chunk)
    return loss_BT, ((hidden_BTD, head, part, whole), mask_BT, of_sum)


def _backward(score: Score, chunk: int, kept: Any, weight_BT: Array) -> tuple[Any, ...]:
    (hidden, table, part, whole), mask_BT, of_sum = kept
    least = jnp.where(mask_BT, weight_BT, jnp.inf).min()
    most = jnp.where(mask_BT, weight_BT, -jnp.inf).max()
    scale = jnp.where(mask_BT.any(), most, 0.0)

    def again() -> tuple[Array, Head]:
        weights_BT = jnp.where(mask_BT, weight_BT, 0.0).astype(jnp.float32)
        return _with_gradients(score, hidden, table, part, whole, weights_BT, chunk)[1]

    def scaled() -> tuple[Array, Head]:
        scaled: tuple[Array, Head] = jax.tree.map(lambda x: (x * scale).astype(x.dtype), of_sum)
        return scaled

    hidden_BTD, head = jax.lax.cond(least < most, again, scaled)
    typed = [None if x is None else x.astype(w.dtype) for x, w in zip(head, table, strict=True)]
    head = Head(*typed[:3])
    return hidden_BTD, head, None, None, None


fused_losses.defvjp(_forward, _backward)


def _with_gradients(
    score: Score, hidden_BTD: Array, head: Head, part: Any, whole: Any, weight_BT: Array, chunk: int
) -> tuple[Array, tuple[Array, Head]]:
    """Losses (0 where the weight is 0), and the gradient of their weighted sum."""

    def one(so_far: Head, given: Any) -> tuple[Head, tuple[Array, Array]]:
        hidden_BCD, part, weight_BC = given
        logits_BCV = unembed(hidden_BCD, head)
        loss_BC, slope_BCV = score(logits_BCV, part, whole)
        weight_BC1 = weight_BC[..., None]
        slope_BCV = jnp.where(weight_BC1 != 0, weight_BC1 * slope_BCV, 0.0)
        if head.cap is not None:
            slope_BCV = slope_BCV * (1 - (logits_BCV / head.cap) ** 2)
        of_hidden_BCD, of_head = _pulled(slope_BCV, hidden_BCD, head)
        loss_BC = jnp.where(weight_BC != 0, loss_BC, 0.0)
        return jax.tree.map(jnp.add, so_far, of_head), (loss_BC, of_hidden_BCD)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head._replace(cap=None))
    B, T = weight_BT.shape
    given = hidden_BTD, part, weight_BT
    if chunk >= B * T:
        of_head, (loss_BT, of_hidden_BTD) = one(zeros, given)
        return loss_BT, (of_hidden_BTD, of_head)
    of_head, parts = jax.lax.scan(one, zeros, _split(given, chunk))
    loss_BT, of_hidden_BTD = _join(parts, T)
    return loss_BT, (of_hidden_BTD, of_head)


def _pulled(slope_BCV: Array, hidden_BCD: Array, head: Head) -> tuple[Array, Head]:
    """The gradient in hidden states and head, of a gradient in logits before the cap."""
    of_bias_V = None if head.bias_V is None else slope_BCV.sum(axis=(0, 1))
    slope_BCV = slope_BCV.astype(hidden_BCD.dtype)

    def product(equation: str, a: Array, b: Array) -> Array:
        b = b.astype(hidden_BCD.dtype)
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    if head.embedding_VD is not None:
        of_hidden_BCD = product("bcv,vd->bcd", slope_BCV, head.embedding_VD)
        of_head = Head(embedding_VD=product("bcv,bcd->vd", slope_BCV, hidden_BCD), bias_V=of_bias_V)
    else:
        assert head.kernel_DV is not None, "a head has a kernel or an embedding"
        of_hidden_BCD = product("bcv,dv->bcd", slope_BCV, head.kernel_DV)
        of_head = Head(kernel_DV=product("bcd,bcv->dv", hidden_BCD, slope_BCV), bias_V=of_bias_V)
    return of_hidden_BCD.astype(hidden_BCD.dtype), of_head
