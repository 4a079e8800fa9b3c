"""The tokenizer of a GGUF file against transformers and the gguf package, as oracles."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from dh_jax.data.text.gguf_tokenizer import read_gguf_metadata
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, DataError
from tests.dh_jax.data.tokenizer_cases import (
    ODD_TEXTS,
    any_text,
    load_smollm2,
    real_texts,
    smollm2_file,
)


@pytest.fixture(scope="module")
def smollm2() -> TokenizerWrapper:
    return load_smollm2()


@pytest.fixture(scope="module")
def transformers_smollm2(smollm2: TokenizerWrapper) -> Any:
    """The oracle: the same file as transformers converts it, which needs torch."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = smollm2_file()
    # What AutoTokenizer ends in (a slow test below), without its slow look at the model's config.
    return transformers.PreTrainedTokenizerFast.from_pretrained(
        str(path.parent), gguf_file=path.name
    )


def same_ids(ours: TokenizerWrapper, theirs: Any, texts: list[str]) -> int:
    """Compare ids of every text, in pieces so that a failure is legible; returns their bytes."""
    total = 0
    encoded = ours.encode_batch(texts)
    reference = theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    for text, a, b in zip(texts, encoded, reference, strict=True):
        assert a.dtype == np.uint16
        np.testing.assert_array_equal(a, np.array(b, np.uint16), err_msg=text[:200])
        total += len(text.encode())
    return total


def test_gguf_ids_equal_transformers_on_real_text(
    smollm2: TokenizerWrapper, transformers_smollm2: Any
) -> None:
    assert same_ids(smollm2, transformers_smollm2, real_texts(500_000)) > 900_000


@pytest.mark.slow
def test_gguf_ids_equal_transformers_on_much_real_text(
    smollm2: TokenizerWrapper, transformers_smollm2: Any
) -> None:
    assert same_ids(smollm2, transformers_smollm2, real_texts(8_000_000)) > 8_000_000


@pytest.mark.slow
def test_the_oracle_is_what_auto_tokenizer_gives(transformers_smollm2: Any) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    path = smollm2_file()
    auto = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    theirs = transformers_smollm2
    assert auto.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert auto.special_tokens_map == theirs.special_tokens_map
    assert auto.chat_template == theirs.chat_template


def test_gguf_ids_equal_transformers_on_odd_text(
    smollm2: TokenizerWrapper, transformers_smollm2: Any
) -> None:
    same_ids(smollm2, transformers_smollm2, ODD_TEXTS)


@settings(deadline=None, max_examples=200)
@given(text=any_text)
def test_gguf_ids_equal_transformers_on_arbitrary_text(
    text: str, smollm2: TokenizerWrapper, transformers_smollm2: Any
) -> None:
    same_ids(smollm2, transformers_smollm2, [text])


def test_gguf_special_tokens_equal_transformers(
    smollm2: TokenizerWrapper, transformers_smollm2: Any
) -> None:
    theirs = transformers_smollm2
    assert smollm2.vocab_size == len(theirs) == 49_152
    ours = (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id)
    assert ours == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert smollm2.special_tokens == theirs.special_tokens_map
    rendered = "<|im_start|>user\nHow many? 12\n<|im_end|>\n<|endoftext|>"
    np.testing.assert_array_equal(smollm2.encode_rendered(rendered), theirs(rendered).input_ids)


def test_wrapped_transformers_tokenizer_is_the_gguf_one(
    smollm2: TokenizerWrapper, transformers_smollm2: Any
) -> None:
    wrapped = TokenizerWrapper.wrap(transformers_smollm2, add_eos=False)
    assert wrapped.fingerprint == smollm2.fingerprint
    assert wrapped.chat_template == smollm2.chat_template
    text = "<|im_end|> 12"
    np.testing.assert_array_equal(wrapped.encode(text), smollm2.encode(text))
    # and the one that was wrapped still parses control tokens, as before
    assert transformers_smollm2("<|im_end|>").input_ids == [2]


def test_gguf_header_equals_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("n.u8", 200)
    writer.add_int8("n.i8", -7)
    writer.add_uint16("n.u16", 65_000)
    writer.add_int16("n.i16", -30_000)
    writer.add_uint32("n.u32", 4_000_000_000)
    writer.add_int32("n.i32", -5)
    writer.add_uint64("n.u64", 1 << 60)
    writer.add_int64("n.i64", -(1 << 60))
    writer.add_float32("n.f32", 0.5)
    writer.add_float64("n.f64", 1 / 3)
    writer.add_bool("n.bool", True)
    writer.add_string("text", "\u0120caf\u00e9")
    writer.add_array("strings", ["a", "", "\u4f60\u597d"])
    writer.add_array("integers", [1, -2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    theirs = {
        key: field.contents()
        for key, field in gguf.GGUFReader(path).fields.items()
        if not key.startswith("GGUF.")
    }
    assert read_gguf_metadata(path) == theirs


@pytest.mark.slow
def test_gguf_header_of_smollm2_equals_the_gguf_package(smollm2: TokenizerWrapper) -> None:
    gguf = pytest.importorskip("gguf")
    ours = read_gguf_metadata(smollm2_file())
    fields = gguf.GGUFReader(smollm2_file()).fields
    assert ours.keys() == {key for key in fields if not key.startswith("GGUF.")}
    for key, value in ours.items():
        assert value == fields[key].contents(), key


def test_damaged_gguf_files_are_refused_in_one_line(
    smollm2: TokenizerWrapper, tmp_path: Path
) -> None:
    with smollm2_file().open("rb") as file:
        start = file.read(400_000)  # inside the vocabulary
    damaged = {
        "empty": b"",
        "short": b"GGUF",
        "other": b"PK\x03\x04" + start[4:],
        "cut": start,
        "version": start[:4] + struct.pack("<I", 99) + start[8:],
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(DataError, match=str(path)) as caught:
            TokenizerWrapper.load(path)
        assert "\n" not in str(caught.value)


def test_unknown_kinds_of_gguf_tokenizer_are_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for model, pre, named in (("llama", "default", "'llama'"), ("gpt2", "tekken", "'tekken'")):
        path = tmp_path / f"{model}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(ConfigError, match=named):
            TokenizerWrapper.load(path)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("system", [False, True])
def test_chat_template_equals_transformers(
    smollm2: TokenizerWrapper, transformers_smollm2: Any, prompt: bool, system: bool
) -> None:
    messages = [
        {"role": "user", "content": "What is 2 + 2?\n<b>&amp;</b>"},
        {"role": "assistant", "content": "4 \u4f60\u597d"},
        {"role": "user", "content": "Sure?"},
    ]
    if system:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    text = smollm2.apply_chat_template(messages, add_generation_prompt=prompt)
    theirs = transformers_smollm2
    assert text == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )
    ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    np.testing.assert_array_equal(smollm2.encode_rendered(text), ids)
