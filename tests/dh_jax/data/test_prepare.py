"""Preparing a store: disjoint splits, counted duplicates, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dh_jax.data.prepare import prepare
from dh_jax.data.sources import document_id, split_of
from dh_jax.data.store import file_checksum, map_shard, open_store
from dh_jax.errors import ConfigError, DataError, StateError


def texts_of(corpora: dict[str, Path]) -> dict[str, list[str]]:
    return {
        name: [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for name, path in corpora.items()
    }


def test_splits_are_disjoint_complete_and_a_function_of_the_text(
    make_config: Any, store: Path, corpora: dict[str, Path]
) -> None:
    opened = open_store(store)
    config = make_config()
    expected: dict[str, set[int]] = {"train": set(), "probe": set(), "eval": set()}
    for texts in texts_of(corpora).values():
        for text in texts:
            identity = document_id(text)
            expected[split_of(identity, config.splits)].add(identity)
    found = {
        split: {int(i) for name in corpora for i in opened.documents(name, split).ids_D}
        for split in expected
    }
    assert found == expected
    assert not found["train"] & found["probe"] and not found["train"] & found["eval"]
    assert not found["probe"] & found["eval"]


def test_duplicates_are_dropped_and_counted(
    make_config: Any, store: Path, corpora: dict[str, Path]
) -> None:
    opened, texts = open_store(store), texts_of(corpora)
    everything = [text for part in texts.values() for text in part]
    kept = sum(
        opened.total(name, split, "documents")
        for name in texts
        for split in ("train", "probe", "eval")
    )
    dropped = sum(counts.get("duplicate", 0) for counts in opened.manifest["skipped"].values())
    assert kept == len(set(everything)) and dropped == len(everything) - len(set(everything)) > 0


def test_tokens_are_those_of_the_tokenizer(
    make_config: Any, store: Path, corpora: dict[str, Path], tokenizer: Any
) -> None:
    opened = open_store(store)
    by_id = {document_id(t): t for t in texts_of(corpora)["mail"]}
    documents = opened.documents("mail", "train")
    for d in range(0, documents.ids_D.size, 7):
        start, length = documents.starts_D[d], documents.lengths_D[d]
        tokens = documents.shards[documents.shards_D[d]].tokens[start : start + length]
        np.testing.assert_array_equal(tokens, tokenizer.encode(by_id[int(documents.ids_D[d])]))


def test_preparing_twice_gives_the_same_bytes_and_a_third_time_nothing(
    make_config: Any, store: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    prepare(make_config(), folder=again)
    for path in sorted(p.relative_to(store) for p in store.rglob("*") if p.is_file()):
        assert file_checksum(store / path) == file_checksum(again / path), path
    calls: list[Any] = []
    prepare(make_config(), folder=again, progress=calls.append)
    assert not calls


def test_a_failed_preparation_leaves_no_store(make_config: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    config = make_config(sources={"bad": {"kind": "files", "paths": [str(bad)]}})
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        prepare(config, folder=tmp_path / "store")
    assert not (tmp_path / "store").exists()
    prepare(
        make_config(sources={"bad": {"kind": "files", "paths": [str(bad)]}}, on_error="skip"),
        folder=tmp_path / "store",
    )
    assert open_store(tmp_path / "store").manifest["skipped"]["bad"] == {"corrupt_json": 1}


@pytest.mark.parametrize("plan", [b"", b'"0123', b"\xff"])
def test_a_plan_that_a_crash_cut_short_fits_nothing(
    make_config: Any, store: Path, tmp_path: Path, plan: bytes
) -> None:
    (tmp_path / ".store.partial").mkdir()
    (tmp_path / ".store.partial" / "plan.json").write_bytes(plan)
    made = prepare(make_config(), folder=tmp_path / "store")
    assert made.manifest == open_store(store).manifest


def test_an_overlap_of_a_probe_with_training_is_refused(
    make_config: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    probes = {"mine": {"kind": "files", "paths": [str(corpora["sums"])], "split": "probe"}}
    with pytest.raises(DataError, match="already in probe"):
        prepare(make_config(probes=probes), folder=tmp_path / "store")
    skipping = make_config(probes=probes, on_error="skip")
    opened = prepare(skipping, folder=tmp_path / "store")
    assert opened.total("mine", "probe", "documents") > 0
    assert opened.manifest["skipped"]["sums"]["held_out"] > 0


def test_damage_is_found_and_named(make_config: Any, tmp_path: Path) -> None:
    opened = prepare(make_config(), folder=tmp_path / "store")
    count = opened.verify()
    assert count == len(list((tmp_path / "store").rglob("*.safetensors")))
    shard = tmp_path / "store" / opened.manifest["sources"]["code"]["train"][0]["file"]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        opened.verify()
    shard.write_bytes(data[: len(data) // 3])
    with pytest.raises(DataError, match=shard.name):
        opened.documents("code", "train")
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        opened.documents("code", "train")


def test_another_tokenizer_or_pipeline_is_refused(make_config: Any, store: Path) -> None:
    with pytest.raises(StateError, match="tokenizer"):
        prepare(make_config(add_eos=False), folder=store)
    with pytest.raises(StateError, match="pipeline"):
        prepare(make_config(splits={"probe": 0.3, "eval": 0.1}), folder=store)
    with pytest.raises(ConfigError, match="no folder"):
        prepare(make_config())


def test_shards_are_plain_safetensors(store: Path) -> None:
    from safetensors.numpy import load_file

    shard = next(store.rglob("train-00000.safetensors"))
    ours, theirs = map_shard(shard), load_file(shard)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
