"""Preparation as piecework: a piece of a source -> shards of its tokens, a pure function.

A piece is some consecutive files of one source. Whoever runs `map_piece`, in whatever order, on
whatever machine, writes the same bytes; a finished piece is a folder with ``piece.json``, which
a later preparation finds and keeps. Which documents stay is decided afterwards, over all pieces.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dh_jax.config import DataConfig, FilesSource, SourceConfig
from dh_jax.data.encoding import TokenDocument, join, make_encoder
from dh_jax.data.files import find_files
from dh_jax.data.near_duplicates import signatures
from dh_jax.data.shards import (
    check_blocks,
    checks_of,
    explained_disk,
    map_shard,
    write_json,
    write_shard,
)
from dh_jax.data.sources import Document, DocumentSource
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import DataError

PIECE_BYTES = 8 * 2**20  # files are gathered into a piece up to this size: seconds of work
PART_TOKENS = 8 * 2**20  # tokens of a piece held in memory before they are written
ENCODE_CHARACTERS = 2**18  # characters handed to the tokenizer at once
ENCODE_DOCUMENTS = 512  # and documents, at most


class Piece(NamedTuple):
    """Part of a source: a source of its own."""

    number: int
    source: str
    spec: SourceConfig
    size: int  # bytes of its files; 0 where unknown (a hub)


class Job(NamedTuple):
    """What all pieces have in common."""

    folder: Path  # where pieces are put; on a cluster one that every machine sees
    config: DataConfig
    tokenizer: TokenizerWrapper


class Part(NamedTuple):
    """One intermediate shard of a piece, memory-mapped."""

    piece: Piece
    path: Path
    arrays: dict[str, npt.NDArray[Any]]


# --- cutting sources into pieces -------------------------------------------------------------


def pieces_of(sources: dict[str, SourceConfig]) -> list[Piece]:
    """Every source as pieces, in order. A hub's data set is one piece, and so is a source whose
    first ``max_documents`` count, since where they end depends on all files before."""
    pieces: list[Piece] = []
    for name, spec in sources.items():
        for part, size in _cut(name, spec):
            pieces.append(Piece(len(pieces), name, part, size))
    return pieces


def _cut(name: str, spec: SourceConfig) -> Iterator[tuple[SourceConfig, int]]:
    if not isinstance(spec, FilesSource):
        yield spec, 0
        return
    files = find_files(name, spec.paths, spec.include)
    if spec.max_documents is not None:
        yield spec, sum(file.size for file in files)
        return
    paths: list[str] = []
    size = 0
    for file in files:
        if paths and size + file.size > PIECE_BYTES:
            yield dataclasses.replace(spec, paths=paths), size
            paths, size = [], 0
        paths.append(file.path)
        size += file.size
    yield dataclasses.replace(spec, paths=paths), size


# --- reading ---------------------------------------------------------------------------------


def read_documents(job: Job, piece: Piece, skipped: Counter[str]) -> Iterator[Document]:
    """Every document of a piece, in order; records left out are counted in ``skipped``."""
    config = job.config
    source = DocumentSource(
        piece.source,
        piece.spec,
        split=None,
        splits=config.splits,
        shuffle=False,
        on_error=config.on_error,
    )
    with closing(iter(source)) as documents:
        # A pass that yields nothing is an error, but a piece of one may well be empty.
        documents.set_state(documents.get_state() | {"yielded": 1})
        yield from documents
        skipped.update(documents.skipped)


def read_kept(job: Job, piece: Piece) -> Iterator[tuple[int, Document]]:
    """Read a mapped piece again: its documents with their places among the mapped ones.

    Raises:
        DataError: the source is not what it was when it was mapped.
    """
    ids = [int(i) for part in open_piece(job, piece) for i in part.arrays["ids"]]
    place = 0
    for document in read_documents(job, piece, Counter()):
        if place < len(ids) and document.id == ids[place]:
            yield place, document
            place += 1
    if place < len(ids):
        raise DataError(
            f"source {piece.source!r} changed while it was prepared: document {ids[place]:016x} "
            "is gone; prepare again when its files are at rest"
        )


def open_piece(job: Job, piece: Piece) -> list[Part]:
    """Map the shards of a finished piece.

    Raises:
        DataError: one is missing or damaged.
    """
    folder = piece_folder(job, piece)
    facts = json.loads((folder / "piece.json").read_text())
    paths = [folder / f"{i:05d}.safetensors" for i in range(len(facts["parts"]))]
    return [
        Part(piece, path, map_shard(path, part["crc32"]))
        for path, part in zip(paths, facts["parts"], strict=True)
    ]


def piece_folder(job: Job, piece: Piece) -> Path:
    return job.folder / f"piece-{piece.number:06d}"


# --- mapping ---------------------------------------------------------------------------------


def map_piece(job: Job, piece: Piece) -> dict[str, Any]:
    """Read, identify and encode one piece, unless that is done already.

    Returns:
        Its counts: ``documents``, ``tokens``, ``skipped`` by reason, and the facts of its shards.

    Raises:
        DataError: a document cannot be read (with ``on_error: raise``), or the disk is full.
    """
    target = piece_folder(job, piece)
    if (target / "piece.json").exists():
        if _is_intact(job, piece):
            return dict(json.loads((target / "piece.json").read_text()))
        shutil.rmtree(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with explained_disk(partial):
            partial.mkdir(parents=True)
        facts = _map_into(partial, job, piece)
        write_json(partial / "piece.json", facts)
        try:
            os.rename(partial, target)
        except OSError:  # a cluster may run a piece twice, and both write the same
            if not (target / "piece.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def _is_intact(job: Job, piece: Piece) -> bool:
    """Whether a piece that an earlier preparation left survived what ended it."""
    try:
        for part in open_piece(job, piece):
            check_blocks(checks_of(part.path, part.arrays), 0, part.arrays["tokens"].size)
    except (DataError, ValueError, KeyError):
        return False
    return True


def _map_into(folder: Path, job: Job, piece: Piece) -> dict[str, Any]:
    encode = make_encoder(piece.spec, job.config, job.tokenizer)
    near = job.config.prepare.near_duplicates
    skipped: Counter[str] = Counter()
    parts: list[dict[str, Any]] = []
    gathered: list[TokenDocument] = []
    marks: list[npt.NDArray[np.uint32]] = []
    tokens = 0

    def flush() -> None:
        nonlocal tokens
        if gathered:
            joined = join(gathered)
            parts.append(
                write_shard(
                    folder / f"{len(parts):05d}.safetensors",
                    np.array([d.id for d in gathered], np.uint64),
                    np.array([d.tokens.size for d in gathered], np.int64),
                    np.array([d.bytes for d in gathered], np.int64),
                    joined.tokens,
                    joined.loss_mask,
                    minhash=np.concatenate(marks) if marks else None,
                )
            )
        gathered.clear()
        marks.clear()
        tokens = 0

    for documents in _batches(read_documents(job, piece, skipped), skipped):
        encoded = encode(documents, skipped)
        gathered += [e for e in encoded if e is not None]
        tokens += sum(e.tokens.size for e in encoded if e is not None)
        if near.action != "ignore":
            texts = [d.text for d, e in zip(documents, encoded, strict=True) if e is not None]
            marks.append(signatures(texts, near))
        if tokens >= PART_TOKENS:
            flush()
    flush()
    counts = {what: sum(part[what] for part in parts) for what in ("documents", "tokens", "bytes")}
    return {**counts, "skipped": dict(skipped), "parts": parts}


def _batches(documents: Iterator[Document], skipped: Counter[str]) -> Iterator[list[Document]]:
    """Documents in groups of a size that the tokenizer likes. One that equals another of its
    group goes no further; equal ones farther apart meet when all pieces are compared."""
    batch: dict[int, Document] = {}
    characters = 0
    for document in documents:
        if document.id in batch:
            skipped["duplicate"] += 1
            continue
        batch[document.id] = document
        characters += len(document.text)
        if characters >= ENCODE_CHARACTERS or len(batch) >= ENCODE_DOCUMENTS:
            yield list(batch.values())
            batch, characters = {}, 0
    if batch:
        yield list(batch.values())
