"""Decontamination against n-grams counted as plain tuples of words."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dh_jax.config import DecontaminationConfig
from dh_jax.data.prepare import prepare
from dh_jax.data.preparing.decontaminate import grams_of, matches, merge
from dh_jax.data.preparing.ngrams import words_of
from dh_jax.data.sources import document_id, split_of
from dh_jax.data.store import file_checksum, open_store
from dh_jax.errors import ConfigError, DataError

words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=30)


def tuples(text: str, n: int) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


@given(st.lists(words, max_size=4), words)
def test_matches_are_the_shared_tuples(evaluation: list[list[str]], document: list[str]) -> None:
    config = DecontaminationConfig(ngram=5, shortest=3)
    grams = merge(grams_of([" ".join(text)], config) for text in evaluation)
    expected: set[tuple[str, ...]] = set()
    for text in evaluation:
        if len(text) >= 3:
            n = min(5, len(text))
            expected |= tuples(" ".join(text), n) & tuples(" ".join(document), n)
    found = [tuple(document[m.start : m.start + m.length]) for m in matches(document, grams)]
    assert len(found) == len(set(found)) and set(found) == expected
    assert grams.texts == len(evaluation)
    assert grams.too_short == sum(len(text) < 3 for text in evaluation)


def test_words_are_lower_case_without_punctuation() -> None:
    assert words_of("The CAT's naïve_x, 3.14\n— «Ünïted»") == [
        "the", "cat", "s", "naïve_x", "3", "14", "ünïted",
    ]  # fmt: skip
    assert words_of("日本語 text ไทย") == ["日", "本", "語", "text", "ไ", "ท", "ย"]


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluation(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces cut out of training documents, in capitals; one too short to look for."""
    texts = [" ".join(words_of(text)) for text in texts_of(corpora["mail"])]
    long = [text for text in texts if len(text.split()) > 60]
    cut = [" ".join(text.upper().split()[20:45]) for text in long[::9]]
    path = tmp_path_factory.mktemp("evaluation") / "eval.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*cut, "too short"]))
    return path


def expected_removals(
    corpora: dict[str, Path], known: set[tuple[str, ...]], config: Any, limit: int
) -> dict[str, set[int]]:
    documents = {
        name: {document_id(text): text for text in texts_of(path)} for name, path in corpora.items()
    }
    unique = {i: text for part in documents.values() for i, text in part.items()}
    training = {i: t for i, t in unique.items() if split_of(i, config.splits) == "train"}
    shared = {i: tuples(text, 13) & known for i, text in training.items()}
    spread = Counter(gram for grams in shared.values() for gram in grams)
    removed = {i for i, grams in shared.items() if any(spread[g] <= limit for g in grams)}
    return {name: removed & part.keys() for name, part in documents.items()}


@pytest.mark.parametrize("limit", [10, 2])
def test_contaminated_documents_are_removed_and_reported(
    make_config: Any, corpora: dict[str, Path], evaluation: Path, tmp_path: Path, limit: int
) -> None:
    against = {"task": {"kind": "files", "paths": [str(evaluation)]}}
    config = make_config(prepare={"decontamination": {"against": against, "max_documents": limit}})
    store = prepare(config, folder=tmp_path / "store")
    known = {gram for text in texts_of(evaluation) for gram in tuples(text, 13)}
    expected = expected_removals(corpora, known, config, limit)
    assert len(expected["mail"]) > 5
    for name, removed in expected.items():
        assert removed.isdisjoint(store.documents(name, "train").ids_D.tolist())
        assert store.manifest["skipped"][name].get("contaminated", 0) == len(removed)
    account = store.manifest["decontamination"]
    report = store.folder / account["report"]
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert {int(line["id"], 16) for line in lines} == set().union(*expected.values())
    assert len(lines) == account["removed"] and file_checksum(report) == account["blake2b"]
    assert (account["evaluation_texts"], account["too_short"]) == (len(texts_of(evaluation)), 1)
    for line in lines:
        path, row = line["where"].rsplit(":", 1)
        text = json.loads(Path(path).read_text().splitlines()[int(row) - 1])["text"]
        assert f"{document_id(text):016x}" == line["id"] and Path(path).stem == line["source"]
        gram = tuple(line["ngram"].split())
        assert gram in tuples(text, 13) & known and line["training_documents"] <= limit
    kept = prepare(make_config(), folder=tmp_path / "plain")
    for name, removed in expected.items():
        before = set(kept.documents(name, "train").ids_D.tolist())
        assert before - removed == set(store.documents(name, "train").ids_D.tolist())
        assert kept.total(name, "probe", "tokens") == store.total(name, "probe", "tokens")


def test_a_configs_own_held_out_documents_count_too(
    make_config: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(prepare={"decontamination": {"held_out": True}})
    store = prepare(config, folder=tmp_path / "store")
    held_out = [
        text
        for path in corpora.values()
        for text in set(texts_of(path))
        if split_of(document_id(text), config.splits) != "train"
    ]
    known = {gram for text in held_out for gram in tuples(text, 13)}
    known_short = [t for t in held_out if 8 <= len(words_of(t)) < 13]
    expected = expected_removals(corpora, known, config, 10)
    counts = {n: c.get("contaminated", 0) for n, c in store.manifest["skipped"].items()}
    least = {name: len(removed) for name, removed in expected.items()}
    # Short held-out texts are looked for as a whole, which these tuples leave out.
    assert all(counts[name] >= least[name] for name in counts) and sum(least.values()) > 0
    if not known_short:
        assert counts == least
    assert open_store(tmp_path / "store").manifest["skipped"] == store.manifest["skipped"]


def test_nothing_to_look_for_is_refused(make_config: Any, tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text('{"text": "one two three"}\n')
    against = {"task": {"kind": "files", "paths": [str(tmp_path / "e.jsonl")]}}
    config = make_config(prepare={"decontamination": {"against": against}})
    with pytest.raises(DataError, match="1 evaluation texts, 1 of them shorter"):
        prepare(config, folder=tmp_path / "store")
    with pytest.raises(ConfigError, match=r"task.*kind"):
        make_config(prepare={"decontamination": {"against": {"task": {"kind": "flies"}}}})
