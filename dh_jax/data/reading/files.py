"""Files as a shelf of pieces; see `pieces.Shelf`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from dh_jax.config import FilesSource
from dh_jax.data.reading.formats import RANGED, Steps, kind_of, read_kind
from dh_jax.data.reading.pieces import Cursor, Piece, parts_of
from dh_jax.data.reading.records import Record, needed_columns
from dh_jax.data.reading.storage import Storage, find_files

FINISHED = -1  # the offset of a file that cannot be read any further


class FileShelf:
    """The pieces of a source of files.

    Plain JSONL is cut into ranges of bytes, Parquet and ArrayRecord into ranges of rows. Other
    files cannot be entered in the middle: their parts take records in turn. A text file is one
    record and never cut.

    Args:
        name: of the source, for errors.
        spec: which files, of which format.
        pieces: read these rather than look for files.
    """

    def __init__(self, name: str, spec: FilesSource, pieces: Sequence[Piece] | None = None) -> None:
        self._columns = needed_columns(spec.text)
        self._format, self._storage = spec.format, Storage.of(spec)
        self._given = pieces
        self._files = [] if pieces is not None else find_files(name, spec)

    def pieces(self, count: int) -> list[Piece]:
        if self._given is not None:
            return list(self._given)
        parts = parts_of(len(self._files), count)
        return [
            Piece(*file, i, part, of)
            for i, file in enumerate(self._files)
            for of in (1 if kind_of(file.path, self._format) == "text" else parts,)
            for part in range(of)
        ]

    def read(self, piece: Piece, cursor: Cursor | None) -> FileReader:
        return FileReader(piece, self._format, self._columns, self._storage, cursor)

    def identity(self) -> dict[str, str]:
        listing = "\n".join(
            f"{p.name}\t{p.size}" for p in (self._files if self._given is None else self._given)
        )
        return {"files": hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()}


class FileReader:
    """The records of one piece of a file; see `pieces.PieceReader`. Its cursor is a byte of the
    decompressed text and a row."""

    def __init__(
        self,
        piece: Piece,
        format: str,
        columns: Sequence[str],
        storage: Storage,
        cursor: Cursor | None,
    ) -> None:
        self._piece, self._columns, self._storage = piece, columns, storage
        self._kind = kind_of(piece.path, format)
        self._deal = piece.parts > 1 and not is_ranged(piece, self._kind)
        self._offset: int
        self._row: int
        self._offset, self._row = cursor or (0, 0)
        self._steps: Steps | None = None

    def __next__(self) -> Record:
        if self._steps is None:
            if self._offset == FINISHED:
                raise StopIteration
            whole = self._piece._replace(part=0, parts=1) if self._deal else self._piece
            self._steps = read_kind(
                self._kind, whole, self._columns, self._storage, self._offset, self._row
            )
        for record, offset, row in self._steps:
            self._offset, self._row = FINISHED if offset is None else offset, row
            if not self._deal or (row - 1) % self._piece.parts == self._piece.part:
                return record
        raise StopIteration

    def cursor(self) -> Cursor:
        return [self._offset, self._row]

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None


def is_ranged(piece: Piece, kind: str) -> bool:
    """Whether a part of the file can be read without reading the rest."""
    packed = os.path.splitext(piece.path)[1].lower() in (".gz", ".zst")
    return kind in RANGED and not packed
