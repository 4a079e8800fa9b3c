"""Weights of -1, 0 and 1, and activations of 8 bits, trained through their rounding.

BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764, section 2) for the weights, and the activations of
BitNet (Wang et al. 2023, arXiv:2310.11453, equations 4 and 5) by token, as b1.58 has them. Both
round in the forward pass and let the gradient through as if they had not (Bengio et al. 2013).
Values stay floating-point: this trains such a model; it does not run it in integers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_LEAST = 1e-5  # of a divisor, as in the paper


def ternary(kernel_IO: jax.Array) -> jax.Array:
    """``gamma * clip(round(kernel / gamma), -1, 1)`` with ``gamma = mean(|kernel|)``."""
    gamma = jnp.abs(kernel_IO).mean().clip(min=_LEAST)
    return _through(kernel_IO, gamma * jnp.round(kernel_IO / gamma).clip(-1, 1))


def int8_rows(x_BTI: jax.Array) -> jax.Array:
    """Each token's vector on a grid of 255 points, between plus and minus its largest entry."""
    x = x_BTI.astype(jnp.float32)
    step = jnp.abs(x).max(axis=-1, keepdims=True).clip(min=_LEAST) / 127
    return _through(x_BTI, (jnp.round(x / step) * step).astype(x_BTI.dtype))


def _through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    return x + jax.lax.stop_gradient(rounded - x)
