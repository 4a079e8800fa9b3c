"""SmolLM2-135M as it is: what a sparse teacher lacks on real text, and what relations weigh."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from dh_jax.batch import Batch
from dh_jax.config import ModelConfig
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distillation.inside import Relations, relation_loss
from dh_jax.functions import masked_mean
from dh_jax.models import decoder
from dh_jax.models.pretrained import load_pretrained
from dh_jax.models.states import states_fn
from tests.dh_jax.distillation.test_sparse import check_the_bound

T, CUT = 64, 40  # two documents in one row


def real_row(folder: Path) -> Batch:
    """Real text, which Python itself carries."""
    texts = [Path(str(module.__file__)).read_text() for module in (json, pickle)]
    tokenizer = TokenizerWrapper.load(folder)
    first, second = (tokenizer.encode(text[:2000]) for text in texts)
    tokens = np.concatenate([first[:CUT], second[: T - CUT]]).astype(np.int32)[None]
    places = np.arange(T)
    segments = np.where(places < CUT, 1, 2)[None].astype(np.int32)
    positions = np.where(places < CUT, places, places - CUT)[None].astype(np.int32)
    mask = ((places != CUT - 1) & (places != T - 1))[None]
    return Batch(tokens, np.roll(tokens, -1, 1), mask, segments, positions, np.zeros(1, np.int32))


@pytest.mark.slow
def test_live_less_cached_is_the_divergence_inside_the_tail(smollm2_folder: Path) -> None:
    """64 entries of 49,152; the student is the teacher with noise, and one that knows nothing."""
    batch = real_row(smollm2_folder)
    teacher = load_pretrained(smollm2_folder, ModelConfig(scan_layers=True))
    logits = np.asarray(jax.jit(decoder.logits_fn(teacher.graph))(teacher.params, batch))
    noise = np.random.default_rng(0).normal(size=logits.shape).astype(np.float32)
    for student in (logits + noise, 0.1 * noise):
        live, sparse = check_the_bound(student, logits, 64, 2e-5)
        print(f"live {live.mean():.4f}, cached {sparse.mean():.4f} nats")


@pytest.mark.slow
def test_weighted_relations_move_a_ternary_smollm2(smollm2_folder: Path) -> None:
    """BitDistill's setting: a ternary copy of its teacher, gamma 1e3 (summaries), 1e5 (classes)."""
    batch = real_row(smollm2_folder)
    layers = dict.fromkeys(("query", "key", "value"), -1)
    teacher = load_pretrained(smollm2_folder, ModelConfig(scan_layers=True))
    theirs = jax.jit(states_fn(teacher.graph, layers))(teacher.params, batch)[2]
    ternary = ModelConfig(scan_layers=True, linear="ternary")
    graph, params, *_ = load_pretrained(smollm2_folder, ternary)
    loss_fn, student = decoder.loss_fn(graph), states_fn(graph, layers)

    @jax.jit
    def of_cross_entropy(params: Any) -> Any:
        def mean(params: Any) -> Any:
            return masked_mean(loss_fn(params, batch, jax.random.key(0)), batch.loss_mask_BT)

        return optax.tree.norm(jax.grad(mean)(params))

    @jax.jit
    def of_states(params: Any, slopes: Any) -> Any:
        pull = jax.vjp(lambda params: student(params, batch)[2], params)[1]
        return optax.tree.norm(pull(slopes)[0])

    def mean(ours: Any, relations: Relations) -> Any:
        loss_BT = relation_loss(ours, theirs, batch.segment_ids_BT, batch.loss_mask_BT, relations)
        return masked_mean(loss_BT, batch.loss_mask_BT)

    hard, ours = float(of_cross_entropy(params)), jax.jit(student)(params, batch)[2]
    # The paper names one temperature, 5, that of logits; its Algorithm 1 names none.
    for temperature, gammas in ((5.0, (1e3, 1e5)), (1.0, (1e3,))):
        relations = Relations(form="bitdistill_algorithm", temperature=temperature)
        soft = float(of_states(params, jax.grad(mean)(ours, relations)))
        print(f"temperature {temperature}: {soft / hard:.3g} of the cross-entropy's at weight 1")
        for gamma in gammas:
            assert 1e-2 < gamma * soft / hard < 1e2, (gamma, soft, hard)
