"""What a run is told of student and teacher, and that a schedule compiles nothing again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.batch import Batch
from dh_jax.distillation.losses import Kind, Mix
from dh_jax.distillation.objective import make_objective
from dh_jax.distillation.sparse import top_k
from dh_jax.distillation.teacher import fingerprint_of, wrap_teacher
from dh_jax.errors import ConfigError, StateError
from dh_jax.functions import Head
from tests.dh_jax.distillation.cases import B, T, drawn


def batch_of(d):
    tokens = np.zeros((B, T), np.int32)
    return Batch(tokens, d["targets"], d["mask"], tokens, tokens, np.zeros(B, np.int32))


def test_measures_are_the_formulas_means_over_the_mask():
    d = drawn(3)
    batch, mask = batch_of(d), d["mask"]

    def student(params, batch):
        return jnp.asarray(d["hidden"]), Head(params)

    teacher = wrap_teacher(jnp.asarray(d["teacher"]), logits_fn=lambda params, batch: params)
    full = make_objective(student, teacher, Kind(), chunk=4)
    found = full.measure(d["kernel"], batch, Mix(0.5, 0.5, 2.0))
    p = np.exp(d["teacher"] / 2.0)
    p /= p.sum(-1, keepdims=True)
    z = (d["hidden"] @ d["kernel"]).astype(np.float64)
    q = np.exp(z / 2.0) / np.exp(z / 2.0).sum(-1, keepdims=True)
    hard = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, d["targets"][..., None], -1)[..., 0]
    each = (
        (p * np.log(p / q)).sum(-1), hard, z.argmax(-1) == d["teacher"].argmax(-1),
        -(p * np.log(p)).sum(-1), *np.zeros((3, B, T)),  # no tail, and nothing of the inside
    )  # fmt: skip
    np.testing.assert_allclose(found, [x[mask].mean() for x in each], rtol=2e-5, atol=1e-6)
    sparse = batch._replace(teacher=top_k(d["teacher"], 5))
    found = make_objective(student, None, Kind(), chunk=4).measure(d["kernel"], sparse, Mix())
    p = np.exp(d["teacher"])
    p /= p.sum(-1, keepdims=True)
    tail = np.sort(p, -1)[..., :-5].sum(-1)
    np.testing.assert_allclose(found.tail_mass, tail[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(found.agreement, each[2][mask].mean(), rtol=1e-6)


def test_a_schedule_changes_the_loss_and_compiles_nothing():
    d, count = drawn(3), []

    def student(params, batch):
        count.append(1)
        return jnp.asarray(d["hidden"]), Head(params)

    teacher = wrap_teacher(jnp.asarray(d["teacher"]), logits_fn=lambda params, batch: params)
    objective = make_objective(student, teacher, Kind())
    compute = jax.jit(lambda loss, params, batch: loss(params, batch, jax.random.key(0)).sum())
    losses = [
        float(compute(objective.loss_fn(Mix(a, 1 - a, t)), d["kernel"], batch_of(d)))
        for a, t in ((1.0, 1.0), (0.5, 1.0), (0.5, 3.0))
    ]
    assert len(set(losses)) == 3 and len(count) == 1


def test_a_batch_without_a_teacher_is_refused():
    d = drawn()
    objective = make_objective(lambda p, b: (d["hidden"], Head(p)), None, Kind())
    with pytest.raises(StateError, match="carries no teacher"):
        objective.loss_fn(Mix())(d["kernel"], batch_of(d), jax.random.key(0))
    with pytest.raises(ConfigError, match="give one of the two"):
        wrap_teacher(d["kernel"])


def test_a_fingerprint_knows_every_number(tmp_path):
    params = {"a": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    prints = {
        fingerprint_of(params), fingerprint_of(params, "bfloat16"),
        fingerprint_of({"a": params["a"].at[1, 2].set(2), "b": params["b"]}),
        fingerprint_of({"a": params["a"].reshape(3, 2), "b": params["b"]}),
    }  # fmt: skip
    assert len(prints) == 4
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert fingerprint_of(tmp_path) != before
