"""Pieces of a source: how they are dealt to hosts, read in turn, and dealt again.

A *piece* is a file, or one of ``parts`` parts of it where there are fewer files than shards. The
pieces of a pass stand in an order fixed by seed and epoch and are dealt out in turn, so hosts
read disjoint pieces and nobody reads everything. Each host reads ``interleave`` of its pieces at
once, a record from each in turn; where it stands is then a cursor a piece, a few dozen bytes.

When a run goes on with another number of hosts, what they had left is laid out in one row
(`remaining`) and dealt anew. A saved state names the earlier hosts' cursors, not the pieces, so
its size grows with hosts and interleaving and not with files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

from dh_jax.data.reading.records import Record

START = "[0,0,[]]"  # the cursor of a host that has read nothing
Cursor = list[Any]  # where reading of one piece stands; its reader knows what it means


class Piece(NamedTuple):
    """A file, or part ``part`` of ``parts`` of it; fit for JSON."""

    path: str  # to open it
    name: str  # the same on every machine
    size: int  # bytes of the file; 0: not known
    file: int = 0  # index of the file in its source
    part: int = 0
    parts: int = 1


class Todo(NamedTuple):
    """A piece still to be read, from its beginning or from a cursor."""

    piece: int
    cursor: Cursor | None = None


class PieceReader(Protocol):
    """The records of one piece, one after another. Nothing is opened before the first."""

    def __next__(self) -> Record: ...

    def cursor(self) -> Cursor:
        """The place after the last record handed out."""

    def close(self) -> None:
        """Release the open file."""


class Shelf(Protocol):
    """The pieces of a source, each to be opened by itself."""

    def pieces(self, count: int) -> list[Piece]:
        """All pieces, for a run of ``count`` shards; in the order of the files."""

    def read(self, piece: Piece, cursor: Cursor | None) -> PieceReader:
        """The records of a piece, from its beginning or from a cursor."""

    def identity(self) -> dict[str, str]:
        """Hashes of what is read, which a saved state must agree with."""


def parts_of(files: int, count: int) -> int:
    """Into how many parts each of ``files`` files is cut for ``count`` shards."""
    return -(-count // files) if 0 < files < count else 1


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """An order of ``count`` pieces, a function of seed and epoch alone."""
    key = f"{seed}/{epoch}/".encode()
    return sorted(range(count), key=lambda i: hashlib.blake2b(key + str(i).encode()).digest())


def deal(work: Sequence[Todo], shard: tuple[int, int]) -> list[Todo]:
    """One shard's share: every ``count``-th piece."""
    return list(work[shard[0] :: shard[1]])


def remaining(work: Sequence[Todo], cursor: str | None) -> list[Todo]:
    """What a host has left of its share at ``cursor``: begun pieces first. None: nothing."""
    if cursor is None:
        return []
    following, turn, slots = json.loads(cursor)
    begun = [Todo(work[place].piece, at) for place, at in slots[turn:] + slots[:turn]]
    return begun + list(work[following:])


def redealt(work: Sequence[Todo], history: Sequence[Any]) -> list[Todo]:
    """What is left of a pass after earlier runs.

    Args:
        work: all pieces, in the order of the pass.
        history: for each earlier run (its number of hosts, their cursors).
    """
    for count, cursors in history:
        left = [remaining(deal(work, (i, count)), at) for i, at in enumerate(cursors)]
        work = list(chain.from_iterable(left))
    return list(work)


class Turns:
    """Reads the pieces of one host's share, up to ``interleave`` of them in turn."""

    def __init__(
        self,
        shelf: Shelf,
        pieces: Sequence[Piece],
        work: Sequence[Todo],
        interleave: int,
        cursor: str = START,
    ) -> None:
        self._shelf, self._pieces, self._work = shelf, pieces, work
        self._interleave = interleave
        self._next, self._turn, slots = json.loads(cursor)
        self._slots = [(place, self._open(place, at)) for place, at in slots]

    def _open(self, place: int, cursor: Cursor | None) -> PieceReader:
        return self._shelf.read(self._pieces[self._work[place].piece], cursor)

    def __next__(self) -> Record:
        while True:
            while len(self._slots) < self._interleave and self._next < len(self._work):
                self._slots.append(self._start())
            if not self._slots:
                raise StopIteration
            self._turn %= len(self._slots)
            _, reader = self._slots[self._turn]
            record = next(reader, None)
            if record is not None:
                self._turn += 1
                return record
            reader.close()
            if self._next < len(self._work):
                self._slots[self._turn] = self._start()
            else:
                del self._slots[self._turn]

    def _start(self) -> tuple[int, PieceReader]:
        self._next += 1
        place = self._next - 1
        return place, self._open(place, self._work[place].cursor)

    def cursor(self) -> str:
        """Where this share stands, as compact JSON."""
        slots = [[place, reader.cursor()] for place, reader in self._slots]
        return json.dumps([self._next, self._turn, slots], separators=(",", ":"))

    def close(self) -> None:
        for _, reader in self._slots:
            reader.close()
