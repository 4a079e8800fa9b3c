"""Universal logit distillation: pairs that have read the same text, and the formula in float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from dh_jax.config import ModelConfig
from dh_jax.data.tokenization import train_bpe
from dh_jax.distillation.teacher import wrap_teacher
from dh_jax.distillation.universal import align, make_universal, same_ends, universal_from_logits
from dh_jax.errors import ConfigError
from dh_jax.models import decoder
from tests.dh_jax.distillation.cases import SLOW, close

TEXTS = ["the cat sat on the mat, and the dog 🐕 too", "naïve café", "", "a b c " * 30]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second byte-level BPE, of far fewer merges."""
    return train_bpe(TEXTS * 3, 280, tmp_path_factory.mktemp("other"))


def test_partners_end_at_the_same_byte(tokenizer, other):
    length = 40
    pair = align(TEXTS, tokenizer, other, length)
    count = 0
    for b, text in enumerate(TEXTS):
        ids, theirs = pair.student.tokens_BT[b], pair.teacher.tokens_BT[b]
        n = min(length, tokenizer.encode(text).size)
        np.testing.assert_array_equal(ids[:n], tokenizer.encode(text)[:n])
        np.testing.assert_array_equal(pair.student.segment_ids_BT[b], np.arange(length) < n)
        m = int(pair.teacher.segment_ids_BT[b].sum())
        np.testing.assert_array_equal(theirs[:m], other.encode(text)[:m])
        # Bytes read so far, by decoding prefixes: what a partner must have in common.
        read = [_bytes(tokenizer, ids[: i + 1]) for i in range(n)]
        read_too = [_bytes(other, theirs[: j + 1]) for j in range(m)]
        for i in range(n):
            place = int(pair.places_BT[b, i])
            if place >= 0:
                assert read[i] == read_too[place]
                count += 1
            elif read[i].decode(errors="replace").encode() == read[i]:  # no character is broken
                assert read[i] not in read_too
        assert (pair.places_BT[b, n:] == -1).all()
    assert count > 30
    with pytest.raises(ConfigError, match="length is 1"):
        align(TEXTS, tokenizer, other, 1)


def _bytes(tokenizer, ids):
    """What byte-level ids spell, with EOS as one byte that no text has."""
    table = {c: b for b, c in enumerate(_alphabet())}
    spelt = b""
    for i in ids.tolist():
        token = tokenizer._backend.id_to_token(i)
        spelt += b"\xff" if i == tokenizer.eos_id else bytes(table[c] for c in token)
    return spelt


def _alphabet():
    from dh_jax.data.text.vocabulary import byte_characters

    return byte_characters()


def test_of_tokens_with_one_end_the_last_is_paired():
    found = same_ends([1, 3, 3, 4, -1, 6], [2, 3, 3, 3, -1, 6])
    np.testing.assert_array_equal(found, [-1, -1, 3, -1, -1, 5])
    assert same_ends([], [1]).size == 0
    np.testing.assert_array_equal(same_ends([1, 2], []), [-1, -1])


@pytest.mark.parametrize(("V", "W"), [(7, 12), pytest.param(12, 7, marks=SLOW)])
def test_the_distance_and_its_gradient_are_the_formula(V, W):
    rng = np.random.default_rng(0)
    z, y = (2 * rng.normal(size=(2, 3, n)).astype(np.float32) for n in (V, W))
    z[0, 0, 2] = -np.inf
    mask = np.array([[True, True, False], [True, True, True]])
    loss_BT = jax.jit(universal_from_logits)(z, y, mask, 2.0)
    slope = jax.jit(jax.grad(lambda z: universal_from_logits(z, y, mask, 2.0).sum()))(z)
    ours = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for b, t in np.ndindex(2, 3):
        q = sorted(torch.softmax(ours[b, t] / 2, -1), reverse=True)
        p = sorted(torch.softmax(torch.tensor(y[b, t]).double() / 2, -1), reverse=True)
        zero = torch.zeros((), dtype=torch.float64)
        q, p = (x + [zero] * (max(V, W) - len(x)) for x in (q, p))
        if mask[b, t]:
            expected[b, t] = sum(abs(a - b) for a, b in zip(p, q, strict=True))
    close(loss_BT, expected.detach().numpy())
    expected.sum().backward()
    close(slope, ours.grad.numpy())


@pytest.mark.slow
def test_a_student_comes_nearer_to_a_teacher_of_another_tokenizer(tokenizer, other):
    pair = align(TEXTS, tokenizer, other, 24)
    small = ModelConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=24, init_scale=0.3)
    graph, params = decoder.build(small, tokenizer.vocab_size, jax.random.key(0))
    theirs, weights = decoder.build(small, other.vocab_size, jax.random.key(1))
    teacher = wrap_teacher(weights, hidden_fn=decoder.hidden_fn(theirs))
    key, mask = jax.random.key(2), pair.student.loss_mask_BT
    losses = [
        make_universal(decoder.hidden_fn(graph), teacher, weight=w, chunk=chunk)
        for w, chunk in ((0.0, 8), (1.0, 8), (1.0, 1000))
    ]
    plain, chunked, whole = (loss(params, pair, key) for loss in losses)
    np.testing.assert_allclose(plain, decoder.loss_fn(graph)(params, pair.student, key), rtol=2e-5)
    np.testing.assert_allclose(chunked, whole, rtol=1e-5, atol=1e-6)
    logits = decoder.logits_fn(graph)(params, pair.student)
    partners = np.take_along_axis(
        np.asarray(decoder.logits_fn(theirs)(weights, pair.teacher)),
        pair.places_BT.clip(0)[..., None], 1,
    )  # fmt: skip
    distance = universal_from_logits(logits, partners, mask & (pair.places_BT >= 0))
    np.testing.assert_allclose(chunked - plain, distance, rtol=1e-3, atol=1e-5)

    @jax.jit
    def step(params):
        def mean(params):
            return (losses[1](params, pair, key) - losses[0](params, pair, key)).sum() / mask.sum()

        value, slope = jax.value_and_grad(mean)(params)
        return value, jax.tree.map(lambda x, g: x - 0.3 * g, params, slope)

    values = []
    for _ in range(30):
        value, params = step(params)
        values.append(float(value))
    assert values[-1] < 0.6 * values[0]
