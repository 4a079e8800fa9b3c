"""Which characters tokens stand for: adding up lengths gives what the Rust tokenizer tracks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from dh_jax.data.text.offsets import _added_up, spelt_bytes
from dh_jax.data.tokenization import TokenizerWrapper
from tests.dh_jax.data.text.chat_cases import CASES, load_case
from tests.dh_jax.data.tokenizer_cases import ODD_TEXTS, any_text, real_texts

CONTROLS = "<|im_start|>user\n\n é<|im_end|>\n<|endoftext|><repo_name>"


def assert_tracked(tokenizer: TokenizerWrapper, texts: list[str]) -> int:
    """Ids and places of texts are those that the Rust tokenizer tracks; how many added up."""
    fast = 0
    for rendered in (False, True):
        backend = tokenizer._parsing_backend if rendered else tokenizer._plain_backend
        located = tokenizer.encode_located(texts, rendered=rendered)
        for text, each, encoding in zip(
            texts, located, backend.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            assert each.ids.tolist() == encoding.ids
            offsets = list(zip(each.starts_n.tolist(), each.ends_n.tolist(), strict=True))
            assert offsets == encoding.offsets
            spelt = tokenizer._spelt_bytes_V
            fast += spelt is not None and _added_up(text, each.ids, spelt) is not None
    return fast


def test_real_and_odd_texts_are_where_the_tokenizer_tracks_them(
    smollm2: TokenizerWrapper, bpe: TokenizerWrapper
) -> None:
    texts = [*ODD_TEXTS, CONTROLS, *(t[i : i + 3000] for t in real_texts(60_000)
                                     for i in range(0, len(t), 3000))]  # fmt: skip
    for tokenizer in (smollm2, bpe):
        assert assert_tracked(tokenizer, texts) > 1.8 * len(texts)  # nearly all add up


@settings(max_examples=200)
@given(text=any_text)
def test_any_text_is_where_the_tokenizer_tracks_it(text: str, smollm2: TokenizerWrapper) -> None:
    assert_tracked(smollm2, [text])


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.package])
def test_other_vocabularies_are_tracked_alike(case: str, tmp_path: Path) -> None:
    tokenizer = load_case(case, tmp_path)
    texts = [*ODD_TEXTS, CONTROLS, "e\u0301 \u0958 ▁ <bos>", *real_texts(30_000)]
    fast = assert_tracked(tokenizer, texts)
    print(case, len(texts), fast)


def test_vocabularies_whose_sums_may_lie_are_tracked() -> None:
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    found = spelt_bytes(backend, 4)
    assert found is not None and found.tolist() == [-(1 << 40), 1, 1, 2]
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Replace("▁", " ")
    assert spelt_bytes(backend, 4) is None
    wrapper = TokenizerWrapper.wrap(backend, add_eos=False)
    assert_tracked(wrapper, ["a a", "", "▁a", "aéa"])
    for pre_tokenizer in (pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel()):  # add a space
        spaced = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        spaced.pre_tokenizer = pre_tokenizer
        assert spelt_bytes(spaced, 4) is None


def test_round_trip_counts_and_shows_what_does_not_survive(
    smollm2: TokenizerWrapper, bpe: TokenizerWrapper
) -> None:
    texts = ["fine", "a\x04b", *ODD_TEXTS]
    assert bpe.check_round_trip(texts) == (len(texts), 0, None)
    found = smollm2.check_round_trip(texts)
    lost = [t for t in texts if set(t.encode()) & set(smollm2.missing_bytes)]
    assert (found.texts, found.changed) == (len(texts), len(lost))
    assert found.first == ("text 1 differs from character 1 on: '\\x04b' came back as 'b'")


def test_offsets_of_nothing_and_dtypes(smollm2: TokenizerWrapper) -> None:
    empty, one = smollm2.encode_located(["", "a"])
    assert empty.ids.size == empty.starts_n.size == 0
    assert one.ids.dtype == np.uint16
    assert smollm2.encode_located([]) == []
