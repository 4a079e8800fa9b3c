"""Losses on what happens inside: hidden states, and relations of queries, keys and values.

A relation is, for every token, a distribution over the tokens of its own document: softmax of the
products of its vector with theirs. The loss is KL(teacher's, student's), averaged over heads and
added up over the relations. Widths of heads may differ between the two, so nothing is projected.

====================  =============================================================================
minilm                attention, softmax(Q K^T / sqrt(d)), and V with V (MiniLM, Wang et al. 2020,
                      arXiv:2002.10957, equations 5 to 8); both have the same number of heads
minilm_v2             Q with Q, K with K, V with V over ``heads`` relation heads (MiniLMv2, Wang et
                      al. 2021, arXiv:2012.15828, section 3.1)
bitdistill_equation   the same: equations 11 and 12 of BitDistill (Wu et al. 2025,
                      arXiv:2510.13998), with alpha = 1
bitdistill_algorithm  Algorithm 1 of BitDistill: vectors are scaled to length 1 and products
                      divided by a temperature, of which the paper says nothing (1 here);
                      probabilities are at least 1e-8
====================  =============================================================================

The papers write no mask. Here a token sees its own document alone, and with ``causal`` the part up
to itself, as the attention of a decoder does. They average over all tokens; a `LossFn` is 0 where
nothing is learnt, so the mean here is over learnt targets. Q, K and V are the projections, before
norms of heads and rotary positions; MiniLM's attention is behind both. Keys and values of grouped
queries are taken as they are (MiniLM's repeated for each head of queries).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dh_jax.config import suggest
from dh_jax.errors import ConfigError
from dh_jax.unembedding import map_tokens

Array: TypeAlias = jax.Array
States: TypeAlias = Mapping[str, Array]  # by the names of `dh_jax.models.states`

FORMS = ("minilm", "minilm_v2", "bitdistill_equation", "bitdistill_algorithm")
HIDDEN_FORMS = ("mse", "cosine")
CHUNK = 256  # tokens whose relations exist at one time

_UNSEEN = -1e30  # a finite score, so that no difference of two is NaN
_LEAST = math.log(1e-8)


class Hidden(NamedTuple):
    """A term on hidden states; static."""

    weight: float = 1.0
    form: str = "mse"


class Relations(NamedTuple):
    """A term on relations; static."""

    weight: float = 1.0
    form: str = "bitdistill_equation"
    heads: int = 1  # relation heads, which divide the vectors of all heads together; see `FORMS`
    temperature: float = 1.0  # of bitdistill_algorithm
    causal: bool = True


class Inside(NamedTuple):
    """What of the inside is distilled; static."""

    hidden: Hidden | None = None
    relations: Relations | None = None


def states_of(relations: Relations) -> tuple[str, ...]:
    """The states that a term reads, by the names of `dh_jax.models.states`."""
    rotated = ("rotated_query", "rotated_key", "value")
    return rotated if relations.form == "minilm" else ("query", "key", "value")


def check_inside(inside: Inside) -> None:
    """Refuse terms that make no loss.

    Raises:
        ConfigError: names the key, its value and the cure.
    """
    hidden, relations = inside
    if hidden is not None:
        _check_form(hidden.form, HIDDEN_FORMS, "hidden")
    if relations is None:
        return
    _check_form(relations.form, FORMS, "relations")
    if relations.heads < 1:
        raise ConfigError(f"relations.heads is {relations.heads}; the least is 1")
    if not relations.temperature > 0:
        raise ConfigError(f"relations.temperature is {relations.temperature}; it must be above 0")


def _check_form(form: str, known: tuple[str, ...], term: str) -> None:
    if form not in known:
        raise ConfigError(
            f"{term}.form {form!r}{suggest(form, list(known))}; known: {', '.join(known)}"
        )


def hidden_loss(
    student_BTD: Array,
    teacher_BTE: Array,
    mask_BT: Array,
    form: str = "mse",
    projection_DE: Array | None = None,
) -> Array:
    """How far a student's hidden states are from a teacher's.

    Args:
        student_BTD: any floating type.
        teacher_BTE: no gradient reaches it.
        mask_BT: bool; which tokens count.
        form: ``mse``, the mean of squared differences over E (TinyBERT, Jiao et al. 2020,
            arXiv:1909.10351, equation 8), or ``cosine``, 1 less the cosine of the angle between
            both (DistilBERT, Sanh et al. 2019, arXiv:1910.01108).
        projection_DE: of the student's states; None where both are of one width.

    Returns:
        ``loss_BT`` float32, 0 where the mask is False.

    Raises:
        ConfigError: the form is unknown, or widths differ and nothing projects.
    """
    _check_form(form, HIDDEN_FORMS, "hidden")
    x, y = (jnp.asarray(h, jnp.float32) for h in (student_BTD, teacher_BTE))
    y = jax.lax.stop_gradient(y)
    if projection_DE is not None:
        x = x @ projection_DE
    if x.shape[-1] != y.shape[-1]:
        raise ConfigError(
            f"the student's hidden states are {x.shape[-1]} wide, the teacher's {y.shape[-1]}; "
            "give a projection"
        )
    loss_BT = jnp.square(x - y).mean(-1) if form == "mse" else 1 - (_unit(x) * _unit(y)).sum(-1)
    return jnp.where(mask_BT, loss_BT, 0.0)


def relation_loss(
    student: States,
    teacher: States,
    segment_ids_BT: Array,
    mask_BT: Array,
    relations: Relations,
    *,
    chunk: int = CHUNK,
) -> Array:
    """KL between the relations of a teacher and a student (the weight is the caller's).

    Args:
        student: ``states_of(relations)``, each ``[B, T, heads, width]``, any floating type.
        teacher: the same; no gradient reaches it.
        segment_ids_BT: int32; tokens are related to those of their own segment.
        mask_BT: bool; which tokens count.
        relations: see above.
        chunk: tokens (of all rows together) whose relations with all others exist at one time;
            the backward pass makes them again.

    Returns:
        ``loss_BT`` in float32 nats, 0 where the mask is False.

    Raises:
        ConfigError: the term makes no loss, or heads do not fit both models.
    """
    check_inside(Inside(relations=relations))
    ours = _pairs(student, relations, "student")
    theirs = jax.lax.stop_gradient(_pairs(teacher, relations, "teacher"))
    if ours[0][0].shape[2] != theirs[0][0].shape[2]:
        raise ConfigError(
            f"minilm compares attention head by head; the student has {ours[0][0].shape[2]}, the "
            f"teacher {theirs[0][0].shape[2]}; take another form"
        )
    B, T = segment_ids_BT.shape
    places_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    keys = [[keys for _, keys in side] for side in (ours, theirs)]

    def one(given: Any) -> Array:
        queries, segment_ids_BC, places_BC = given
        seen_BCT = segment_ids_BC[:, :, None] == segment_ids_BT[:, None, :]
        if relations.causal:
            seen_BCT &= places_BC[:, :, None] >= jnp.arange(T)
        loss_BC = jnp.zeros(segment_ids_BC.shape, jnp.float32)
        related = partial(_related, seen_BACT=seen_BCT[:, None], relations=relations)
        for q_ours, k_ours, q_theirs, k_theirs in zip(
            queries[0], keys[0], queries[1], keys[1], strict=True
        ):
            logq, logp = related(q_ours, k_ours), related(q_theirs, k_theirs)
            kl_BACT = jnp.where(seen_BCT[:, None], jnp.exp(logp) * (logp - logq), 0.0)
            loss_BC += kl_BACT.sum(-1).mean(1)
        return loss_BC

    queries = [[queries for queries, _ in side] for side in (ours, theirs)]
    function = one if chunk >= B * T else jax.checkpoint(one)
    loss_BT = map_tokens(function, (queries, segment_ids_BT, places_BT), chunk)
    return jnp.where(mask_BT, loss_BT, 0.0)


def _pairs(states: States, relations: Relations, whose: str) -> list[tuple[Array, Array]]:
    """Vectors ``[B, T, A, d]`` of tokens that ask and tokens that are asked, for each relation."""
    first, key, value = (jnp.asarray(states[n], jnp.float32) for n in states_of(relations))
    if relations.form == "minilm":
        group = first.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
        return [(first, key), (value, value)]
    split = [_split(x, relations.heads, whose) for x in (first, key, value)]
    if relations.form == "bitdistill_algorithm":
        split = [_unit(x) for x in split]
    return [(x, x) for x in split]


def _split(x_BTHh: Array, heads: int, whose: str) -> Array:
    B, T, H, h = x_BTHh.shape
    if H * h % heads:
        raise ConfigError(
            f"relations.heads is {heads}, which does not divide the {H * h} elements of all heads "
            f"of the {whose}; take a number that divides both models' queries, keys and values"
        )
    return x_BTHh.reshape(B, T, heads, -1)


def _related(q_BCAd: Array, k_BTAd: Array, seen_BACT: Array, relations: Relations) -> Array:
    """Log-probabilities ``[B, A, C, T]``."""
    exact = relations.form == "bitdistill_algorithm"
    scale = relations.temperature if exact else math.sqrt(q_BCAd.shape[-1])
    scores_BACT = jnp.einsum("bcad,btad->bact", q_BCAd, k_BTAd) / scale
    logp = jax.nn.log_softmax(jnp.where(seen_BACT, scores_BACT, _UNSEEN), axis=-1)
    return jnp.maximum(logp, _LEAST) if exact else logp


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True).clip(min=1e-24))
