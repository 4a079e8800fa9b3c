"""Sparse teachers: each estimator against its formula, and what it says of the full table."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.distillation.divergences import DIVERGENCES
from dh_jax.distillation.losses import Kind, Mix, loss_from_hidden, loss_from_logits
from dh_jax.distillation.sparse import ESTIMATORS, check_temperature, sample_teacher, top_k
from dh_jax.errors import ConfigError
from dh_jax.functions import Head
from tests.dh_jax.distillation import literal
from tests.dh_jax.distillation.cases import (
    BETA,
    SLOW,
    B,
    K,
    T,
    V,
    close,
    drawn,
    gradients_of,
    kind_of,
)

QUICKEST = (("tail", "forward_kl"), ("both_renormalised", "forward_kl"))


@pytest.mark.parametrize(
    ("estimator", "name"),
    [
        pytest.param(estimator, name, marks=() if (estimator, name) in QUICKEST else SLOW)
        for estimator in ESTIMATORS
        for name in DIVERGENCES
        if not (estimator == "sampled" and name != "forward_kl")
        and not (estimator == "teacher_renormalised" and "reverse" in name)
    ],
)
def test_a_sparse_teacher_equals_its_formula_in_float64(estimator, name):
    d = drawn(1)
    logits, mix = (d["hidden"] @ d["kernel"]).astype(np.float32), Mix(0.6, 0.4, 2.0)
    if estimator == "sampled":
        keys_BT = jax.random.split(jax.random.key(0), d["teacher"].shape[:2])
        teacher = sample_teacher(jnp.asarray(d["teacher"]), K, keys_BT, 2.0)
    else:
        teacher = top_k(jnp.asarray(d["teacher"]), K, 2.0)

    def loss_of(hidden, kernel):
        return loss_from_hidden(
            hidden, Head(kernel), teacher, d["targets"], d["mask"], mix,
            kind_of(name, estimator=estimator), chunk=5,
        )  # fmt: skip

    found = gradients_of(loss_of, d["weights"], d["hidden"], d["kernel"])
    expected = literal.loss_and_gradients(
        (d["hidden"], d["kernel"], None, None), tuple(map(np.asarray, teacher)), d["targets"],
        d["mask"], d["weights"], name=name, beta=BETA, mix=mix, estimator=estimator,
    )  # fmt: skip
    close(found, expected)
    assert logits.shape == d["teacher"].shape


@SLOW
@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_entries_are_the_full_table(name):
    d = drawn(2)
    logits = (d["hidden"] @ d["kernel"]).astype(np.float32)
    found = [
        gradients_of(
            lambda z, t=teacher: loss_from_logits(
                z, t, d["targets"], d["mask"], Mix(), kind_of(name)
            ),
            d["weights"],
            logits,
        )
        for teacher in (d["teacher"], top_k(jnp.asarray(d["teacher"]), V))
    ]
    close(found[1], found[0])


@pytest.mark.parametrize(
    "estimator",
    ["tail", *(pytest.param(e, marks=SLOW) for e in ("teacher_renormalised", "both_renormalised"))],
)
def test_entries_that_the_student_lacks_are_left_out_of_both_sides(estimator):
    d = drawn(4)
    logits = jnp.asarray(d["hidden"] @ d["kernel"])
    teacher = top_k(jnp.asarray(d["teacher"]), K)
    # A fifth and sixth entry, one past the vocabulary and one that the student rules out.
    banned = jnp.full((B, T, 1), 3, jnp.int32)
    there = (teacher.ids_BTK == 3).any(-1, keepdims=True)
    ids = jnp.concatenate([teacher.ids_BTK, jnp.where(there, V, banned), banned + V], -1)
    extra = jnp.full((B, T, 2), -2.0)
    wide = teacher._replace(
        ids_BTK=ids, log_probs_BTK=jnp.concatenate([teacher.log_probs_BTK, extra], -1)
    )
    z = logits.at[..., 3].set(-jnp.inf)
    losses = [
        loss_from_logits(z, t, d["targets"], d["mask"], Mix(), Kind(estimator=estimator))
        for t in (wide, teacher)
    ]
    close(losses[0], losses[1])


@SLOW
def test_the_tail_is_a_lower_bound_that_grows_with_k():
    d = drawn(6)
    logits = jnp.asarray(d["hidden"] @ d["kernel"])
    for name in DIVERGENCES:
        losses = [
            loss_from_logits(
                logits, top_k(jnp.asarray(d["teacher"]), k), d["targets"], d["mask"], Mix(),
                kind_of(name),
            )
            for k in (1, 4, 9, V)
        ]  # fmt: skip
        for fewer, more in itertools.pairwise(losses):
            assert (fewer <= more + 1e-6).all()


@SLOW
def test_samples_are_unbiased_in_value_and_gradient():
    d = drawn(8)
    logits, teacher = jnp.asarray(d["hidden"] @ d["kernel"]), jnp.asarray(d["teacher"]) / 2
    draws = 4_000

    def loss_and_gradient(given, estimator):
        kind = Kind(estimator=estimator)

        def total(z):
            loss_BT = loss_from_logits(z, given, d["targets"], d["mask"] | True, Mix(), kind)
            return loss_BT.sum(), loss_BT

        slope, loss_BT = jax.grad(total, has_aux=True)(logits)
        return loss_BT, slope

    keys_NBT = jax.random.split(jax.random.key(1), (draws, *teacher.shape[:2]))
    each = jax.jit(
        jax.vmap(lambda keys: loss_and_gradient(sample_teacher(teacher, 3, keys), "sampled"))
    )(keys_NBT)
    expected = loss_and_gradient(teacher, "tail")
    for found, true in zip(each, expected, strict=True):
        error = (found.mean(0) - true) / (found.std(0) / draws**0.5 + 1e-6)
        assert np.abs(error).max() < 5  # standard errors, of 216 numbers


def test_draws_come_as_often_as_the_teacher_says_also_of_a_large_vocabulary():
    V, draws = 50_000, 400_000
    logits_V = 2 * jax.random.normal(jax.random.key(0), (V,)).at[7].set(-jnp.inf)
    logits_V = logits_V.at[V - 1].set(10.0)
    keys_BT = jax.random.split(jax.random.key(1), (1, 1))
    ids_K = np.asarray(sample_teacher(logits_V[None, None], draws, keys_BT).ids_BTK[0, 0])
    p_V = np.exp(np.float64(logits_V - logits_V.max()))
    p_V /= p_V.sum()
    assert ids_K.min() >= 0 and ids_K.max() == V - 1 and 7 not in ids_K
    # Halves, hundredths, and the most probable ids: each within five standard errors.
    for groups in (2, 100):
        of_id_V = np.arange(V) * groups // V
        p_G = np.bincount(of_id_V, p_V)
        error_G = np.bincount(of_id_V[ids_K], minlength=groups) / draws - p_G
        assert np.abs(error_G / np.sqrt(p_G / draws)).max() < 5
    top = p_V.argsort()[-50:]
    error = np.bincount(ids_K, minlength=V)[top] / draws - p_V[top]
    assert np.abs(error / np.sqrt(p_V[top] / draws)).max() < 5


def test_drawing_makes_no_table_of_draws_by_vocabulary():
    T, V, K = 64, 8192, 64
    shapes = (
        jax.ShapeDtypeStruct((1, T, V), jnp.float32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (1, T))),
    )
    compiled = jax.jit(sample_teacher, static_argnums=1).lower(shapes[0], K, shapes[1]).compile()
    table = T * V * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * table  # not 64 of them


def test_another_temperature_than_the_stored_one_is_refused():
    check_temperature(2.0, 2.0)
    with pytest.raises(ConfigError, match=r"temperature is 1\.0.*stored at 2\.0"):
        check_temperature(1.0, 2.0)


# --- the stated error of the tail bucket -----------------------------------------------------


def inside_the_tail(logits, teacher_logits, ids):
    """The KL among the ids that are not kept, times their mass; float64, [B, T]."""
    found = np.zeros(ids.shape[:2])
    for b, t in np.ndindex(*ids.shape[:2]):
        rest = np.setdiff1d(np.arange(logits.shape[-1]), ids[b, t])
        z, y = logits[b, t].astype(np.float64), teacher_logits[b, t].astype(np.float64)
        logp, logq = (x[rest] - np.log(np.exp(x[rest] - x.max()).sum()) - x.max() for x in (y, z))
        mass = np.exp(y[rest] - y.max()).sum() / np.exp(y - y.max()).sum()
        found[b, t] = mass * (np.exp(logp) * (logp - logq)).sum()
    return found


def check_the_bound(logits, teacher_logits, k, tolerance):
    """Live less cached is the KL inside the tail, which is not negative."""
    entries = top_k(jnp.asarray(teacher_logits), k)
    nothing, mask = np.zeros(logits.shape[:2], np.int32), np.ones(logits.shape[:2], bool)
    live, sparse = (
        np.asarray(loss_from_logits(logits, teacher, nothing, mask), np.float64)
        for teacher in (teacher_logits, entries)
    )
    gap = inside_the_tail(logits, teacher_logits, np.asarray(entries.ids_BTK))
    assert (gap >= 0).all() and gap.max() > 0
    np.testing.assert_allclose(live - sparse, gap, rtol=0, atol=tolerance)
    return live, sparse


def test_what_the_tail_lacks_is_the_divergence_inside_it():
    d = drawn(4)
    check_the_bound((d["hidden"] @ d["kernel"]).astype(np.float32), d["teacher"], K, 2e-6)


@SLOW
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_tail_is_a_lower_bound_of_every_divergence(name):
    d = drawn(4)
    logits, kind = (d["hidden"] @ d["kernel"]).astype(np.float32), kind_of(name)
    live, sparse = (
        loss_from_logits(logits, teacher, d["targets"], d["mask"], Mix(), kind)
        for teacher in (d["teacher"], top_k(jnp.asarray(d["teacher"]), K))
    )
    assert (np.asarray(live - sparse)[d["mask"]] > -1e-6).all()
