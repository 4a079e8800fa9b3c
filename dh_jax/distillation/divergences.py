"""Divergences between a teacher's distribution p and a student's q, and their slopes.

One core for full tables and for the few entries of a sparse teacher: each divergence is a sum
over outcomes v of a function of ``log p_v`` and ``log q_v``, and states its derivative in
``log q_v`` beside its value. With ``h_v = dL / d log q_v`` and ``q = softmax(z)``::

    dL / dz_v = h_v - q_v * sum_u h_u

==================  =============================================================================
forward_kl          KL(p, q) (Hinton et al. 2015, arXiv:1503.02531)
reverse_kl          KL(q, p) (MiniLLM, Gu et al. 2024, arXiv:2306.08543)
jensen_shannon      beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q
                    (GKD, Agarwal et al. 2024, arXiv:2306.13649, section 2)
skewed_forward_kl   KL(p, beta p + (1 - beta) q) (DistiLLM, Ko et al. 2024, arXiv:2402.03898)
skewed_reverse_kl   KL(q, (1 - beta) p + beta q) (the same)
total_variation     sum |p - q| / 2 (f-distill, Wen et al. 2023, arXiv:2307.15190)
==================  =============================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dh_jax.config import suggest
from dh_jax.errors import ConfigError

Array: TypeAlias = jax.Array


class Divergence(NamedTuple):
    """Which divergence; static. ``beta`` is read by the three that mix p and q."""

    name: str = "forward_kl"
    beta: float = 0.5


class Terms(NamedTuple):
    """Of each outcome, along the last axis."""

    value: Array  # its part of the divergence
    slope: Array  # h, the derivative in log q
    total: Array | None = None  # the sum of h where it is known without summing, [..., 1]


def _times(probability: Array, ratio: Array) -> Array:
    """Their product; 0 where the probability is, whatever the ratio."""
    return jnp.where(probability > 0, probability * ratio, 0.0)


def _forward_kl(logp: Array, logq: Array, beta: float) -> Terms:
    p = jnp.exp(logp)
    return Terms(_times(p, logp - logq), -p, -jnp.ones_like(p[..., :1]))


def _reverse_kl(logp: Array, logq: Array, beta: float) -> Terms:
    q = jnp.exp(logq)
    value = _times(q, logq - logp)
    return Terms(value, value + q)


def _jensen_shannon(logp: Array, logq: Array, beta: float) -> Terms:
    p, q = jnp.exp(logp), jnp.exp(logq)
    logm = jnp.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))
    of_q = (1 - beta) * _times(q, logq - logm)
    return Terms(beta * _times(p, logp - logm) + of_q, of_q)


def _skewed_forward_kl(logp: Array, logq: Array, beta: float) -> Terms:
    p = jnp.exp(logp)
    logm = jnp.logaddexp(logp + _log(beta), logq + math.log1p(-beta))
    slope = -(1 - beta) * _times(p, jnp.exp(jnp.where(p > 0, logq - logm, 0.0)))
    return Terms(_times(p, logp - logm), slope)


def _skewed_reverse_kl(logp: Array, logq: Array, beta: float) -> Terms:
    q = jnp.exp(logq)
    logm = jnp.logaddexp(logp + math.log1p(-beta), logq + _log(beta))
    value = _times(q, logq - logm)
    of_m = beta * _times(q, jnp.exp(jnp.where(q > 0, logq - logm, 0.0)))
    return Terms(value, value + q - of_m)


def _total_variation(logp: Array, logq: Array, beta: float) -> Terms:
    p, q = jnp.exp(logp), jnp.exp(logq)
    return Terms(0.5 * jnp.abs(p - q), 0.5 * jnp.sign(q - p) * q)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


DIVERGENCES: dict[str, Callable[[Array, Array, float], Terms]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "skewed_forward_kl": _skewed_forward_kl,
    "skewed_reverse_kl": _skewed_reverse_kl,
    "total_variation": _total_variation,
}


def check_divergence(divergence: Divergence) -> Divergence:
    """The same divergence, if it is one.

    Raises:
        ConfigError: its name is unknown, or its ``beta`` is where it would be another divergence
            or none: the Jensen-Shannon divergence is 0 for all q at 0 and 1, not a KL.
    """
    name, beta = divergence
    if name not in DIVERGENCES:
        raise ConfigError(
            f"divergence {name!r}{suggest(name, list(DIVERGENCES))}; known: "
            f"{', '.join(DIVERGENCES)}"
        )
    if name == "jensen_shannon" and not 0 < beta < 1:
        raise ConfigError(
            f"beta is {beta}; jensen_shannon needs one between 0 and 1, both excluded; "
            "take forward_kl or reverse_kl for what its ends resemble"
        )
    if name.startswith("skewed") and not 0 <= beta < 1:
        raise ConfigError(f"beta is {beta}; {name} needs one from 0 to below 1")
    return divergence


def value_and_slope(divergence: Divergence, logp: Array, logq: Array) -> tuple[Array, Array, Array]:
    """The divergence, ``h``, and the sum of ``h``.

    Args:
        divergence: checked.
        logp: [..., V] float32 log-probabilities of the teacher, -inf where it has none.
        logq: [..., V] those of the student.

    Returns:
        ``[...]`` nats, ``[..., V]`` and ``[..., 1]``.
    """
    terms = DIVERGENCES[divergence.name](logp, logq, divergence.beta)
    total = terms.total
    if total is None:
        total = terms.slope.sum(axis=-1, keepdims=True)
    return terms.value.sum(axis=-1), terms.slope, total


def normalised(logits: Array) -> Array:
    """``log softmax`` along the last axis; all -inf, not NaN, where every logit is -inf."""
    most = logits.max(axis=-1, keepdims=True)
    most = jnp.where(jnp.isneginf(most), 0.0, most)
    shifted = logits - most
    return shifted - jnp.log(jnp.exp(shifted).sum(axis=-1, keepdims=True).clip(min=_TINY))


_TINY = 1e-30  # of a sum that holds exp(0), unless nothing is summed
