"""What a student is trained on, and what is told of it: losses and measures over batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch, TopKLogits
from dh_jax.distillation.divergences import normalised
from dh_jax.distillation.inside import (
    Inside,
    States,
    check_inside,
    hidden_loss,
    relation_loss,
)
from dh_jax.distillation.losses import (
    CHUNK,
    Kind,
    Mix,
    Teacher,
    TeacherHead,
    loss_from_hidden,
    loss_from_logits,
)
from dh_jax.distillation.teacher import TeacherWrapper
from dh_jax.errors import ConfigError, StateError
from dh_jax.functions import HiddenFn, LossFn, Params, StatesFn, cross_entropy, masked_mean
from dh_jax.unembedding import map_tokens, unembed

Array: TypeAlias = jax.Array
Live: TypeAlias = "Callable[[Params, Batch], Teacher] | None"  # None: batches carry the teacher

NOTHING = Inside()


class Measures(NamedTuple):
    """Means over the valid targets of a batch; scalars, float32."""

    divergence: Array  # nats, at the loss's temperature, without weight and temperature²
    cross_entropy: Array  # nats, of the student against the data
    agreement: Array  # share of targets at which both find the same id most probable
    teacher_entropy: Array  # nats at the loss's temperature; a sparse teacher's tail is one outcome
    tail_mass: Array  # of a sparse teacher; 0 of a full one
    hidden: Array  # without its weight; 0 where it is no part of the loss
    relations: Array  # nats, the same


class Objective(NamedTuple):
    """A loss for every `Mix`, and its measures; made by `make_objective`.

    All losses of one objective have one compiled program: weights and temperature are arguments.
    """

    loss_fn: Callable[[Mix], LossFn]
    measure: Callable[[Params, Batch, Mix], Measures]


def make_objective(
    student: HiddenFn | StatesFn,
    teacher: TeacherWrapper | None,
    kind: Kind,
    *,
    inside: Inside = NOTHING,
    chunk: int = CHUNK,
    wrap: Callable[[Any], Any] = lambda function: function,
) -> Objective:
    """Distillation of a student from a live teacher, or from the one that batches carry.

    Args:
        student: its parameters are what is trained.
        teacher: None reads ``batch.teacher`` (from `CachedTeacher.join`).
        kind: divergence, estimator, common vocabulary.
        inside: terms on states of layers, added to the loss times their weights. Student and
            teacher must then show these states (`StatesFn`).
        chunk: tokens whose logits exist at one time; on a mesh times the ways of its rows.
        wrap: `on_mesh` of the run's mesh.

    Raises:
        ConfigError: a term on the inside makes no loss, or there is no live teacher for it.
    """
    check_inside(inside)
    if inside != NOTHING and teacher is None:
        raise ConfigError(
            "a cache holds a teacher's logits, not its hidden states or relations; give a live "
            "teacher, or leave these terms out"
        )
    live = None if teacher is None else teacher.function
    carried = (
        student if isinstance(student, jax.tree_util.Partial) else jax.tree_util.Partial(student),
        None if teacher is None else teacher.params,
    )
    loss = wrap(partial(_loss, live, kind, inside, chunk))
    measure = jax.jit(wrap(partial(_measure, live, kind, inside, chunk)))
    return Objective(
        lambda mix: jax.tree_util.Partial(loss, *carried, _arrays(mix)),
        lambda params, batch, mix: measure(*carried, _arrays(mix), params, batch),
    )


def _arrays(mix: Mix) -> Mix:
    arrays: Any = (None if x is None else jnp.float32(x) for x in mix)
    return Mix(*arrays)


def _loss(
    live: Live, kind: Kind, inside: Inside, chunk: int, student: HiddenFn | StatesFn,
    weights: Params, mix: Mix, params: Params, batch: Batch, key: Array,
) -> Array:  # fmt: skip
    del key  # nothing is drawn at random
    hidden_BTD, head, *states = student(params, batch)
    teacher = _teacher(live, weights, batch)
    loss_BT = loss_from_hidden(
        hidden_BTD, head, teacher, batch.targets_BT, batch.loss_mask_BT, mix, kind, chunk=chunk
    )
    for weight, term_BT in _inside(inside, states, teacher, batch, chunk):
        loss_BT += weight * term_BT
    return loss_BT


def _inside(
    inside: Inside, states: Sequence[States], teacher: Teacher, batch: Batch, chunk: int
) -> tuple[tuple[float, Array | float], tuple[float, Array | float]]:
    """Weight and value of the term on hidden states, and of that on relations."""
    hidden: tuple[float, Array | float] = (0.0, 0.0)
    relations: tuple[float, Array | float] = (0.0, 0.0)
    if inside == NOTHING:
        return hidden, relations
    if not states or not isinstance(teacher, TeacherHead) or teacher.states is None:
        raise StateError("student and teacher must both show states; see dh_jax.functions.StatesFn")
    ours, theirs, mask_BT = states[0], teacher.states, batch.loss_mask_BT
    if (one := inside.hidden) is not None:
        hidden = one.weight, hidden_loss(ours["hidden"], theirs["hidden"], mask_BT, one.form)
    if (two := inside.relations) is not None:
        term_BT = relation_loss(ours, theirs, batch.segment_ids_BT, mask_BT, two, chunk=chunk)
        relations = two.weight, term_BT
    return hidden, relations


def _teacher(live: Live, weights: Params, batch: Batch) -> Teacher:
    teacher = batch.teacher if live is None else live(weights, batch)
    if teacher is None:
        raise StateError(
            "the batch carries no teacher; give get_loader the cache (join=cached.join), or the "
            "objective a live teacher"
        )
    return teacher


def _measure(
    live: Live, kind: Kind, inside: Inside, chunk: int, student: HiddenFn | StatesFn,
    weights: Params, mix: Mix, params: Params, batch: Batch,
) -> Measures:  # fmt: skip
    hidden_BTD, head, *states = student(params, batch)
    teacher = _teacher(live, weights, batch)
    terms = [
        jnp.broadcast_to(jnp.float32(term), batch.loss_mask_BT.shape)
        for _, term in _inside(inside, states, teacher, batch, chunk)
    ]
    table = None
    if isinstance(teacher, TeacherHead):
        teacher, table, _ = teacher
    plain = mix._replace(weight=jnp.float32(1.0), cross_entropy=None)
    plain_kind = kind._replace(squared=False)
    temperature = jnp.float32(1.0) if mix.temperature is None else mix.temperature

    def one(given: Any) -> tuple[Array, ...]:
        hidden_BCD, teacher, targets_BC, mask_BC = given
        logits_BCV = unembed(hidden_BCD, head)
        teacher = teacher if table is None else unembed(teacher, table)
        loss_BC = loss_from_logits(logits_BCV, teacher, targets_BC, mask_BC, plain, plain_kind)
        if isinstance(teacher, TopKLogits):
            best_BC = jnp.take_along_axis(
                teacher.ids_BTK, teacher.log_probs_BTK.argmax(-1)[..., None], axis=-1
            )[..., 0]
            rest = teacher.log_tail_BT[..., None]
            logp = jnp.concatenate([teacher.log_probs_BTK, rest], axis=-1)
            tail_BC = jnp.exp(teacher.log_tail_BT)
        else:
            best_BC = teacher.argmax(-1)
            logp = normalised(teacher.astype(jnp.float32) / temperature)
            tail_BC = jnp.zeros_like(loss_BC)
        p = jnp.exp(logp)
        return (
            loss_BC,
            cross_entropy(logits_BCV, targets_BC),
            (logits_BCV.argmax(-1) == best_BC).astype(jnp.float32),
            -jnp.where(p > 0, p * logp, 0.0).sum(-1),
            tail_BC,
        )

    mask_BT = batch.loss_mask_BT
    each = *map_tokens(one, (hidden_BTD, teacher, batch.targets_BT, mask_BT), chunk), *terms
    return Measures(*(masked_mean(jnp.where(mask_BT, x, 0.0), mask_BT) for x in each))
