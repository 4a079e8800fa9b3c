"""A byte that was changed in a prepared store is noticed by whoever reads it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dh_jax.data.loader import get_loader
from dh_jax.data.prepare import prepare
from dh_jax.data.store import open_store
from dh_jax.data.stores.shards import BLOCK_TOKENS, BlockGuard
from dh_jax.errors import DataError


def test_a_loader_notices_a_flipped_byte_among_the_tokens(
    make_config: Any, store: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "store"
    shutil.copytree(store, damaged)
    file = open_store(store).manifest["sources"]["code"]["train"][0]["file"]
    data = bytearray((damaged / file).read_bytes())
    data[-1001] ^= 4  # the tokens stand last
    (damaged / file).write_bytes(data)
    with (
        get_loader(make_config(store=str(damaged)), batch_size=4, repeat=False) as loader,
        pytest.raises(DataError, match=r"train-00000\.safetensors is damaged"),
    ):
        for _ in loader:
            pass
    with get_loader(make_config(store=str(damaged)), batch_size=4, sources=["mail"]) as loader:
        next(loader)  # what is not damaged can be read


def test_every_block_under_a_document_is_checked_once(make_config: Any, tmp_path: Path) -> None:
    opened = prepare(make_config(), folder=tmp_path / "store")
    documents = opened.documents("code", "train")
    guard = BlockGuard(documents.checks)
    blocks = -(-documents.shards[0].tokens.size // BLOCK_TOKENS)
    assert blocks > 3

    def checked() -> np.ndarray[Any, Any]:
        return np.flatnonzero(documents.checks[0].checked_N)

    def check(start: int, length: int) -> None:
        guard.check(np.zeros(1, np.int32), np.array([start]), np.array([length]))

    assert checked().size == 0
    check(5, 0)
    check(0, BLOCK_TOKENS)
    assert checked().tolist() == [0]
    check(2 * BLOCK_TOKENS - 1, 2)
    assert checked().tolist() == [0, 1, 2]
    guard.check(documents.shards_D, documents.starts_D, documents.lengths_D)
    assert checked().size == blocks
