"""Small but real inputs for tests of both packages: text of the standard library, a tokenizer
trained on it, a config, a prepared store."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dh_jax.config import DataConfig, load_data_config
from dh_jax.data.prepare import prepare
from dh_jax.data.tokenization import TokenizerWrapper, train_bpe

MODULES = {
    "code": (
        "argparse",
        "ast",
        "dataclasses",
        "heapq",
        "json.decoder",
        "queue",
        "textwrap",
        "typing",
    ),
    "mail": ("email.message", "email.policy", "email.utils", "imaplib", "mailbox", "smtplib"),
    "sums": ("decimal", "fractions", "random", "statistics", "numbers", "colorsys"),
}


def functions_of(modules: tuple[str, ...]) -> list[str]:
    """Source of every function and class of some modules: a few hundred documents."""
    texts = []
    for name in modules:
        module = __import__(name, fromlist=["_"])
        source = inspect.getsource(__import__("_pydecimal") if name == "decimal" else module)
        texts += [f"def {part}" for part in source.split("\ndef ") if part.strip()]
        texts += [f"    def {part}" for part in source.split("\n    def ") if part.strip()]
    return texts


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    paths = {}
    for name, modules in MODULES.items():
        paths[name] = folder / f"{name}.jsonl"
        lines = [json.dumps({"text": text}) + "\n" for text in functions_of(modules)]
        paths[name].write_text("".join(lines))
    return paths


@pytest.fixture(scope="session")
def tokenizer(
    corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> TokenizerWrapper:
    texts = [json.loads(x)["text"] for p in corpora.values() for x in p.read_text().splitlines()]
    return train_bpe(texts, 512, tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: TokenizerWrapper, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    tokenizer.save(folder)
    return folder


MakeConfig = Callable[..., DataConfig]


@pytest.fixture(scope="session")
def make_config(corpora: dict[str, Path], tokenizer_folder: Path) -> MakeConfig:
    """A data config over the three corpora; keyword arguments replace top-level keys."""

    def make(**changes: Any) -> DataConfig:
        weights = {"code": 0.5, "mail": 0.2, "sums": 0.3}
        return load_data_config(
            {
                "name": "small",
                "tokenizer": str(tokenizer_folder),
                "max_length": 64,
                "packing": {"window": 32, "max_segments": 16},
                "splits": {"probe": 0.1, "eval": 0.1},
                "sources": {
                    name: {"kind": "files", "paths": [str(path)], "weight": weights[name]}
                    for name, path in corpora.items()
                },
            }
            | changes
        )

    return make


@pytest.fixture(scope="session")
def store(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "store"
    prepare(make_config(), folder=folder)
    return folder
