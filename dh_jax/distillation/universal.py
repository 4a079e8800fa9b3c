"""A teacher with another tokenizer: universal logit distillation where both have read the same.

ULD (Boizard et al. 2024, arXiv:2402.12030, section 3.2) compares two distributions over different
vocabularies by their sorted probabilities, the shorter filled up with zeros::

    loss_t = sum_i |p_(i) - q_(i)|        p_(1) >= p_(2) >= ... of the teacher, q of the student

which is the Wasserstein distance where moving any id to any other costs the same. The paper pairs
the t-th tokens of both; here a token of the student is paired with the teacher's token that *ends
at the same byte of the text*, so both have read the same and say what follows. A token that ends
where none of the teacher's does, or inside a character, has no partner and no such loss.

No gradient says which id is right, so this goes beside cross-entropy::

    pair = align(texts, student_tokenizer, teacher_tokenizer, length=512)
    loss = make_universal(decoder.hidden_fn(graph), teacher, weight=1.5)
    loss_BT = loss(params, pair, key)  # cross-entropy + 1.5 ULD, of the student's tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch, TopKLogits
from dh_jax.data.text.offsets import Located
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distillation.losses import CHUNK, TeacherHead
from dh_jax.distillation.teacher import TeacherWrapper
from dh_jax.errors import ConfigError
from dh_jax.functions import Head, HiddenFn, Params, cross_entropy
from dh_jax.unembedding import map_tokens, unembed

Array: TypeAlias = jax.Array


class Pair(NamedTuple):
    """The same documents for two models, one document a row."""

    student: Batch
    teacher: Batch
    places_BT: Any  # int32: of each token of the student its partner in the teacher's row, or -1


# --- the same place of a text ----------------------------------------------------------------


def align(
    texts: Sequence[str], student: TokenizerWrapper, teacher: TokenizerWrapper, length: int
) -> Pair:
    """Encode documents twice and find which tokens end at the same place.

    Args:
        texts: one document a row.
        student: its ids are what is learnt.
        teacher: its ids are read as long as the student's row goes on.
        length: T, tokens of a row of the student; what is longer is cut. The teacher's rows are
            as long as the longest.

    Returns:
        NumPy batches, and places.

    Raises:
        ConfigError: a length below 2.
        DataError: a text cannot be encoded.
    """
    if length < 2:
        raise ConfigError(f"length is {length}; a token and its target need 2")
    rows, others = ([_read(*each) for each in _encoded(texts, side)] for side in (student, teacher))
    rows = [_Read(*(column[:length] for column in row)) for row in rows]
    others = [
        _Read(*(column[: np.searchsorted(row.ends, mine.ends[-1:].max(initial=-1), "right")]
                for column in row))
        for row, mine in zip(others, rows, strict=True)
    ]  # fmt: skip
    places_BT = np.full((len(rows), length), -1, np.int32)
    for b, (mine, theirs) in enumerate(zip(rows, others, strict=True)):
        places_BT[b, : mine.ids.size] = same_ends(*(_boundaries(row) for row in (mine, theirs)))
    longest = max([2, *(row.ids.size for row in others)])
    return Pair(
        _batch([row.ids for row in rows], length), _batch([row.ids for row in others], longest),
        places_BT,
    )  # fmt: skip


def same_ends(ends_n: Any, ends_m: Any) -> Any:
    """For each of n tokens the last of m tokens that ends where it does, or -1.

    Args:
        ends_n: where tokens of a text end, in any unit; -1 for one that ends nowhere, inside a
            character. Of tokens with one end only the last has a partner.
        ends_m: of the other tokenization, in the same unit.

    Returns:
        int32 ``[n]``.
    """
    ends_n, ends_m = np.asarray(ends_n, np.int64), np.asarray(ends_m, np.int64)
    size = max(ends_n.max(initial=0), ends_m.max(initial=0)) + 1
    last_n, last_m = _last(ends_n, size), _last(ends_m, size)
    own = (ends_n >= 0) & (last_n[ends_n] == np.arange(ends_n.size))
    return np.where(own, last_m[ends_n], -1).astype(np.int32)


def _last(ends_n: Any, size: int) -> Any:
    """The last token that ends at each place, or -1."""
    places = np.full(size, -1)
    np.maximum.at(places, ends_n[ends_n >= 0], np.flatnonzero(ends_n >= 0))
    return places


class _Read(NamedTuple):
    """n tokens, and the first and one past the last character that each is part of."""

    ids: Any
    starts: Any
    ends: Any


def _encoded(texts: Sequence[str], tokenizer: TokenizerWrapper) -> list[Any]:
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    eos = tokenizer.eos_id if tokenizer.add_eos else None
    return [(found, bos, eos) for found in tokenizer.encode_located(texts)]


def _read(found: Located, bos: int | None, eos: int | None) -> _Read:
    """With the tokenizer's policy: BOS ends at 0, EOS is a character behind all others."""
    end = found.ends_n[-1] if found.ids.size else 0
    before = [] if bos is None else [(bos, 0, 0)]
    behind = [] if eos is None else [(eos, end, end + 1)]
    columns = np.array(before, np.int64).reshape(-1, 3), np.array(behind, np.int64).reshape(-1, 3)
    inner = np.stack([found.ids, found.starts_n, found.ends_n], axis=1).astype(np.int64)
    return _Read(*np.concatenate([columns[0], inner, columns[1]]).T)


def _boundaries(row: _Read) -> Any:
    """Ends, -1 of tokens whose last character goes on in the next one."""
    goes_on = np.append(row.starts[1:] < row.ends[:-1], np.zeros(min(1, row.ids.size), bool))
    return np.where(goes_on, -1, row.ends)


def _batch(rows: list[Any], length: int) -> Batch:
    tokens, targets, segments, positions = np.zeros((4, len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), np.bool_)
    for b, ids in enumerate(rows):
        n = ids.size
        tokens[b, :n], segments[b, :n], positions[b, :n] = ids, 1, np.arange(n)
        targets[b, : max(n - 1, 0)], mask[b, : max(n - 1, 0)] = ids[1:], True
    return Batch(tokens, targets, mask, segments, positions, np.zeros(len(rows), np.int32))


# --- the loss --------------------------------------------------------------------------------


def universal_from_logits(
    logits_BTV: Array, teacher_BTW: Array, mask_BT: Array, temperature: Array | float = 1.0
) -> Array:
    """The distance between sorted probabilities of tokens that are paired already.

    Args:
        logits_BTV: of the student.
        teacher_BTW: of the teacher's partner of each token; no gradient reaches it.
        mask_BT: bool; which tokens count.
        temperature: divides both sides' logits.

    Returns:
        ``loss_BT`` float32, from 0 to 2; 0 where the mask is False.
    """
    V, W = logits_BTV.shape[-1], teacher_BTW.shape[-1]
    q, p = (
        jnp.sort(
            jax.nn.softmax(jnp.asarray(z, jnp.float32) / temperature, axis=-1), descending=True
        )
        for z in (logits_BTV, jax.lax.stop_gradient(teacher_BTW))
    )
    q, p = (
        jnp.pad(x, [(0, 0), (0, 0), (0, max(V, W) - x.shape[-1])]) for x in (q, p)
    )  # fmt: skip
    return jnp.where(mask_BT, jnp.abs(p - q).sum(-1), 0.0)


def make_universal(
    student: HiddenFn,
    teacher: TeacherWrapper,
    *,
    weight: float = 1.5,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Callable[[Params, Pair, Array], Array]:
    """Cross-entropy and ``weight`` times ULD, for pairs from `align`.

    Args:
        student: its parameters are trained.
        teacher: live, of any tokenizer.
        weight: lambda of the paper, which takes 1.5.
        temperature: divides both sides' logits in ULD.
        chunk: tokens whose logits exist at one time; the backward pass makes them again.

    Returns:
        ``(params, pair, key) -> loss_BT`` of the student's tokens, in the house's form; to reduce
        by ``pair.student.loss_mask_BT``. The teacher's weights are carried by the returned
        `jax.tree_util.Partial`, which a step takes as an argument.
    """
    carried = (
        student if isinstance(student, jax.tree_util.Partial) else jax.tree_util.Partial(student)
    )

    def loss(student: HiddenFn, weights: Params, params: Params, pair: Pair, key: Array) -> Array:
        del key  # nothing is drawn at random
        hidden_BTD, head = student(params, pair.student)
        mask_BT = pair.student.loss_mask_BT
        paired_BT = mask_BT & (pair.places_BT >= 0)
        outputs = teacher.function(weights, pair.teacher)
        table: Head | None = None
        if isinstance(outputs, TeacherHead):
            outputs, table, _ = outputs
        assert not isinstance(outputs, TopKLogits), "a live teacher gives logits or hidden states"
        theirs = jnp.take_along_axis(outputs, pair.places_BT.clip(min=0)[..., None], axis=1)

        def one(given: Any) -> Array:
            hidden_BCD, theirs, targets_BC, paired_BC = given
            logits_BCV = unembed(hidden_BCD, head)
            theirs = theirs if table is None else unembed(theirs, table)
            distance_BC = universal_from_logits(logits_BCV, theirs, paired_BC, temperature)
            return cross_entropy(logits_BCV, targets_BC) + weight * distance_BC

        given = hidden_BTD, theirs, pair.student.targets_BT, paired_BT
        loss_BT: Array = map_tokens(jax.checkpoint(one), given, chunk)
        return jnp.where(mask_BT, loss_BT, 0.0)

    return jax.tree_util.Partial(loss, carried, teacher.params)
