"""Local files as records: every format, and every fault named or counted."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path
from typing import Any

import grain
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dh_jax.config import TextConfig
from dh_jax.data.sources import document_id
from dh_jax.errors import ConfigError, DataError
from tests.document_files import (
    BAD_LINES,
    GOOD,
    TEXTS,
    lines,
    source,
    texts_of,
    write_every_format,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_every_format(tmp_path)
    return tmp_path


# --- formats, paths, order -------------------------------------------------------------------


def test_every_format_gives_its_texts_in_order_and_says_where(folder: Path) -> None:
    documents = list(source(folder, shuffle=False))
    assert [d.text for d in documents[:50]] == TEXTS[:50]
    assert {d.text for d in documents[50:]} == set(TEXTS[50:])
    where = {d.text: d.where.removeprefix(f"{folder}/") for d in documents}
    assert where[TEXTS[0]] == "a.jsonl:1"
    assert where[TEXTS[29]] == "c.ndjson.zst:10"
    assert where[TEXTS[34]] == "d.parquet:row 4"
    assert where[TEXTS[51]] == "tree/deep/1.txt"
    assert all(d.id == document_id(d.text) for d in documents)


def test_paths_are_files_folders_globs_and_variables_and_no_file_comes_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORPUS", str(folder))
    monkeypatch.setenv("HOME", str(folder))
    assert texts_of(source("$CORPUS/a.jsonl")) == TEXTS[:10]
    assert texts_of(source("~/[ab].json*", shuffle=False)) == TEXTS[:20]
    assert texts_of(source(folder, include="*.parquet")) == TEXTS[30:40]
    assert len(texts_of(source(folder / "tree", include="deep/*.txt"))) == 5
    assert texts_of(source(folder / "a.jsonl", "~/a.*", folder / "a.jsonl")) == TEXTS[:10]


def test_a_pattern_without_files_is_a_config_error_naming_it(tmp_path: Path) -> None:
    for pattern in ("none/*.jsonl", "$NO_SUCH_VARIABLE/x", "absent.jsonl"):
        with pytest.raises(ConfigError, match=re.escape(repr(pattern))):
            iter(source(pattern))
    with pytest.raises(ConfigError, match=re.escape("'*.parquet'")):
        iter(source(tmp_path, include="*.parquet"))


def test_text_is_a_column_joined_columns_or_a_template_with_words(tmp_path: Path) -> None:
    table = pa.table({"title": ["One"], "body": ["First."], "label": [1], "meta": [{"n": 7}]})
    pq.write_table(table, tmp_path / "a.parquet")

    def text(**config: Any) -> str:
        return texts_of(source(tmp_path / "a.parquet", text=TextConfig(**config)))[0]

    assert text(column="body") == "First."
    assert text(columns=["title", "body"], separator=" | ") == "One | First."
    words = {"label": ["bad", "good"]}
    assert text(template="{title} ({meta[n]}): {label}", choices=words) == "One (7): good"
    for template in ("no column", "{}", "{0}", "{title"):
        with pytest.raises(ConfigError, match=re.escape(f"text.template {template!r}")):
            text(template=template)


# --- faults ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_is_refused_by_file_and_line_or_skipped_and_counted(
    tmp_path: Path, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + BAD_LINES[reason] + GOOD)
    documents = iter(source(path))
    assert next(documents).text == "good"
    with pytest.raises(DataError, match=re.escape(f"{path}:2: ") + r".*on_error: skip") as caught:
        next(documents)
    assert "\n" not in str(caught.value)
    documents = iter(source(path, on_error="skip"))
    assert [d.where for d in documents] == [f"{path}:1", f"{path}:3"]
    assert documents.skipped == {reason: 1}


def test_other_bad_lines_are_faults_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    surrogate = b'{"text": "\\ud800"}\n'
    null = b'{"text": null}\n'
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + deep + surrogate + null)  # with a byte order mark
    documents = iter(source(path, on_error="skip"))
    assert [d.text for d in documents] == ["good"]
    assert documents.skipped == {"corrupt_json": 1, "invalid_utf8": 1, "not_text": 1}


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_empty_documents_are_always_skipped_and_counted(tmp_path: Path, on_error: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n\n' + GOOD + b'{"text": " \\n\\t "}\n')
    (tmp_path / "b.txt").write_bytes(b"")
    documents = iter(source(tmp_path, on_error=on_error))
    assert [d.text for d in documents] == ["good"]
    assert documents.skipped == {"empty": 4}


def cut_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(lines(TEXTS))[:-100])


def cut_zstd(path: Path) -> None:
    path.write_bytes(zstandard.compress(lines(TEXTS[:30])) + zstandard.compress(lines(TEXTS))[:-60])


@pytest.mark.parametrize(("name", "write"), [("a.jsonl.gz", cut_gzip), ("a.jsonl.zst", cut_zstd)])
def test_the_readable_part_of_a_truncated_compressed_file_is_used(
    tmp_path: Path, name: str, write: Any
) -> None:
    path = tmp_path / name
    write(path)
    (tmp_path / "b.jsonl").write_bytes(lines(["the next file"]))
    documents = iter(source(tmp_path, on_error="skip", shuffle=False))
    texts = [d.text for d in documents]
    assert texts[-1] == "the next file"
    whole = TEXTS if write is cut_gzip else TEXTS[:30] + TEXTS
    assert texts[:-1] == whole[: len(texts) - 1]
    assert 25 < len(texts) < len(whole)
    assert documents.skipped == {"truncated_file": 1}
    where = re.escape(f"{path}:{len(texts)}: ")
    with pytest.raises(DataError, match=where + "the file ends early.*on_error: skip"):
        list(source(path))
    grain.experimental.assert_equal_output_after_checkpoint(source(tmp_path, on_error="skip"))


def test_a_flipped_bit_of_a_compressed_file_never_changes_the_text(tmp_path: Path) -> None:
    for name, raw in (
        ("a.jsonl.gz", gzip.compress(lines(TEXTS))),
        ("a.jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress(lines(TEXTS))),
    ):
        path, noticed = tmp_path / name, 0
        for place in range(0, len(raw), 9):
            flipped = bytearray(raw)
            flipped[place] ^= 8
            path.write_bytes(flipped)
            try:
                assert texts_of(source(path)) == TEXTS  # a bit that means nothing
            except DataError as error:
                assert str(path) in str(error)
                noticed += 1
        assert noticed > 0.8 * len(raw) / 9


def test_a_truncated_parquet_file_is_refused_or_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path)
    path.write_bytes(path.read_bytes()[:-50])
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=re.escape(str(path)) + r".*on_error: skip"):
        list(source(path))
    documents = iter(source(tmp_path, on_error="skip"))
    assert [d.text for d in documents] == ["good"]
    assert documents.skipped == {"truncated_file": 1}


def test_a_damaged_row_group_keeps_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    options = {"write_page_checksum": True, "compression": "NONE", "use_dictionary": False}
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=20, **options)
    raw = bytearray(path.read_bytes())
    raw[raw.index(TEXTS[45].encode())] ^= 1  # in the third row group
    path.write_bytes(raw)
    documents = iter(source(path, on_error="skip"))
    assert [d.text for d in documents] == TEXTS[:40]
    assert documents.skipped == {"corrupt_file": 1}
    with pytest.raises(DataError, match=re.escape(f"{path}:row 40: ")):
        list(source(path))


def test_faults_of_parquet_rows_are_counted_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = pa.array([b"good", b"\xff\xff", None, b"fine"], pa.binary())
    pq.write_table(pa.table({"text": raw.view(pa.string()), "n": [1, 2, 3, 4]}), path)
    documents = iter(source(path, on_error="skip"))
    assert [d.where for d in documents] == [f"{path}:row 0", f"{path}:row 3"]
    assert documents.skipped == {"invalid_utf8": 1, "not_text": 1}
    with pytest.raises(DataError, match=re.escape(f"{path}:row 1: invalid UTF-8")):
        list(source(path))
    with pytest.raises(DataError, match="column 'n' holds int '1', not text"):
        list(source(path, text=TextConfig(column="n")))
    missing = iter(source(path, text=TextConfig(column="body"), on_error="skip"))
    with pytest.raises(DataError, match=r"no usable document among 4 records .*missing_column': 4"):
        next(missing)
    with pytest.raises(DataError, match=r"row 0: no column 'body'; there are: text, n;"):
        list(source(path, text=TextConfig(column="body")))


def test_a_label_without_a_word_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"t": "x", "y": 0}\n{"t": "z", "y": -1}\n')
    config = TextConfig(template="{t}={y}", choices={"y": ["no", "yes"]})
    documents = iter(source(tmp_path, text=config, on_error="skip"))
    assert [d.text for d in documents] == ["x=no"]
    assert documents.skipped == {"bad_choice": 1}


def test_a_text_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "b.txt").write_text("plain")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/a.txt: invalid UTF-8 at byte 3")):
        list(source(tmp_path, shuffle=False))
    documents = iter(source(tmp_path, on_error="skip"))
    assert [d.text for d in documents] == ["plain"]
    assert documents.skipped == {"invalid_utf8": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        list(source(tmp_path))


def test_a_file_that_vanishes_is_an_unreadable_file(folder: Path) -> None:
    for name in ("a.jsonl", "d.parquet"):
        documents = iter(source(folder / name, on_error="skip"))
        (folder / name).unlink()
        with pytest.raises(DataError, match="unreadable_file': 1"):
            next(documents)
