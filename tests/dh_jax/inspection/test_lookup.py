"""Documents are found again: in the store's shards and in the files they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from dh_jax.config import HubSource
from dh_jax.data.prepare import prepare
from dh_jax.data.sources import document_id, split_of
from dh_jax.errors import DataError
from dh_jax.inspection.lookup import find_document, find_record


def record_at(where: str) -> str:
    path, _, line = where.rpartition(":")
    return str(json.loads(Path(path).read_text().splitlines()[int(line) - 1])["text"])


def some_documents(corpora: dict[str, Path]) -> list[tuple[str, str]]:
    """(source, text): the first, a middle and the last of every source, none a duplicate."""
    found = []
    for name, path in corpora.items():
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        found += [(name, texts[i]) for i in (0, len(texts) // 2, len(texts) - 1)]
    return found


def test_documents_of_a_store_are_found_in_shard_and_file(
    make_config: Any, store: Path, corpora: dict[str, Path]
) -> None:
    config = make_config(store=str(store))
    for source, text in some_documents(corpora):
        found = find_document(config, document_id(text))
        assert (found.source, found.where) == (source, None)
        assert found.split == split_of(document_id(text), config.splits)
        assert found.shard is not None and found.offset is not None
        tokens = load_file(found.shard)["tokens"]  # safetensors' own reader
        inside = tokens[found.offset : found.offset + len(found.token_ids)]
        assert inside.tolist() == found.token_ids
        assert "".join(span.text for span in found.spans) == f"{text}<|endoftext|>"
        assert found.targets == len(found.token_ids) - 1
        where = find_record(config, found).where
        assert where is not None and record_at(where) == text


def test_without_a_store_the_sources_are_read(
    make_config: Any, corpora: dict[str, Path], store: Path
) -> None:
    seen: list[str] = []
    for source, text in some_documents(corpora):
        found = find_document(
            make_config(), document_id(text), progress=lambda name, _: seen.append(name)
        )
        assert found.source == source and found.shard is None and found.where is not None
        assert record_at(found.where) == text
        stored = find_document(make_config(store=str(store)), document_id(text))
        assert found._replace(where=None) == stored._replace(shard=None, offset=None)
    assert {"code", "mail", "sums"} == set(seen)


@pytest.mark.parametrize("stored", [True, False])
def test_an_id_that_nothing_has_says_what_was_looked_through(
    stored: bool, make_config: Any, store: Path
) -> None:
    config = make_config(store=str(store) if stored else None)
    where = "of store" if stored else "in sources code, mail, sums"
    with pytest.raises(DataError, match=f"no document 000000000000000c .*{where}"):
        find_document(config, 12)


def test_a_store_outlives_its_sources_and_that_is_said(
    make_config: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    lines = corpora["code"].read_text().splitlines(keepends=True)
    path = tmp_path / "code.jsonl"
    path.write_text("".join(lines))
    config = make_config(
        sources={"code": {"kind": "files", "paths": [str(path)]}}, store=str(tmp_path / "store")
    )
    prepare(config)
    text = json.loads(lines[7])["text"]
    found = find_document(config, document_id(text))
    path.write_text("{\n" + "".join(lines[8:]))  # bad JSON elsewhere does not matter
    assert "its files changed" in str(find_record(config, found).unknown)
    path.unlink()
    gone = find_record(config, found)
    assert gone.where is None and "no file matches" in str(gone.unknown)
    config.sources["code"] = HubSource(path="org/name")
    assert "hub" in str(find_record(config, found).unknown)


def test_a_document_that_training_leaves_out_is_still_found(
    make_config: Any, tmp_path: Path
) -> None:
    """Probe sets of their own are looked through too, and bad records do not stop the search."""
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{\n{"text": "two"}\n')
    (tmp_path / "exam.jsonl").write_text('{"text": "three"}\n')
    sources = {
        name: {"kind": "files", "paths": [str(tmp_path / f"{name}.jsonl")]}
        for name in ("train", "exam")
    }
    config = make_config(
        sources={"train": sources["train"]}, probes={"exam": sources["exam"] | {"split": "probe"}}
    )
    assert find_document(config, document_id("two")).where == f"{tmp_path / 'train.jsonl'}:3"
    found = find_document(config, document_id("three"))
    assert (found.source, found.split) == ("exam", "probe")
    with pytest.raises(DataError, match=r"could not be used: \{'corrupt_json': 1\}"):
        find_document(config, 12)
