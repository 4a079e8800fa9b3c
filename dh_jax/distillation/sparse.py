"""A teacher of K entries a token: how its unseen mass is taken, by name.

==================== ==========================================================================
tail                 the default: all other ids are one outcome, of the teacher's unseen mass
                     (as ``log_tail_BT``) and the student's. A lower bound of the full divergence
                     for every f-divergence (data processing), and 0 only where they agree on it.
                     Of forward_kl it lacks exactly the KL inside the tail (the chain rule)::

                         full - tail = P sum_v (p_v / P) log((p_v / P) / (q_v / Q))

                     over the ids outside the K, of mass P for the teacher and Q for the student.
teacher_renormalised the K entries are scaled to sum to 1; the student keeps its full softmax.
                     Biased: what the teacher gives to other ids is taken for 0.
both_renormalised    both are scaled over the K entries; nothing is asked of other ids.
sampled              entries are K draws from the teacher with replacement (`sample_teacher`).
                     Value and gradient are unbiased estimates of the full forward KL's
                     (Anshumann et al. 2025, arXiv:2503.16870, with the proposal p itself).
==================== ==========================================================================

An id that the student lacks, or to whom it gives -inf, is dropped from both sides and what is
left is renormalised, as `dh_jax.distillation.losses` does with full tables.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

from dh_jax.batch import TopKLogits
from dh_jax.config import suggest
from dh_jax.distillation.divergences import Divergence, normalised, value_and_slope
from dh_jax.errors import ConfigError

Array: TypeAlias = jax.Array

ESTIMATORS = ("tail", "teacher_renormalised", "both_renormalised", "sampled")


def check_estimator(estimator: str, divergence: Divergence) -> None:
    """Refuse what cannot be estimated.

    Raises:
        ConfigError: the estimator is unknown; ``sampled`` with another divergence than
            forward_kl; or ``teacher_renormalised`` with one that is infinite where p is 0.
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(
            f"estimator {estimator!r}{suggest(estimator, list(ESTIMATORS))}; known: "
            f"{', '.join(ESTIMATORS)}"
        )
    if estimator == "sampled" and divergence.name != "forward_kl":
        raise ConfigError(
            f"draws from the teacher estimate forward_kl, not {divergence.name}; take another "
            "estimator (and a cache of the K most probable ids)"
        )
    infinite = divergence.name in ("reverse_kl", "skewed_reverse_kl")
    if estimator == "teacher_renormalised" and infinite:
        raise ConfigError(
            f"teacher_renormalised leaves ids without a probability, and {divergence.name} may "
            "be infinite there; take tail or both_renormalised"
        )


def check_temperature(wanted: float, stored: float) -> None:
    """A stored teacher has one temperature: its unseen mass at another is not known.

    Raises:
        ConfigError: they differ.
    """
    if wanted != stored:
        raise ConfigError(
            f"temperature is {wanted}, but the teacher's log-probabilities were stored at "
            f"{stored}; take that, or make the cache again"
        )


def top_k(logits_BTV: Array, k: int, temperature: float = 1.0) -> TopKLogits:
    """The K most probable ids, and the log of what is left.

    Args:
        logits_BTV: of the teacher, any floating type.
        k: K, at most V.
        temperature: divides the logits.
    """
    scaled_BTV = jnp.asarray(logits_BTV, jnp.float32) / temperature
    values_BTK, ids_BTK = jax.lax.top_k(scaled_BTV, k)
    tail_BT1 = normalised_sum(_without(scaled_BTV, ids_BTK))
    log_probs = normalised(jnp.concatenate([values_BTK, tail_BT1], axis=-1))
    return TopKLogits(ids_BTK.astype(jnp.int32), log_probs[..., :-1], log_probs[..., -1])


def sample_teacher(
    logits_BTV: Array, k: int, keys_BT: Array, temperature: float = 1.0
) -> TopKLogits:
    """K ids drawn from the teacher with replacement, for the estimator ``sampled``.

    Args:
        logits_BTV: of the teacher, any floating type.
        k: K; no table of V times K is made.
        keys_BT: a key for each token, so that how tokens are cut into chunks changes no draw.
        temperature: divides the logits.

    Returns:
        Ids with the teacher's own ``log_probs_BTK`` there; there is no tail (-inf).
    """
    logp_BTV = jax.nn.log_softmax(jnp.asarray(logits_BTV, jnp.float32) / temperature, axis=-1)
    ids_BTK = jax.vmap(jax.vmap(partial(_draws, k)))(jnp.exp(logp_BTV), keys_BT)
    log_probs_BTK = jnp.take_along_axis(logp_BTV, ids_BTK, axis=-1)
    return TopKLogits(
        ids_BTK.astype(jnp.int32), log_probs_BTK, jnp.full(logits_BTV.shape[:2], -jnp.inf)
    )


def _draws(k: int, mass_V: Array, key: Array) -> Array:
    """K draws with replacement, int32 ``[K]``: first a block of ids, then one of its ids, since a
    float32 between 0 and 1 has too few values to tell all ids of a vocabulary apart."""
    width = math.isqrt(len(mass_V) - 1) + 1
    mass_GW = jnp.pad(mass_V, (0, -len(mass_V) % width)).reshape(-1, width)
    first, second = jax.random.uniform(key, (2, k))
    block_K = _where(mass_GW.sum(1), first)
    of_block_K = jax.vmap(_where)(mass_GW[block_K], second)
    return block_K * width + of_block_K


def _where(mass_N: Array, share: Array) -> Array:
    """The place at which a share (from 0, below 1) of the mass is passed; never one without any."""
    up_to_N = jnp.cumsum(mass_N)
    below = jnp.minimum(share * up_to_N[-1], jnp.nextafter(up_to_N[-1], 0.0))
    return jnp.searchsorted(up_to_N, below, side="right")


def loss_and_slope(
    divergence: Divergence,
    estimator: str,
    vocabulary: int | None,
    logits_BTV: Array,
    teacher: TopKLogits,
) -> tuple[Array, Array]:
    """The estimated divergence, and its gradient in the student's logits.

    Args:
        divergence: checked, as is the estimator.
        estimator: one of `ESTIMATORS`.
        vocabulary: ids from here on are not common; None: none.
        logits_BTV: of the student over the temperature, float32.
        teacher: at that temperature.

    Returns:
        ``[B, T]`` nats and ``[B, T, V]``.
    """
    V = logits_BTV.shape[-1]
    n = V if vocabulary is None else min(V, vocabulary)
    if n < V:
        logits_BTV = jnp.where(jnp.arange(V) < n, logits_BTV, -jnp.inf)
    ids_BTK = teacher.ids_BTK  # writing at one past the table does nothing
    z_BTK = jnp.take_along_axis(logits_BTV, ids_BTK.clip(max=V - 1), axis=-1)
    kept_BTK = (ids_BTK < n) & ~jnp.isneginf(z_BTK) & ~jnp.isneginf(teacher.log_probs_BTK)
    logp_BTK = jnp.where(kept_BTK, teacher.log_probs_BTK, -jnp.inf)
    z_BTK = jnp.where(kept_BTK, z_BTK, -jnp.inf)
    if estimator == "sampled":
        return _sampled(logits_BTV, ids_BTK, logp_BTK, kept_BTK)
    if estimator == "both_renormalised":
        logq_BTK = normalised(z_BTK)
        loss_BT, slope_BTK, total_BT1 = value_and_slope(divergence, normalised(logp_BTK), logq_BTK)
        slope_BTK = slope_BTK - jnp.exp(logq_BTK) * total_BT1
        return loss_BT, _add(jnp.zeros_like(logits_BTV), ids_BTK, slope_BTK)
    others_BTV = _without(logits_BTV, ids_BTK)
    tail_BT1 = normalised_sum(others_BTV)
    if estimator == "tail":
        log_tail_BT1 = teacher.log_tail_BT[..., None]
        both = ~(jnp.isneginf(log_tail_BT1) | jnp.isneginf(tail_BT1))
        log_tail_BT1 = jnp.where(both, log_tail_BT1, -jnp.inf)
        z_tail_BT1 = jnp.where(both, tail_BT1, -jnp.inf)
    else:
        log_tail_BT1, z_tail_BT1 = jnp.full_like(tail_BT1, -jnp.inf), tail_BT1
    logp = normalised(jnp.concatenate([logp_BTK, log_tail_BT1], axis=-1))
    logq = normalised(jnp.concatenate([z_BTK, z_tail_BT1], axis=-1))
    loss_BT, slope, total_BT1 = value_and_slope(divergence, logp, logq)
    slope = slope - jnp.exp(logq) * total_BT1  # in the logits of K + 1 outcomes
    # The tail's logit is the log of a sum over ids, whose derivative is a softmax among them.
    within_BTV = jnp.exp(others_BTV - jnp.where(jnp.isneginf(tail_BT1), 0.0, tail_BT1))
    return loss_BT, _add(slope[..., -1:] * within_BTV, ids_BTK, slope[..., :-1])


def _sampled(
    logits_BTV: Array, ids_BTK: Array, logp_BTK: Array, kept_BTK: Array
) -> tuple[Array, Array]:
    logq_BTV = normalised(logits_BTV)
    share_BTK = kept_BTK / kept_BTK.sum(axis=-1, keepdims=True).clip(min=1)
    logq_BTK = jnp.take_along_axis(logq_BTV, ids_BTK.clip(max=logq_BTV.shape[-1] - 1), axis=-1)
    loss_BT = jnp.where(kept_BTK, share_BTK * (logp_BTK - logq_BTK), 0.0).sum(axis=-1)
    any_BT1 = kept_BTK.any(axis=-1, keepdims=True)
    return loss_BT, _add(jnp.where(any_BT1, jnp.exp(logq_BTV), 0.0), ids_BTK, -share_BTK)


def normalised_sum(logits_BTV: Array) -> Array:
    """``logsumexp`` over the last axis, kept; -inf where every logit is."""
    most = logits_BTV.max(axis=-1, keepdims=True)
    most = jnp.where(jnp.isneginf(most), 0.0, most)
    return most + jnp.log(jnp.exp(logits_BTV - most).sum(axis=-1, keepdims=True))


def _places(ids_BTK: Array) -> tuple[Array, Array, Array]:
    B, T, _ = ids_BTK.shape
    return jnp.arange(B)[:, None, None], jnp.arange(T)[None, :, None], ids_BTK


def _without(logits_BTV: Array, ids_BTK: Array) -> Array:
    return logits_BTV.at[_places(ids_BTK)].set(-jnp.inf, mode="drop")


def _add(dense_BTV: Array, ids_BTK: Array, values_BTK: Array) -> Array:
    return dense_BTV.at[_places(ids_BTK)].add(values_BTK, mode="drop")
