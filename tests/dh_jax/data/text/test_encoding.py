"""Encoding documents: those that cannot be are skipped and counted, or refused by name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models

from dh_jax.data.loader import get_loader
from dh_jax.data.prepare import prepare
from dh_jax.data.sources import Document, document_id
from dh_jax.data.text.encoding import text_encoder
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import DataError

TEXTS = ["abc def", "x </s> y", "ghi", "</s>", "ab"]


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, document_id(text), f"a.jsonl:{i}") for i, text in enumerate(texts, 1)]


@pytest.fixture
def unigram() -> TokenizerWrapper:
    letters = [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz </>"]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), *letters], unk_id=0))
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("</s>", "<unk>")])
    return TokenizerWrapper.wrap(backend)


def test_a_text_that_spells_a_control_token_is_skipped_alone(unigram: TokenizerWrapper) -> None:
    skipped: Counter[str] = Counter()
    found = text_encoder(unigram, "skip")(documents(TEXTS), skipped)
    assert skipped == {"control_token": 2}
    for text, each in zip(TEXTS, found, strict=True):
        if "</s>" in text:
            assert each is None
        else:
            assert each is not None and each.id == document_id(text)
            np.testing.assert_array_equal(each.tokens, unigram.encode(text))


def test_or_refused_with_its_place(unigram: TokenizerWrapper) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*control token.*set on_error: skip"):
        text_encoder(unigram, "raise")(documents(TEXTS), Counter())


@pytest.mark.parametrize("stored", [False, True], ids=["stream", "store"])
def test_texts_without_a_token_are_counted_and_end_in_an_error_if_there_are_no_others(
    make_config: Any, tmp_path: Path, stored: bool
) -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    wrapper = TokenizerWrapper.wrap(backend, add_eos=False)

    def config_of(name: str, texts: list[str]) -> Any:
        (tmp_path / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        config = make_config(
            sources={"u": {"kind": "files", "paths": [str(tmp_path / name)]}},
            splits={"probe": 0.0, "eval": 0.0},
            store=str(tmp_path / f"{name}.store") if stored else None,
            add_eos=False,
        )
        if stored:
            prepare(config, tokenizer=wrapper)
        return config

    some = config_of("some.jsonl", ["xyz", "ab", "qqq"])
    with get_loader(some, tokenizer=wrapper, batch_size=1, repeat=False) as loader:
        assert [batch.tokens_BT[0, :2].tolist() for batch in loader] == [[0, 1]]
        if not stored:
            assert loader.stats()["sources"]["u"]["skipped"] == {"no_tokens": 2}
    with pytest.raises(DataError, match="'no_tokens': 2"):
        next(get_loader(config_of("none.jsonl", ["xyz", "qqq"]), tokenizer=wrapper, batch_size=1))
