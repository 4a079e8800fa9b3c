"""Arrow folders of `datasets`, ArrayRecord, and files in parts: whole and damaged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import suppress
from itertools import chain
from pathlib import Path

import grain
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from dh_jax.errors import DataError
from tests.document_files import GOOD, TEXTS, lines, source, texts_of


def write_arrow(path: Path, texts: list[str]) -> None:
    table = pa.table({"n": range(len(texts)), "text": texts})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_records(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:4")
    for record in records:
        writer.write(record)
    writer.close()


def json_records(texts: list[str]) -> list[bytes]:
    return [json.dumps({"text": text}).encode() for text in texts]


# --- Arrow -----------------------------------------------------------------------------------


def test_what_datasets_saves_to_disk_is_read_with_its_columns(tmp_path: Path) -> None:
    rows = json.dumps({"text": TEXTS, "label": list(range(60))})
    code = (
        "import json, sys, datasets\n"
        "columns = json.loads(sys.stdin.read())\n"
        "data = datasets.Dataset.from_dict(columns)\n"
        f"data.save_to_disk({str(tmp_path / 'saved')!r}, num_shards=3)\n"
    )
    subprocess.run([sys.executable, "-c", code], input=rows, text=True, check=True)
    folder = tmp_path / "saved"
    write_arrow(folder / "cache-0123.arrow", ["left behind by map"])
    documents = list(source(folder, format="arrow", shuffle=False))
    assert [d.text for d in documents] == TEXTS
    assert documents[21].where == f"{folder}/data-00001-of-00003.arrow:row 1"


def test_arrow_files_and_streams_resume_and_are_dealt(tmp_path: Path) -> None:
    write_arrow(tmp_path / "a.arrow", TEXTS[:30])
    table = pa.table({"text": TEXTS[30:]})
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    assert texts_of(source(tmp_path, shuffle=False)) == TEXTS
    grain.experimental.assert_equal_output_after_checkpoint(source(tmp_path))
    shards = [texts_of(source(tmp_path, shard=(i, 3))) for i in range(3)]
    assert sorted(chain.from_iterable(shards)) == sorted(TEXTS)


def test_a_damaged_arrow_file_keeps_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_arrow(path, TEXTS)
    whole = path.read_bytes()
    for cut in (8, 100, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        documents = iter(source(path, on_error="skip"))
        texts = [d.text for d in documents]
        assert texts == TEXTS[: len(texts)]
        assert sum(documents.skipped.values()) == 1, cut
        with pytest.raises(DataError, match=re.escape(f"{path}:row {len(texts)}")):
            list(source(path))


# --- ArrayRecord -----------------------------------------------------------------------------


def test_array_records_are_json_or_text(tmp_path: Path) -> None:
    write_records(tmp_path / "a.array_record", json_records(TEXTS))
    write_records(tmp_path / "b.bin", [text.encode() for text in TEXTS] + [b"\xff"])
    assert texts_of(source(tmp_path / "a.array_record")) == TEXTS
    documents = iter(source(tmp_path / "b.bin", format="array_record_text", on_error="skip"))
    assert [d.text for d in documents] == TEXTS
    assert documents.skipped == {"invalid_utf8": 1}
    grain.experimental.assert_equal_output_after_checkpoint(source(tmp_path / "a.array_record"))


def test_a_truncated_array_record_is_refused_or_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    write_records(path, json_records(TEXTS))
    whole = path.read_bytes()
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    for cut in (10, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:-cut])
        with pytest.raises(DataError, match=re.escape(f"{path}: not a whole ArrayRecord file")):
            list(source(path))
        documents = iter(source(tmp_path, on_error="skip"))
        assert [d.text for d in documents] == ["good"]
        assert documents.skipped == {"truncated_file": 1}


def test_a_flipped_byte_of_an_array_record_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    records = json_records(TEXTS)
    write_records(path, records)
    raw = bytearray(path.read_bytes())
    inside = [i for i, byte in enumerate(raw) if byte]
    for place in inside[len(inside) // 4 :: len(inside) // 7]:
        flipped = bytearray(raw)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=r"damaged here|not a whole"):  # the second: its index
            list(source(path))
        texts = []
        with suppress(DataError):
            for document in source(path, on_error="skip"):
                texts.append(document.text)
        assert texts == TEXTS[: len(texts)] != TEXTS


def test_a_missing_array_record_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    write_records(path, json_records(TEXTS))
    documents = iter(source(path, on_error="skip"))
    path.unlink()
    with pytest.raises(DataError, match="unreadable_file': 1"):
        next(documents)


# --- parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 16])
def test_a_part_reads_its_own_bytes_and_row_groups_only(tmp_path: Path, count: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    options = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
    options["write_page_checksum"] = True
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "b.parquet", row_group_size=3, **options)
    for name in ("a.jsonl", "b.parquet"):
        path = tmp_path / name
        raw = path.read_bytes()
        shards = [texts_of(source(path, shard=(i, count), shuffle=False)) for i in range(count)]
        assert list(chain.from_iterable(shards)) == TEXTS
        # With the first document spoilt, only the part that holds it can notice.
        path.write_bytes(raw.replace(TEXTS[0].encode(), b"\xff" * len(TEXTS[0].encode()), 1))
        again = [texts_of(source(path, shard=(i, count), shuffle=False)) for i in range(1, count)]
        assert again == shards[1:]
        with pytest.raises(DataError):
            texts_of(source(path, shard=(0, count), shuffle=False))


def test_a_line_of_a_part_is_named_by_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    for i in range(2):
        for document in source(path, shard=(i, 2)):
            place = int(document.where.removeprefix(f"{path}:byte "))
            line = path.read_bytes()[place:].split(b"\n", 1)[0]
            assert json.loads(line)["text"] == document.text
