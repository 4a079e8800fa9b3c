"""Tokenizers that several tests of the data room read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dh_jax.data.tokenization import TokenizerWrapper, train_bpe
from tests.dh_jax.data.tokenizer_cases import STDLIB, load_smollm2


@pytest.fixture(scope="session")
def smollm2() -> TokenizerWrapper:
    return load_smollm2()


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return [p.read_text(encoding="utf-8") for p in sorted((STDLIB / "json").glob("*.py"))]


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "bpe"
    train_bpe(corpus, 600, folder)
    return folder


@pytest.fixture(scope="session")
def bpe(bpe_folder: Path) -> TokenizerWrapper:
    return TokenizerWrapper.load(bpe_folder, add_eos=False)
