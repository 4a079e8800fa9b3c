"""Tokenizers: policy, bytes, control tokens, keeping, training."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dh_jax.data.text.vocabulary import byte_characters
from dh_jax.data.tokenization import TokenizerWrapper, train_bpe
from dh_jax.errors import ConfigError, DataError
from tests.dh_jax.data.tokenizer_cases import (
    ODD_TEXTS,
    any_text,
    smollm2_file,
)

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# --- bytes and round trips -------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(text=any_text)
def test_trained_bpe_returns_any_text_and_counts_its_bytes(
    text: str, bpe: TokenizerWrapper
) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.token_bytes_V[ids].sum() == len(text.encode())


@settings(deadline=None, max_examples=300)
@given(text=any_text)
def test_smollm2_returns_any_text_it_can_express_and_counts_its_bytes(
    text: str, smollm2: TokenizerWrapper
) -> None:
    lost = sum(byte in smollm2.missing_bytes for byte in text.encode())
    ids = smollm2.encode(text)
    assert smollm2.token_bytes_V[ids].sum() == len(text.encode()) - lost
    if not lost:
        assert smollm2.decode(ids) == text


def test_odd_texts_return_and_keep_their_bytes(
    smollm2: TokenizerWrapper, bpe: TokenizerWrapper
) -> None:
    for text in ODD_TEXTS:
        assert bpe.decode(bpe.encode(text)) == text
        kept = bytes(b for b in text.encode() if b not in smollm2.missing_bytes)
        ids = smollm2.encode(text)
        assert smollm2.decode(ids) == kept.decode(errors="replace")
        assert smollm2.token_bytes_V[ids].sum() == len(kept)


def test_missing_bytes_are_those_whose_characters_lose_tokens(
    smollm2: TokenizerWrapper, bpe: TokenizerWrapper
) -> None:
    assert bpe.missing_bytes == b""
    ascii_lost = {b for b in range(128) if smollm2.encode(chr(b)).size == 0}
    assert ascii_lost == {b for b in smollm2.missing_bytes if b < 128}
    assert ascii_lost == {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D}
    assert set(smollm2.missing_bytes) - ascii_lost == {
        *(0xC0, 0xC1),
        *(0xF1, 0xF2),
        *range(0xF5, 0x100),
    }


def test_byte_characters_are_the_published_table() -> None:
    assert sorted(byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    for code in (*range(0x80), 0xE9, 0x416, 0x4F60, 0x1F600):
        [(spelt, _)] = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        ).pre_tokenize_str(chr(code))
        assert spelt == "".join(byte_characters()[b] for b in chr(code).encode())


def test_token_bytes_are_zero_for_control_tokens_only(smollm2: TokenizerWrapper) -> None:
    np.testing.assert_array_equal(np.flatnonzero(smollm2.token_bytes_V == 0), np.arange(17))
    assert smollm2.token_bytes_V.dtype == np.int32
    assert smollm2.token_bytes_V.shape == (49_152,)
    assert not smollm2.token_bytes_V.flags.writeable


def test_token_bytes_of_sentencepiece_spellings() -> None:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "<0x0A>",
        "<0xE4>",
        "\u2581",
        "\u2581caf",
        "\u00e9",
        "c",
        "a",
        "f",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([AddedToken("<think>", special=False)])
    wrapper = TokenizerWrapper.wrap(backend)
    assert (wrapper.bos_id, wrapper.eos_id) == (1, 2)
    assert wrapper.token_bytes_V.tolist() == [0, 0, 0, 1, 1, 1, 4, 2, 1, 1, 1, 7]
    text = "caf\u00e9 fa\n"
    assert wrapper.token_bytes_V[wrapper.encode(text)].sum() == len(text.encode()) + 1


# --- policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_bos_and_eos_come_exactly_once(
    smollm2: TokenizerWrapper, add_bos: bool, add_eos: bool
) -> None:
    wrapper = TokenizerWrapper.load(smollm2_file(), add_bos=add_bos, add_eos=add_eos)
    texts = ["", "Two words", "<|im_end|>", "<|im_start|>x<|im_end|>"]
    for text, ids in zip(texts, wrapper.encode_batch(texts), strict=True):
        expected = [1] * add_bos + smollm2.encode(text).tolist() + [2] * add_eos
        assert ids.tolist() == expected
        assert (ids == 1).sum() == add_bos
        assert (ids == 2).sum() == add_eos
        np.testing.assert_array_equal(wrapper.encode(text), ids)


def test_a_stored_post_processor_adds_nothing_to_the_policy(
    bpe_folder: Path, tmp_path: Path
) -> None:
    state = json.loads((bpe_folder / "tokenizer.json").read_text())
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    state["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    wrapper = TokenizerWrapper.load(tmp_path / "tokenizer.json")
    ids = wrapper.encode("a text of more than four tokens")
    assert (ids == 0).sum() == 1 and ids[-1] == 0 and len(ids) > 5


def test_a_policy_without_its_token_is_refused(bpe_folder: Path) -> None:
    with pytest.raises(ConfigError, match="no BOS token"):
        TokenizerWrapper.load(bpe_folder, add_bos=True)
    bare = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(ConfigError, match="no EOS token"):
        TokenizerWrapper.wrap(bare)
    assert TokenizerWrapper.wrap(bare, add_eos=False).encode("aa").tolist() == [0, 0]


@pytest.mark.parametrize("control", CONTROL)
def test_control_tokens_spelt_in_text_stay_text(
    control: str, smollm2: TokenizerWrapper, bpe: TokenizerWrapper
) -> None:
    for wrapper in (smollm2, bpe, pickle.loads(pickle.dumps(smollm2))):
        text = f"{control}a {control}\n{control}{control}"
        for ids in (wrapper.encode(text), *wrapper.encode_batch([text, text])):
            assert wrapper.token_bytes_V[ids].min() > 0
            assert wrapper.decode(ids) == text


def test_a_unigram_model_refuses_text_with_control_tokens() -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("\u2581", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["</s>"])
    wrapper = TokenizerWrapper.wrap(backend)
    assert wrapper.encode("a a").tolist() == [3, 2, 3, 2, 1]
    with pytest.raises(DataError, match="control token"):
        wrapper.encode("a </s>")


def test_text_that_is_no_text_is_refused(bpe: TokenizerWrapper) -> None:
    with pytest.raises(DataError, match="document 1 of the batch is not valid Unicode"):
        bpe.encode_batch(["fine", "a\ud800b"])
    with pytest.raises(DataError, match="document 0 of the batch is a int"):
        bpe.encode_batch([3])  # type: ignore[list-item]


def test_dtype_holds_the_largest_id() -> None:
    for size, dtype in ((65_536, np.uint16), (65_537, np.uint32)):
        vocab = {f"{i:x}": i for i in range(size)}
        wrapper = TokenizerWrapper.wrap(
            Tokenizer(models.WordLevel(vocab, unk_token="0")), add_eos=False
        )
        assert wrapper.vocab_size == size
        assert wrapper.encode(f"{size - 1:x}").tolist() == [size - 1]
        assert wrapper.encode("0").dtype == dtype


# --- chat ------------------------------------------------------------------------------------


def test_a_tokenizer_without_template_says_so(bpe: TokenizerWrapper) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        bpe.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_template_that_refuses_is_a_data_error(bpe_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    (tmp_path / "tokenizer.json").write_bytes((bpe_folder / "tokenizer.json").read_bytes())
    template = (
        "{{ eos_token }}{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    wrapper = TokenizerWrapper.load(tmp_path)
    message = {"role": "user", "content": "x"}
    assert wrapper.apply_chat_template([message]) == "<|endoftext|>"
    with pytest.raises(DataError, match="one only"):
        wrapper.apply_chat_template([message, message])


# --- training --------------------------------------------------------------------------------


def test_training_is_deterministic_across_processes(
    bpe: TokenizerWrapper, bpe_folder: Path, corpus: list[str], tmp_path: Path
) -> None:
    (tmp_path / "corpus.json").write_text(json.dumps(corpus))
    script = (
        "import json, sys\nfrom pathlib import Path\n"
        "sys.modules['jax'] = None\n"
        "from dh_jax.data.tokenization import train_bpe\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "train_bpe(json.loads((folder / 'corpus.json').read_text()), 600, folder)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (bpe_folder / name).read_bytes()


def test_trained_bpe_has_the_size_asked_for_and_splits_digits(bpe: TokenizerWrapper) -> None:
    assert bpe.vocab_size == 600
    assert bpe.eos_id == 0
    number = "007 and 1234567890"
    spelt = [bpe.decode([i]) for i in bpe.encode(number)]
    assert [piece for piece in spelt if any(c.isdigit() for c in piece)] == list("0071234567890")
    tokens = [bpe.decode([i]) for i in range(1, bpe.vocab_size)]
    assert max(sum(c.isdigit() for c in token) for token in tokens) == 1


def test_training_refuses_no_text_and_too_few_ids(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size 256 is below 257"):
        train_bpe(["text"], 256, tmp_path / "a")
    with pytest.raises(DataError, match="no text"):
        train_bpe(["", ""], 300, tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_training_passes_on_an_error_of_its_corpus(tmp_path: Path) -> None:
    def broken() -> Any:
        yield "some text"
        raise DataError("file x, line 2")

    with pytest.raises(DataError, match="file x, line 2"):
        train_bpe(broken(), 300, tmp_path / "c")
    assert not (tmp_path / "c").exists()


# --- import ----------------------------------------------------------------------------------


def test_import_brings_no_heavy_library_and_needs_no_jax() -> None:
    script = (
        "import sys\nsys.modules['jax'] = None\n"
        "import dh_jax.data.tokenization\n"
        "heavy = {'torch', 'transformers', 'gguf', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
