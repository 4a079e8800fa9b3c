"""Every loss and its gradients against full tables in float64, in all the ways to compute it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dh_jax.batch import TopKLogits
from dh_jax.config import MeshConfig
from dh_jax.distillation.divergences import DIVERGENCES, Divergence
from dh_jax.distillation.losses import (
    Kind,
    Mix,
    TeacherHead,
    loss_from_hidden,
    loss_from_logits,
)
from dh_jax.distillation.sparse import top_k
from dh_jax.distributed.mesh import batch_sharding, make_mesh
from dh_jax.distributed.placement import on_mesh
from dh_jax.errors import ConfigError
from dh_jax.functions import Head
from tests.dh_jax.distillation import literal
from tests.dh_jax.distillation.cases import (
    BETA,
    CHUNKS,
    EACH,
    SLOW,
    B,
    D,
    K,
    T,
    V,
    close,
    drawn,
    gradients_of,
    kind_of,
)

# --- dense -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH)
def test_from_logits_equals_the_full_table_in_float64(name):
    d = drawn()
    logits = (d["hidden"] @ d["kernel"]).astype(np.float32)
    mix = Mix(0.6, 0.4, 2.0)
    found = gradients_of(
        lambda z: loss_from_logits(z, d["teacher"], d["targets"], d["mask"], mix, kind_of(name)),
        d["weights"],
        logits,
    )
    expected = literal.loss_and_gradients(
        (logits,), d["teacher"], d["targets"], d["mask"], d["weights"],
        name=name, beta=BETA, mix=mix,
    )  # fmt: skip
    close(found, expected)


EXAMPLES = given(
    name=st.sampled_from(list(DIVERGENCES)),
    seed=st.integers(0, 1000),
    chunk=st.sampled_from(CHUNKS),
    mask=st.sampled_from(["random", "all", "none"]),
    equal=st.booleans(),  # weights: made in the forward pass, or again in the backward
    how=st.sampled_from(["kernel", "embedding", "capped"]),
)


def compare_from_hidden(name, seed, chunk, mask, equal, how):
    d = drawn(seed)
    mask_BT = {"random": d["mask"], "all": d["mask"] | True, "none": d["mask"] & False}[mask]
    weights = np.full((B, T), 0.25, np.float32) if equal else d["weights"]
    mix, cap = Mix(0.7, 0.3, 1.5), 3.0 if how == "capped" else None

    def loss_of(hidden, kernel, bias):
        if how == "embedding":
            head = Head(embedding_VD=kernel.T, bias_V=bias)
        else:
            head = Head(kernel, bias_V=bias, cap=cap)
        return loss_from_hidden(
            hidden, head, d["teacher"], d["targets"], mask_BT, mix, kind_of(name), chunk=chunk
        )

    found = gradients_of(loss_of, weights, d["hidden"], d["kernel"], d["bias"])
    expected = literal.loss_and_gradients(
        (d["hidden"], d["kernel"], d["bias"], cap), d["teacher"], d["targets"], mask_BT, weights,
        name=name, beta=BETA, mix=mix,
    )  # fmt: skip
    close(found, expected)


test_from_hidden_equals_the_full_table = settings(max_examples=3)(EXAMPLES(compare_from_hidden))
test_from_hidden_equals_the_full_table_often = pytest.mark.slow(
    settings(max_examples=25)(EXAMPLES(compare_from_hidden))
)


def test_a_teacher_of_hidden_states_is_its_logits():
    d, rng = drawn(), np.random.default_rng(3)
    wide = rng.normal(size=(B, T, 7)).astype(np.float32)
    head = Head(rng.normal(size=(7, V)).astype(np.float32), cap=4.0)
    logits = 4.0 * np.tanh(wide @ head.kernel_DV / 4.0)
    losses = [
        loss_from_hidden(d["hidden"], Head(d["kernel"]), teacher, d["targets"], d["mask"], chunk=4)
        for teacher in (TeacherHead(wide, head), logits)
    ]
    close(losses[0], losses[1])


@pytest.mark.parametrize("teacher_vocabulary", [V - 4, V + 4])
def test_only_common_ids_are_compared(teacher_vocabulary):
    d = drawn(teacher_vocabulary=teacher_vocabulary)
    logits = (d["hidden"] @ d["kernel"]).astype(np.float32)
    logits[:, 1, 3:5] = -np.inf  # the student lacks some, the teacher others
    d["teacher"][:, 2, 2:9] = -np.inf
    d["teacher"][0, 3] = -np.inf  # and here all
    mix, kind = Mix(1.0, None, 2.0), kind_of("jensen_shannon", vocabulary=12, squared=False)
    found = gradients_of(
        lambda z: loss_from_logits(z, d["teacher"], d["targets"], d["mask"] | True, mix, kind),
        d["weights"],
        logits,
    )
    expected = literal.loss_and_gradients(
        (logits,), d["teacher"], d["targets"], d["mask"] | True, d["weights"],
        name="jensen_shannon", beta=BETA, mix=mix, squared=False, vocabulary=12,
    )  # fmt: skip
    close(found, expected)
    assert not np.asarray(found[1][0])[..., 12:].any()


@pytest.mark.parametrize("name", EACH)
def test_extremes_give_finite_losses_and_gradients(name):
    d = drawn()
    logits = 100 * (d["hidden"] @ d["kernel"])
    logits[0, 0], logits[0, 1, 1:] = -np.inf, -np.inf
    d["teacher"][0, 2], d["teacher"][0, 3, 1:] = -np.inf, -np.inf
    d["teacher"][0, 4] = np.finfo(np.float32).min  # the mask of other libraries
    d["targets"][:, :2] = 0
    for mask in (d["mask"] | True, d["mask"] & False):
        for teacher in (d["teacher"], top_k(d["teacher"], K)):
            found = gradients_of(
                lambda z, t=teacher, m=mask: loss_from_logits(
                    z, t, d["targets"], m, Mix(1.0, None, 0.05), kind_of(name)
                ),
                d["weights"],
                logits,
            )
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_equal_sides_lose_nothing_and_the_value_is_a_divergence_not_a_cross_entropy():
    d = drawn()

    @jax.jit
    def losses(student):
        return [
            loss_from_logits(student, d["teacher"], d["targets"], d["mask"], Mix(), kind_of(name))
            for name in DIVERGENCES
        ]

    for same, other in zip(losses(d["teacher"]), losses(-d["teacher"]), strict=True):
        assert np.abs(same).max() < 1e-6
        assert other[d["mask"]].min() > 1e-3 and not other[~d["mask"]].any()


@SLOW
def test_forward_mode_and_curvature_agree_with_finite_steps():
    d = drawn()
    direction = np.random.default_rng(5).normal(size=(D, V)).astype(np.float32)

    def total(kernel, name):
        return loss_from_hidden(
            d["hidden"], Head(kernel), d["teacher"], d["targets"], d["mask"],
            Mix(0.6, 0.4, 2.0), kind_of(name), chunk=4, forward_mode=True,
        ).sum()  # fmt: skip

    for name in ("forward_kl", "jensen_shannon"):
        of_name = partial(total, name=name)
        slope = jax.grad(of_name)
        _, along = jax.jvp(of_name, (d["kernel"],), (direction,))
        np.testing.assert_allclose(along, (slope(d["kernel"]) * direction).sum(), rtol=1e-5)
        _, curved = jax.jvp(slope, (d["kernel"],), (direction,))
        step = 1e-2
        ends = [slope(d["kernel"] + s * step * direction) for s in (1, -1)]
        np.testing.assert_allclose(curved, (ends[0] - ends[1]) / (2 * step), atol=2e-3)


def test_accumulated_parts_and_eight_devices_give_the_same():
    d = {k: np.tile(v, (4,) + (1,) * (v.ndim - 1)) for k, v in drawn(7).items() if v.shape[0] == B}
    kernel = drawn(7)["kernel"]
    count = d["mask"].sum()

    def gradient(hidden, teacher, targets, mask, kernel):
        def loss_of(kernel):
            loss_BT = loss_from_hidden(
                hidden, Head(kernel), teacher, targets, mask, Mix(0.5, 0.5, 2.0), chunk=16
            )
            return loss_BT.sum() / count

        return jax.value_and_grad(loss_of)(kernel)

    rows = [d[name] for name in ("hidden", "teacher", "targets", "mask")]
    whole = jax.jit(gradient)(*rows, kernel)
    parts = [jax.jit(gradient)(*(x[at : at + 4] for x in rows), kernel) for at in (0, 4)]
    close(jax.tree.map(jnp.add, *parts), whole)
    mesh = make_mesh(MeshConfig(data=8))
    placed = jax.device_put(rows, batch_sharding(mesh))
    close(jax.jit(on_mesh(gradient, mesh))(*placed, kernel), whole)


def test_a_close_student_has_accurate_gradients_in_bfloat16():
    rng = np.random.default_rng(0)
    width, vocabulary = 64, 512
    hidden = jnp.asarray(rng.normal(size=(2, 32, width)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(width, vocabulary)) / 8, jnp.bfloat16)
    other = hidden + jnp.asarray(0.13 * rng.normal(size=hidden.shape), jnp.bfloat16)
    targets, mask = np.zeros((2, 32), np.int32), np.ones((2, 32), bool)
    teacher = np.asarray(other, np.float32) @ np.asarray(kernel, np.float32)

    def loss_of(hidden, kernel):
        teacher = TeacherHead(other, Head(kernel))
        return loss_from_hidden(hidden, Head(kernel), teacher, targets, mask, chunk=16)

    loss_BT, found = gradients_of(loss_of, 1 / 64, hidden, kernel)
    expected = literal.loss_and_gradients(
        (np.asarray(hidden, np.float32), np.asarray(kernel, np.float32), None, None),
        teacher, targets, mask, np.full(mask.shape, 1 / 64),
        name="forward_kl", beta=0, mix=(1.0, None, 1.0),
    )  # fmt: skip
    assert 0.004 < loss_BT.mean() < 0.016
    for a, b in zip(found, expected[1], strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert error < 3e-3


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Kind(Divergence("foward_kl")), "'foward_kl' .did you mean 'forward_kl'"),
        (Kind(Divergence("jensen_shannon", 1.0)), "beta is 1.0"),
        (Kind(Divergence("skewed_forward_kl", 1.0)), "from 0 to below 1"),
        (Kind(estimator="tails"), "'tails'"),
        (Kind(Divergence("reverse_kl"), "sampled"), "draws from the teacher"),
        (Kind(Divergence("reverse_kl"), "teacher_renormalised"), "may be infinite"),
        (Kind(vocabulary=0), "the least is 1"),
    ],
)
def test_what_makes_no_loss_is_refused(kind, message):
    d = drawn()
    teacher = top_k(jnp.asarray(d["teacher"]), K)
    with pytest.raises(ConfigError, match=message):
        loss_from_logits(d["teacher"], teacher, d["targets"], d["mask"], Mix(), kind)


# --- other devices ---------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_lower_for_accelerators(platform):
    def gradient(hidden, kernel, other, ids, log_probs, tail):
        targets, mask = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), bool)

        def total(hidden, kernel):
            head, mix = Head(kernel), Mix(0.5, 0.5, 2.0)
            dense = loss_from_hidden(
                hidden, head, TeacherHead(other, head), targets, mask, mix, chunk=4
            )
            sparse = loss_from_hidden(
                hidden, head, TopKLogits(ids, log_probs, tail), targets, mask, mix, chunk=4
            )
            return (dense + sparse).sum()

        return jax.grad(total, argnums=(0, 1))(hidden, kernel)

    shapes = [
        ((B, T, D), jnp.bfloat16), ((D, V), jnp.bfloat16), ((B, T, D), jnp.bfloat16),
        ((B, T, K), jnp.int32), ((B, T, K), jnp.float32), ((B, T), jnp.float32),
    ]  # fmt: skip
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    exported = jax.export.export(jax.jit(gradient), platforms=[platform])(*arguments)
    assert exported.platforms == (platform,)
