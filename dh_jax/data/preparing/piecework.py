"""Preparation as piecework: a lot of documents -> shards of their tokens, a pure function.

A lot is some consecutive pieces (files) of one source. Whoever runs `map_lot`, in whatever
order, on whatever machine, writes the same bytes; a finished lot is a folder with ``lot.json``,
which a later preparation finds and keeps. Which documents stay is decided afterwards, over all.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dh_jax.config import DataConfig, SourceConfig
from dh_jax.data.preparing.near_duplicates import signatures
from dh_jax.data.reading.pieces import Piece
from dh_jax.data.sources import Document, DocumentSource, list_pieces
from dh_jax.data.stores.shards import (
    check_blocks,
    checks_of,
    explained_disk,
    map_shard,
    write_json,
    write_shard,
)
from dh_jax.data.text.encoding import TokenDocument, join, make_encoder
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import DataError

LOT_BYTES = 8 * 2**20  # pieces are gathered into a lot up to this size: seconds of work
PART_TOKENS = 8 * 2**20  # tokens of a lot held in memory before they are written
ENCODE_CHARACTERS = 2**18  # characters handed to the tokenizer at once
ENCODE_DOCUMENTS = 512  # and documents, at most


class Lot(NamedTuple):
    """What one worker reads at a time: some consecutive pieces of one source."""

    number: int
    source: str
    spec: SourceConfig
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of its files; 0 where unknown (a hub)."""
        return sum(piece.size for piece in self.pieces)


class Job(NamedTuple):
    """What all lots have in common."""

    folder: Path  # where lots are put; on a cluster one that every machine sees
    config: DataConfig
    tokenizer: TokenizerWrapper


class Part(NamedTuple):
    """One intermediate shard of a lot, memory-mapped."""

    lot: Lot
    path: Path
    arrays: dict[str, npt.NDArray[Any]]


# --- cutting sources into lots ---------------------------------------------------------------


def lots_of(sources: dict[str, SourceConfig]) -> list[Lot]:
    """Every source as lots, in order. A source of which only the first ``max_documents`` count
    is one lot, since where they end depends on all pieces before."""
    lots: list[Lot] = []
    for name, spec in sources.items():
        for pieces in _gathered(list_pieces(name, spec), whole=spec.max_documents is not None):
            lots.append(Lot(len(lots), name, spec, tuple(pieces)))
    return lots


def _gathered(pieces: Sequence[Piece], *, whole: bool) -> Iterator[list[Piece]]:
    """Consecutive pieces of up to ``LOT_BYTES`` together; one of unknown size stays alone."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and not whole and (not piece.size or size + piece.size > LOT_BYTES):
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.size
    yield group


# --- reading ---------------------------------------------------------------------------------


def read_documents(job: Job, lot: Lot, skipped: Counter[str]) -> Iterator[Document]:
    """Every document of a lot, in order; records left out are counted in ``skipped``."""
    config = job.config
    source = DocumentSource(
        lot.source,
        lot.spec,
        split=None,
        splits=config.splits,
        shuffle=False,
        on_error=config.on_error,
        pieces=lot.pieces,
    )
    with closing(iter(source)) as documents:
        yield from documents
        skipped.update(documents.skipped)


def read_kept(job: Job, lot: Lot) -> Iterator[tuple[int, Document]]:
    """Read a mapped lot again: its documents with their places among the mapped ones.

    Raises:
        DataError: the source is not what it was when it was mapped.
    """
    ids = [int(i) for part in open_lot(job, lot) for i in part.arrays["ids"]]
    place = 0
    for document in read_documents(job, lot, Counter()):
        if place < len(ids) and document.id == ids[place]:
            yield place, document
            place += 1
    if place < len(ids):
        raise DataError(
            f"source {lot.source!r} changed while it was prepared: document {ids[place]:016x} "
            "is gone; prepare again when its files are at rest"
        )


def open_lot(job: Job, lot: Lot) -> list[Part]:
    """Map the shards of a finished lot.

    Raises:
        DataError: one is missing or damaged.
    """
    folder = lot_folder(job, lot)
    facts = json.loads((folder / "lot.json").read_text())
    paths = [folder / f"{i:05d}.safetensors" for i in range(len(facts["parts"]))]
    return [
        Part(lot, path, map_shard(path, part["crc32"]))
        for path, part in zip(paths, facts["parts"], strict=True)
    ]


def lot_folder(job: Job, lot: Lot) -> Path:
    return job.folder / f"lot-{lot.number:06d}"


# --- mapping ---------------------------------------------------------------------------------


def map_lot(job: Job, lot: Lot) -> dict[str, Any]:
    """Read, identify and encode one lot, unless that is done already.

    Returns:
        Its counts: ``documents``, ``tokens``, ``skipped`` by reason, and the facts of its shards.

    Raises:
        DataError: a document cannot be read (with ``on_error: raise``), or the disk is full.
    """
    target = lot_folder(job, lot)
    if (target / "lot.json").exists():
        if _is_intact(job, lot):
            return dict(json.loads((target / "lot.json").read_text()))
        shutil.rmtree(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with explained_disk(partial):
            partial.mkdir(parents=True)
        facts = _map_into(partial, job, lot)
        write_json(partial / "lot.json", facts)
        try:
            os.rename(partial, target)
        except OSError:  # a cluster may run a lot twice, and both write the same
            if not (target / "lot.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def _is_intact(job: Job, lot: Lot) -> bool:
    """Whether a lot that an earlier preparation left survived what ended it."""
    try:
        for part in open_lot(job, lot):
            check_blocks(checks_of(part.path, part.arrays), 0, part.arrays["tokens"].size)
    except (DataError, ValueError, KeyError):
        return False
    return True


def _map_into(folder: Path, job: Job, lot: Lot) -> dict[str, Any]:
    encode = make_encoder(lot.spec, job.config, job.tokenizer)
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

    for documents in _batches(read_documents(job, lot, skipped), skipped):
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
    group goes no further; equal ones farther apart meet when all lots are compared."""
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
