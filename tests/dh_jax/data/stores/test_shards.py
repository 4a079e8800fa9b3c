"""Shard files: plain safetensors, and no byte of a store may change unnoticed."""

from __future__ import annotations

import json
import resource
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dh_jax.data.store import MANIFEST, TokenStore, open_store
from dh_jax.data.stores import shards
from dh_jax.data.stores.shards import BLOCK_TOKENS, check_blocks, checks_of, map_shard, write_shard
from dh_jax.errors import DataError


def write(path: Path, tokens: int, *, mask: bool = False, **options: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    lengths = np.array([tokens // 3, tokens - tokens // 3], np.int64)
    return write_shard(
        path,
        np.array([7, 2**63 + 1], np.uint64),
        lengths,
        lengths * 4,
        rng.integers(0, 60_000, tokens).astype(np.uint16),
        rng.random(tokens) < 0.5 if mask else None,
        **options,
    )


def read_everything(store: TokenStore) -> None:
    """What a training run does, at most: opens all documents and reads all tokens."""
    for source, splits in store.manifest["sources"].items():
        for split in splits:
            documents = store.documents(source, split)
            for shard, start, length in zip(
                documents.shards_D.tolist(),
                documents.starts_D.tolist(),
                documents.lengths_D.tolist(),
                strict=True,
            ):
                check_blocks(documents.checks[shard], start, start + length)


@pytest.mark.parametrize("mask", [False, True])
def test_safetensors_reads_what_we_write(tmp_path: Path, mask: bool) -> None:
    facts = write(tmp_path / "a" / "x.safetensors", 70_001, mask=mask)
    theirs, ours = load_file(facts_path := tmp_path / "a" / "x.safetensors"), None
    ours = map_shard(facts_path, facts["crc32"])
    assert ours.keys() == theirs.keys() and ("loss_mask" in ours) == mask
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
        assert ours[name].flags.aligned
    assert facts["blake2b"] == shards.file_checksum(facts_path)
    assert (facts["documents"], facts["tokens"], facts["bytes"]) == (2, 70_001, 280_004)
    blocks = theirs["tokens"].tobytes()
    size = 2 * BLOCK_TOKENS
    assert theirs["tokens_crc32"].tolist() == [
        zlib.crc32(blocks[at : at + size]) for at in range(0, len(blocks), size)
    ]


def test_a_block_is_checked_once_and_only_when_touched(tmp_path: Path) -> None:
    facts = write(tmp_path / "x.safetensors", 5 * BLOCK_TOKENS // 2)
    data = bytearray((tmp_path / "x.safetensors").read_bytes())
    data[-1] ^= 1  # in the last of three blocks
    (tmp_path / "x.safetensors").write_bytes(data)
    checks = checks_of(
        tmp_path / "x.safetensors", map_shard(tmp_path / "x.safetensors", facts["crc32"])
    )
    check_blocks(checks, 0, 0)
    assert not checks.checked_N.any()
    check_blocks(checks, BLOCK_TOKENS - 1, BLOCK_TOKENS + 1)
    assert checks.checked_N.tolist() == [True, True, False]
    with pytest.raises(DataError, match=r"x\.safetensors is damaged: tokens 65536 to 81920"):
        check_blocks(checks, 0, 5 * BLOCK_TOKENS // 2)
    assert not checks.checked_N[2]


@given(data=st.data())
def test_a_changed_byte_anywhere_is_noticed(
    store: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flipped") / "store"
    shutil.copytree(store, folder)
    files = sorted(folder.rglob("*.safetensors"))
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    # Headers and indexes are small beside tokens; draw from them as often.
    near_the_start = data.draw(st.booleans())
    end = min(len(content), 600) if near_the_start else len(content)
    at = data.draw(st.integers(0, end - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        with pytest.raises(DataError, match=path.stem):
            read_everything(open_store(folder))
        with pytest.raises(DataError, match="damaged"):
            open_store(folder).verify()
    finally:
        shutil.rmtree(folder)


def test_an_untouched_store_passes(store: Path) -> None:
    read_everything(open_store(store))


def test_an_edited_or_damaged_manifest_is_refused(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    path = tmp_path / "store" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["skipped"]["code"]["duplicate"] = 0
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="damaged or was edited"):
        open_store(tmp_path / "store")
    path.write_bytes(b'{"schema": 2, "\xff')
    with pytest.raises(DataError, match="not JSON"):
        open_store(tmp_path / "store")


def test_a_file_over_a_limit_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write .*File too large; free some space"):
            write(tmp_path / "x.safetensors", 50_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
