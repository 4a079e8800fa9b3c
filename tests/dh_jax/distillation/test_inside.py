"""Hidden states and relations against their formulas, one token after another in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dh_jax.distillation.inside import (
    FORMS,
    Hidden,
    Inside,
    Relations,
    hidden_loss,
    relation_loss,
)
from dh_jax.distillation.losses import Kind, Mix
from dh_jax.distillation.objective import make_objective
from dh_jax.distillation.teacher import wrap_teacher
from dh_jax.errors import ConfigError, StateError
from dh_jax.functions import Head
from tests.dh_jax.distillation import literal_inside as literal
from tests.dh_jax.distillation.cases import SLOW, close

B, T, H, K = 2, 9, 4, 2  # query heads and key-value heads of the student
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2]], np.int32)


def states(seed, width, kv_heads=K):
    rng = np.random.default_rng(seed)
    heads = {"query": H, "key": kv_heads, "value": kv_heads}
    heads |= {"rotated_query": H, "rotated_key": kv_heads}
    return {name: rng.normal(size=(B, T, n, width)).astype(np.float32) for name, n in heads.items()}


def exact(given):
    return {k: torch.tensor(x, dtype=torch.float64, requires_grad=True) for k, x in given.items()}


QUICK = ("minilm", "bitdistill_algorithm")  # the others are half of each of these


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form in QUICK else SLOW) for form in FORMS]
)
def test_relations_and_their_gradients_are_the_formulas(form):
    student, teacher = states(0, 6), states(1, 10, kv_heads=1)
    rng = np.random.default_rng(2)
    mask, weights = rng.random((B, T)) < 0.8, rng.normal(size=(B, T)).astype(np.float32)
    for heads, causal, chunk in ((2, True, 4), (1, False, 100)):
        relations = Relations(1.0, form, heads, 0.3, causal)

        def total(student, relations=relations, chunk=chunk):
            loss_BT = relation_loss(student, teacher, SEGMENTS, mask, relations, chunk=chunk)
            return (weights * loss_BT).sum(), loss_BT

        found, loss_BT = jax.jit(jax.grad(total, has_aux=True))(student)
        reference = exact(student)
        expected_BT = literal.by_token(
            form, reference, exact(teacher), SEGMENTS, heads=heads, temperature=0.3, causal=causal
        ) * torch.tensor(mask)
        (expected_BT * torch.tensor(weights)).sum().backward()
        close(loss_BT, expected_BT.detach().numpy())
        for name, x in reference.items():
            close(found[name], np.zeros_like(student[name]) if x.grad is None else x.grad.numpy())


def test_without_masks_they_are_the_papers_whole_losses():
    rng = np.random.default_rng(3)
    one = np.ones((B, T), np.int32)
    shapes = {"query": (H, 6), "key": (K, 6), "value": (K, 6)}
    ours, theirs = (
        {name: rng.normal(size=(B, T, *shape)).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(2)
    )

    @partial(jax.jit, static_argnums=(0, 1, 2))
    def mean(form, heads, temperature=1.0):
        relations = Relations(1.0, form, heads, temperature, causal=False)
        return relation_loss(ours, theirs, one, one > 0, relations).mean()

    tensors = [[torch.tensor(x[n], dtype=torch.float64) for n in shapes] for x in (ours, theirs)]
    # Algorithm 1 takes Q, K, V of one shape; the sum over them is the same taken one by one.
    for heads, temperature in ((1, 1.0), (2, 0.05)):
        expected = sum(
            literal.algorithm_1([s.swapaxes(1, 2)], [t.swapaxes(1, 2)], heads, temperature)
            for s, t in zip(*tensors, strict=True)
        )
        close(mean("bitdistill_algorithm", heads, temperature), np.asarray(expected))
    expected = np.mean(
        [
            literal.equation_11_12(*([x[b].flatten(1) for x in side] for side in tensors), heads=3)
            for b in range(B)
        ]
    )
    close(mean("bitdistill_equation", 3), expected)
    close(mean("minilm_v2", 3), expected)


def test_documents_do_not_see_each_other_and_the_future_is_not_seen():
    student, teacher = states(0, 6), states(1, 6)
    mask = SEGMENTS > 0

    def loss(student, causal=True):
        relations = Relations(1.0, "bitdistill_equation", causal=causal)
        return np.asarray(relation_loss(student, teacher, SEGMENTS, mask, relations))

    changed = {name: x.copy() for name, x in student.items()}
    for x in changed.values():
        x[0, 5] += 1.0  # in the second document of the first row
    differs = loss(student) != loss(changed)
    assert differs[0, 5:7].all() and differs.sum() == 2
    differs = loss(student, causal=False) != loss(changed, causal=False)
    assert differs[0, 4:7].all() and differs.sum() == 3
    assert not loss(student)[~mask].any()


def test_hidden_states_with_and_without_a_projection():
    rng = np.random.default_rng(4)
    x, y = (rng.normal(size=(B, T, n)).astype(np.float32) for n in (5, 7))
    W = rng.normal(size=(5, 7)).astype(np.float32)
    mask = SEGMENTS > 0
    z = x.astype(np.float64) @ W
    cosine = 1 - (z * y).sum(-1) / np.sqrt((z * z).sum(-1) * (y.astype(np.float64) ** 2).sum(-1))
    for form, expected in (("mse", ((z - y) ** 2).mean(-1)), ("cosine", cosine)):
        close(hidden_loss(x, y, mask, form, W), expected * mask)
    slope = jax.grad(lambda W: hidden_loss(x, y, mask, "mse", W).sum())(W)
    expected = 2 / 7 * np.einsum("btd,bte->de", x * mask[..., None], z - y)
    close(slope, expected)
    zero = jax.grad(lambda x: hidden_loss(x, y, mask, "cosine").sum())(np.zeros_like(y))
    assert np.isfinite(zero).all()


def test_what_fits_no_model_is_refused():
    student, teacher, mask = states(0, 6), states(1, 6), SEGMENTS > 0
    with pytest.raises(ConfigError, match="heads is 5, which does not divide the 24 elements"):
        relation_loss(student, teacher, SEGMENTS, mask, Relations(heads=5))
    with pytest.raises(ConfigError, match=r"'minilm_v3' .did you mean 'minilm_v2'"):
        relation_loss(student, teacher, SEGMENTS, mask, Relations(form="minilm_v3"))
    fewer = teacher | {"rotated_query": teacher["rotated_query"][:, :, :2]}
    with pytest.raises(ConfigError, match="student has 4, the teacher 2; take another form"):
        relation_loss(student, fewer, SEGMENTS, mask, Relations(form="minilm"))
    with pytest.raises(ConfigError, match="24 wide, the teacher's 12; give a projection"):
        hidden_loss(np.ones((1, 2, 24)), np.ones((1, 2, 12)), np.ones((1, 2), bool))


# --- in an objective --------------------------------------------------------------------------


def objective(inside, *, shows=True, live=True):
    rng = np.random.default_rng(5)
    shown = states(0, 6) | {"hidden": rng.normal(size=(B, T, 5)).astype(np.float32)}
    wanted = states(1, 6) | {"hidden": rng.normal(size=(B, T, 5)).astype(np.float32)}
    hidden, kernel = rng.normal(size=(B, T, 5)), rng.normal(size=(5, 11))

    def student(params, batch):
        found = jax.tree.map(lambda x: params * x, shown)
        return jnp.float32(hidden), Head(jnp.float32(kernel)), *([found] if shows else [])

    teacher = wrap_teacher(
        jnp.float32(1.1), hidden_fn=lambda s, b: (jnp.float32(s * hidden), Head(kernel), wanted)
    )
    made = make_objective(student, teacher if live else None, Kind(), inside=inside)
    return made, shown, wanted


def test_terms_are_added_with_their_weights_and_measured_without():
    from dh_jax.batch import Batch

    mask = SEGMENTS > 0
    batch = Batch(SEGMENTS, SEGMENTS, mask, SEGMENTS, SEGMENTS, np.zeros(B, np.int32))
    relations = Relations(30.0, "bitdistill_algorithm")
    made, shown, wanted = objective(Inside(Hidden(7.0), relations))
    plain, *_ = objective(Inside())
    args = (jnp.float32(1.0), batch, jax.random.key(0))
    extra = made.loss_fn(Mix())(*args) - plain.loss_fn(Mix())(*args)
    hidden = hidden_loss(shown["hidden"], wanted["hidden"], mask)
    related = relation_loss(shown, wanted, SEGMENTS, mask, relations)
    np.testing.assert_allclose(extra, 7 * hidden + 30 * related, rtol=1e-5, atol=1e-5)
    measured = made.measure(args[0], batch, Mix())
    np.testing.assert_allclose(measured.hidden, hidden[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(measured.relations, related[mask].mean(), rtol=1e-5)
    with pytest.raises(ConfigError, match="a cache holds a teacher's logits"):
        objective(Inside(Hidden()), live=False)
    with pytest.raises(StateError, match="must both show states"):
        objective(Inside(Hidden()), shows=False)[0].loss_fn(Mix())(*args)
