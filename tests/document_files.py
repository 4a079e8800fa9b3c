"""Small corpora in every format, and a short way to open them: shared by tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from dh_jax.config import FilesSource, SplitConfig
from dh_jax.data.sources import DocumentSource

THIRDS = SplitConfig(probe=0.3, eval=0.3)
TEXTS = [f"Text {i}: " + "naïve – 日本語 " * (i % 5) for i in range(60)]


def lines(texts: list[str], first: int = 0) -> bytes:
    rows = [{"id": first + i, "text": t, "note": None} for i, t in enumerate(texts)]
    return "".join(
        json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for i, r in enumerate(rows)
    ).encode()


def source(*paths: Path | str, split: str | None = None, **options: Any) -> DocumentSource:
    spec_keys = ("text", "format", "include", "max_documents", "interleave")
    spec = {k: options.pop(k) for k in spec_keys if k in options}
    role = options.pop("role", "hash")
    files = FilesSource(paths=[str(p) for p in paths], split=role, **spec)
    splits = options.pop("splits", THIRDS)
    return DocumentSource("s", files, split=split, splits=splits, **options)


def texts_of(dataset: DocumentSource) -> list[str]:
    return [document.text for document in dataset]


def write_every_format(folder: Path) -> None:
    """The 60 texts once, 10 to each format: five files and a tree."""
    (folder / "a.jsonl").write_bytes(lines(TEXTS[:10]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[10:20])))
    frames = [zstandard.compress(lines(TEXTS[20:24])), zstandard.compress(lines(TEXTS[24:30]))]
    (folder / "c.ndjson.zst").write_bytes(b"".join(frames))  # two frames
    table = pa.table({"id": list(range(10)), "text": TEXTS[30:40]})
    pq.write_table(table, folder / "d.parquet", row_group_size=3)
    (folder / "e.json").write_bytes(lines(TEXTS[40:50]).rstrip(b"\n"))  # no last line end
    (folder / "tree" / "deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS[50:]):
        place = folder / "tree" / ("deep" if i % 2 else ".") / f"{i}.txt"
        place.write_text(text, encoding="utf-8")


GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "corrupt_json": b'{"text": "half\n',
    "not_an_object": b"[1, 2]\n",
    "invalid_utf8": b'{"text": "\xff\xfe"}\n',
    "missing_column": b'{"content": "x"}\n',
    "not_text": b'{"text": 3}\n',
}
