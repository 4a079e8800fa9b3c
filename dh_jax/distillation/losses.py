"""Distillation losses of tokens: from logits, or from hidden states without holding logits.

Each is ``weight * D + cross_entropy * CE``: a divergence D between teacher and student at a
temperature, and the student's cross-entropy at temperature 1 against the data's targets. Losses
are unreduced and 0 where the mask is False; whoever reduces divides by the global count.

**Common ids.** D is between the distributions over the ids that both sides have: the first
``vocabulary`` of both tables, less those whose logit (or log-probability) is -inf on either side.
Both are renormalised over them, so D is finite whatever is masked with -inf, and ids outside have
no gradient. With no common id D is 0. Cross-entropy is over all the student's own ids.

A teacher is given as logits ``[B, T, V]``, as `TeacherHead` (hidden states and weights, whose
logits are made a chunk at a time), or as `TopKLogits` (see `dh_jax.distillation.sparse`). No
gradient reaches it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dh_jax.batch import TopKLogits
from dh_jax.distillation import sparse
from dh_jax.distillation.divergences import (
    Divergence,
    check_divergence,
    normalised,
    value_and_slope,
)
from dh_jax.errors import ConfigError
from dh_jax.functions import Head
from dh_jax.unembedding import (
    Score,
    chunked_losses,
    fused_losses,
    token_losses,
    unembed,
)

Array: TypeAlias = jax.Array

CHUNK = 256  # tokens whose logits exist at one time


class Mix(NamedTuple):
    """What the parts of a loss weigh; arrays, so a schedule changes them without compiling.

    None leaves a part out, and its work.
    """

    weight: Array | float = 1.0  # of the divergence
    cross_entropy: Array | float | None = None
    temperature: Array | float | None = None  # divides both sides' logits in D; None: 1


class Kind(NamedTuple):
    """What a loss computes; static."""

    divergence: Divergence = Divergence()
    estimator: str = "tail"  # how a sparse teacher's unseen mass is taken
    squared: bool = True  # D is multiplied by temperature² (Hinton et al. 2015, section 2.1)
    vocabulary: int | None = None  # ids from here on are padding on both sides


MIX, KIND = Mix(), Kind()  # plain KL(teacher, student)


class TeacherHead(NamedTuple):
    """A teacher before its last matrix product."""

    hidden_BTD: Array  # of the teacher's own width
    head: Head
    states: Any = None  # of chosen layers by name, for `dh_jax.distillation.inside`


Teacher: TypeAlias = "Array | TeacherHead | TopKLogits"


def loss_from_logits(
    logits_BTV: Array,
    teacher: Teacher,
    targets_BT: Array,
    mask_BT: Array,
    mix: Mix = MIX,
    kind: Kind = KIND,
) -> Array:
    """Losses where the student's logits are at hand; forward and reverse mode.

    Args:
        logits_BTV: of the student, any floating type.
        teacher: see above.
        targets_BT: int32 ids for the cross-entropy.
        mask_BT: bool; which tokens count.
        mix: weights and temperature.
        kind: divergence, estimator and common vocabulary.

    Returns:
        ``loss_BT`` in float32 nats.

    Raises:
        ConfigError: the divergence or estimator is unknown, or the two do not go together.
    """
    score = _score(kind, teacher)
    part, whole = _parts(teacher, targets_BT, mix)
    loss_BT = token_losses(score, jnp.asarray(logits_BTV, jnp.float32), part, whole)
    return jnp.where(mask_BT, loss_BT, 0.0)


def loss_from_hidden(
    hidden_BTD: Array,
    head: Head,
    teacher: Teacher,
    targets_BT: Array,
    mask_BT: Array,
    mix: Mix = MIX,
    kind: Kind = KIND,
    *,
    chunk: int = CHUNK,
    forward_mode: bool = False,
) -> Array:
    """The same losses from hidden states, without a table of all tokens by the vocabulary.

    Args:
        hidden_BTD: of the student, behind its last norm; float32 or bfloat16.
        head: of the student.
        teacher, targets_BT, mask_BT, mix, kind: as in `loss_from_logits`.
        chunk: tokens (of all rows together) whose logits exist at one time. On a mesh multiply
            it by the ways that rows are split.
        forward_mode: give up the gradients made in the forward pass (see
            `dh_jax.unembedding.fused_losses`) for a loss that forward mode differentiates too.

    Returns:
        ``loss_BT`` in float32 nats.

    Raises:
        ConfigError: as `loss_from_logits`.
    """
    losses = chunked_losses if forward_mode else fused_losses
    part, whole = _parts(teacher, targets_BT, mix)
    return losses(_score(kind, teacher), hidden_BTD, head, part, whole, mask_BT, chunk)


# --- scores ----------------------------------------------------------------------------------


def _parts(teacher: Teacher, targets_BT: Array, mix: Mix) -> tuple[Any, Any]:
    """What belongs to tokens, and what to all; the teacher's without a gradient."""
    head = None
    if isinstance(teacher, TeacherHead):
        teacher, head, _ = teacher
    return jax.lax.stop_gradient((teacher, targets_BT)), jax.lax.stop_gradient((head, mix))


def _score(kind: Kind, teacher: Teacher) -> Score:
    check_divergence(kind.divergence)
    if kind.vocabulary is not None and kind.vocabulary < 1:
        raise ConfigError(f"vocabulary is {kind.vocabulary}; the least is 1, None takes all ids")
    if isinstance(teacher, TopKLogits):
        sparse.check_estimator(kind.estimator, kind.divergence)
        return partial(_mixed, kind, _sparse)
    return partial(_mixed, kind, _dense)


def _mixed(kind: Kind, divergence: Any, logits_BTV: Array, part: Any, whole: Any) -> Any:
    """``weight * D + cross_entropy * CE`` and its gradient in the student's logits."""
    teacher, targets_BT = part
    head, mix = whole
    if head is not None:
        teacher = unembed(teacher, head)
    scaled_BTV, factor, inner = logits_BTV, mix.weight, 1.0
    if mix.temperature is not None:
        scaled_BTV, inner = logits_BTV / mix.temperature, 1.0 / mix.temperature
        if kind.squared:
            factor = factor * mix.temperature**2
    loss_BT, slope_BTV = divergence(kind, mix, scaled_BTV, teacher)
    loss_BT, slope_BTV = factor * loss_BT, (factor * inner) * slope_BTV
    if mix.cross_entropy is None:
        return loss_BT, slope_BTV
    hard_BT, hard_BTV = cross_entropy_score(logits_BTV, targets_BT, None)
    return loss_BT + mix.cross_entropy * hard_BT, slope_BTV + mix.cross_entropy * hard_BTV


def _dense(kind: Kind, mix: Mix, scaled_BTV: Array, teacher_BTV: Array) -> tuple[Array, Array]:
    """D and its gradient in the student's logits over the temperature."""
    V = scaled_BTV.shape[-1]
    n = min(V, teacher_BTV.shape[-1])
    teacher_BTV = teacher_BTV[..., :n].astype(jnp.float32)
    if mix.temperature is not None:
        teacher_BTV = teacher_BTV / mix.temperature
    student_BTV = scaled_BTV[..., :n]
    common = ~(jnp.isneginf(student_BTV) | jnp.isneginf(teacher_BTV))
    if kind.vocabulary is not None and kind.vocabulary < n:
        common &= jnp.arange(n) < kind.vocabulary
    logp = normalised(jnp.where(common, teacher_BTV, -jnp.inf))
    logq = normalised(jnp.where(common, student_BTV, -jnp.inf))
    loss_BT, slope, total = value_and_slope(kind.divergence, logp, logq)
    slope = slope - jnp.exp(logq) * total
    return loss_BT, jnp.pad(slope, [(0, 0), (0, 0), (0, V - n)]) if n < V else slope


def _sparse(kind: Kind, mix: Mix, scaled_BTV: Array, teacher: TopKLogits) -> tuple[Array, Array]:
    return sparse.loss_and_slope(
        kind.divergence, kind.estimator, kind.vocabulary, scaled_BTV, teacher
    )


def cross_entropy_score(logits_BTV: Array, targets_BT: Array, whole: Any) -> tuple[Array, Array]:
    """``-log softmax(logits)[target]`` and its gradient: a `Score` whose part is the targets."""
    del whole
    logq_BTV = normalised(logits_BTV)
    loss_BT = -jnp.take_along_axis(logq_BTV, targets_BT[..., None], axis=-1)[..., 0]
    hit_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    return loss_BT, jnp.exp(logq_BTV) - hit_BTV
