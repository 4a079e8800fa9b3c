"""Records of a teacher's entries: what they keep, at what size and error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dh_jax.batch import TopKLogits
from dh_jax.distillation.codec import CODECS, decode, encode, layout
from dh_jax.errors import ConfigError


def entries_of(rng, tokens, k, vocabulary, sharpness):
    logits = sharpness * rng.standard_normal((tokens, vocabulary))
    logp = logits - np.logaddexp.reduce(logits, axis=-1)[:, None]
    order = np.argsort(-logp, axis=-1)
    found = np.take_along_axis(logp, order, -1)
    tail = np.logaddexp.reduce(found[:, k:], -1) if k < vocabulary else np.full(tokens, -np.inf)
    return TopKLogits(order[:, :k], found[:, :k], tail)


@settings(max_examples=60)
@given(
    codec=st.sampled_from(CODECS),
    size=st.sampled_from([(1, 1), (1, 7), (5, 5), (3, 1000), (64, 512), (200, 300), (16, 70_000)]),
    sharpness=st.sampled_from([0.0, 1.0, 4.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_a_record_keeps_ids_and_nearly_the_probabilities(codec, size, sharpness, seed):
    k, vocabulary = size
    given = entries_of(np.random.default_rng(seed), 3, k, vocabulary, sharpness)
    of = layout(codec, k, vocabulary)
    records = encode(given, of)
    assert records.shape == (3, of.width)
    found = decode(records, of)
    mass = np.exp(found.log_probs_BTK, dtype=np.float64).sum(-1) + np.exp(found.log_tail_BT)
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    assert (np.diff(found.log_probs_BTK) <= 0).all()
    for n in range(3):
        true = dict(zip(given.ids_BTK[n].tolist(), given.log_probs_BTK[n], strict=True))
        kept = dict(zip(found.ids_BTK[n].tolist(), found.log_probs_BTK[n], strict=True))
        assert true.keys() == kept.keys()
        p = {i: np.exp(x) for i, x in true.items()}
        assert sum(abs(np.exp(kept[i]) - p[i]) for i in p) < 0.03


def test_sizes_at_64_entries_of_49152_ids():
    assert layout("plain", 64, 49_152).width == 195
    assert layout("dense", 64, 49_152).width == 159
    assert layout("plain", 64, 70_000).width == 64 * 5 + 3


def test_the_divergence_that_rounding_adds():
    """Of distributions as peaked as a language model's: about 10 % of the mass in the tail."""
    rng = np.random.default_rng(0)
    logits = 2.2 * rng.standard_normal((40, 49_152)) - np.log(np.arange(1, 49_153)) * 1.2
    logp = logits - np.logaddexp.reduce(logits, axis=-1)[:, None]
    order = np.argsort(-logp, axis=-1)
    logp = np.take_along_axis(logp, order, -1)
    given = TopKLogits(order[:, :64], logp[:, :64], np.logaddexp.reduce(logp[:, 64:], -1))
    found = decode(encode(given, layout("plain", 64, 49_152)), layout("plain", 64, 49_152))
    assert (found.ids_BTK == given.ids_BTK).all()
    p, tail = np.exp(given.log_probs_BTK), np.exp(given.log_tail_BT)
    added = (p * (given.log_probs_BTK - found.log_probs_BTK)).sum(-1)
    added += tail * (given.log_tail_BT - found.log_tail_BT)
    assert 0 < added.mean() < 2e-5


def test_what_is_no_record_is_refused():
    with pytest.raises(ConfigError, match=r"'dence' .did you mean 'dense'"):
        layout("dence", 4, 10)
    with pytest.raises(ConfigError, match="11 entries of a vocabulary of 10"):
        layout("plain", 11, 10)
