"""Sources: files or hub data sets -> documents with stable ids, each in exactly one split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain

from dh_jax.config import SPLITS, FilesSource, HubSource, SourceConfig, SplitConfig
from dh_jax.data.reading.files import FileShelf
from dh_jax.data.reading.hub import HubShelf
from dh_jax.data.reading.pieces import Piece, Shelf, Todo, Turns, deal, redealt, shuffled
from dh_jax.data.reading.records import REASONS, Fault, Record, needed_columns, render
from dh_jax.data.text.conversations import read_conversation
from dh_jax.errors import ConfigError, DataError, StateError

HELD_OUT = ("probe", "eval")


class Document(NamedTuple):
    """A text of a source."""

    text: str  # of a conversation: its canonical JSON (`conversations.read_conversation`)
    id: int  # unsigned 64-bit hash of the content: equal texts have equal ids
    where: str  # "a.jsonl:17", "a.parquet:row 17", "a.txt", "org/name/a.parquet:row 17"


def document_id(text: str) -> int:
    """The first 8 bytes, little endian, of the BLAKE2b digest of the text in UTF-8.

    >>> document_id("one text") == document_id("one text") != document_id("another")
    True
    """
    return int.from_bytes(hashlib.blake2b(text.encode()).digest()[:8], "little")


def split_of(document_id: int, splits: SplitConfig, role: str = "hash") -> str:
    """Which split a document belongs to, a pure function of its content.

    Equal texts always share a split, so no text can be in training and in a probe, whichever
    source or file it came from. The id's high bits are read as a number in [0, 1): probe takes
    the low end and eval the high end, so changing one fraction moves no document of the other.

    Args:
        document_id: see `document_id`.
        splits: fractions held out.
        role: ``hash``, or the split that all documents of the source belong to.

    Returns:
        ``train``, ``probe`` or ``eval``.

    >>> splits = SplitConfig(probe=0.25, eval=0.25)
    >>> [split_of(place << 61, splits) for place in range(8)]
    ['probe', 'probe', 'train', 'train', 'train', 'train', 'eval', 'eval']
    >>> split_of(0, splits, role="train")
    'train'
    """
    if role != "hash":
        return role
    place = (document_id >> 11) * 2.0**-53
    if place < splits.probe:
        return "probe"
    return "eval" if place >= 1.0 - splits.eval else "train"


def open_shelf(name: str, spec: SourceConfig, pieces: Sequence[Piece] | None = None) -> Shelf:
    """The pieces of a source of files or of a hub, without reading any.

    Raises:
        ConfigError: its kind has no records, or a path matches nothing.
        DataError: the place where its files lie cannot be listed.
    """
    if isinstance(spec, FilesSource):
        return FileShelf(name, spec, pieces)
    if isinstance(spec, HubSource):
        return HubShelf(name, spec, pieces)
    raise ConfigError(f"source {name!r}: kind {spec.kind!r} holds no records of text")


def list_pieces(name: str, spec: SourceConfig, count: int = 1) -> list[Piece]:
    """The pieces of a source, for reading them one by one or in parallel.

    Read in the order given, each through ``DocumentSource(..., pieces=[piece])``, they hold the
    documents of the whole source in its order.

    Args:
        name: of the source, for errors.
        spec: a validated `FilesSource` or `HubSource`.
        count: shards they are for. With fewer files than that, files are cut into parts.

    Raises:
        ConfigError: see `open_shelf`.
        DataError: see `open_shelf`.
    """
    return open_shelf(name, spec).pieces(count)


class DocumentSource(grain.IterDataset[Document]):
    """One pass over one source, restricted to one split and one shard of its pieces.

    Pieces (files, or parts of files where there are fewer files than shards) are dealt to shards
    in turn, so shards are disjoint and together complete, and no shard reads another's. With
    ``shuffle`` the order of pieces depends on seed and epoch, and ``spec.interleave`` of them are
    read in turn; within a piece the order is the file's (packing windows and mixing shuffle
    further). ``spec.max_documents`` counts records of any split; each shard gets its equal share.

    Args:
        name: of the source, for errors and saved states.
        spec: a validated `FilesSource` or `HubSource`.
        split: ``train``, ``probe`` or ``eval``; None for the documents of all three.
        splits: fractions held out.
        seed: of the order of pieces.
        epoch: passes made before this one.
        shard: (index, count).
        shuffle: whether pieces are read in another order at every epoch, and several in turn.
        on_error: ``raise``, or ``skip`` to count bad records by reason in ``skipped``.
        pieces: read these, of `list_pieces`, rather than the whole source; that they hold no
            document is then no error.

    Raises:
        ConfigError: the source can hold no document of this split.
    """

    def __init__(
        self,
        name: str,
        spec: SourceConfig,
        *,
        split: str | None,
        splits: SplitConfig,
        seed: int = 0,
        epoch: int = 0,
        shard: tuple[int, int] = (0, 1),
        shuffle: bool = True,
        on_error: str = "raise",
        pieces: Sequence[Piece] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= shard[0] < shard[1]:
            raise ConfigError(f"source {name!r}: shard {shard} is not (index, count) of one")
        if split is not None and split not in SPLITS:
            raise ConfigError(f"source {name!r}: split {split!r}; allowed: {', '.join(SPLITS)}")
        if split is not None and spec.split not in ("hash", split):
            raise ConfigError(
                f"source {name!r} is all {spec.split} (split: {spec.split}), so it has no {split} "
                "documents; set split: hash, or take another source"
            )
        if spec.split == "hash" and split in HELD_OUT and getattr(splits, split) == 0:
            raise ConfigError(
                f"source {name!r}: splits.{split} is 0, so it has no {split} documents; raise it"
            )
        needed_columns(spec.text)  # refuses a bad template here rather than at the first document
        self.name, self.spec, self.split, self.splits = name, spec, split, splits
        self.seed, self.epoch, self.shard, self.shuffle = seed, epoch, shard, shuffle
        self.on_error, self.pieces = on_error, pieces

    def __iter__(self) -> DocumentIterator:
        return DocumentIterator(self)

    def __str__(self) -> str:
        return f"DocumentSource({self.name!r}, split={self.split!r})"

    def order(self, count: int) -> Sequence[int]:
        """The order in which to read ``count`` pieces: a function of seed and epoch alone, and
        the same at every epoch under a limit, lest another order bring other documents."""
        epoch = self.epoch if self.spec.max_documents is None else 0
        return shuffled(count, self.seed, epoch) if self.shuffle else range(count)


class DocumentIterator(grain.DatasetIterator[Document]):
    """Iterator of a `DocumentSource`; its state is a few integers and hashes, fit for JSON."""

    def __init__(self, source: DocumentSource) -> None:
        super().__init__()
        self._source = source
        self._shelf = open_shelf(source.name, source.spec, source.pieces)
        self._identity = _identity(source) | self._shelf.identity()
        self._history: list[Any] = []  # (hosts, cursors) of the runs that began this pass
        self._seen = 0  # records of this shard
        self._yielded = 0
        self._left = _share_of(source.spec.max_documents, source.shard)
        self._counts = dict.fromkeys(REASONS, 0)
        self._turns = self._open()

    def _open(self, **cursor: str) -> Turns:
        """This shard's share of the pass, or of what earlier runs have left of it."""
        source = self._source
        count = self._history[0][0] if self._history else source.shard[1]
        pieces = self._shelf.pieces(count)
        work = redealt([Todo(i) for i in source.order(len(pieces))], self._history)
        interleave = source.spec.interleave if source.shuffle else 1
        return Turns(self._shelf, pieces, deal(work, source.shard), interleave, **cursor)

    @property
    def skipped(self) -> dict[str, int]:
        """How many of this shard's records were skipped, by reason; see `records.REASONS`."""
        return {reason: count for reason, count in self._counts.items() if count}

    def __next__(self) -> Document:
        """The next document of the split.

        Raises:
            DataError: a record is bad and ``on_error`` is ``raise``; or the pass gave nothing.
        """
        self._assert_not_closed()
        while self._left is None or self._left > 0:
            try:
                record = next(self._turns)
            except StopIteration:
                break
            self._seen += 1
            self._left = None if self._left is None else self._left - 1
            document = self._document(record)
            if document is not None:
                self._yielded += 1
                return document
        # Chosen pieces may be empty, and so may a host's share of what earlier runs have left.
        if not self._yielded and not self._history and self._source.pieces is None:
            raise DataError(self._nothing())
        raise StopIteration

    def _document(self, record: Record) -> Document | None:
        """The record's document, or None if it is another split's or was skipped."""
        source = self._source
        try:
            content = record.load()
            if source.spec.text.conversation is not None:
                text = read_conversation(content, source.spec.text.conversation)
            else:
                text = content if isinstance(content, str) else render(content, source.spec.text)
            if not text or text.isspace():
                raise Fault("empty")
            number = document_id(text)
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON can write
            self._skip(record, Fault("invalid_utf8", f"no UTF-8 for it ({error.reason})"))
            return None
        except Fault as fault:
            self._skip(record, fault)
            return None
        if source.split not in (None, split_of(number, source.splits, source.spec.split)):
            return None
        return Document(text, number, record.where)

    def _skip(self, record: Record, fault: Fault) -> None:
        if fault.reason != "empty" and self._source.on_error == "raise":
            raise DataError(
                f"source {self._source.name!r}: {record.where}: {fault}; "
                "repair it, or set on_error: skip to skip and count such records"
            ) from fault
        self._counts[fault.reason] += 1

    def _nothing(self) -> str:
        source = self._source
        limit, (index, count) = source.spec.max_documents, source.shard
        if _share_of(limit, source.shard) == 0:
            return (
                f"source {source.name!r}: max_documents {limit} leaves no record to shard {index} "
                f"of {count}; raise it to at least {count}, or read with fewer shards"
            )
        shard = f" for shard {source.shard[0]} of {source.shard[1]}" if source.shard[1] > 1 else ""
        cure = "check its paths and text column"
        if source.spec.split == "hash" and source.split in HELD_OUT:
            share = getattr(source.splits, source.split)
            cure = f"raise splits.{source.split} (now {share:g}) or give the source more documents"
        return (
            f"source {source.name!r} has no {source.split or 'usable'} document{shard} among "
            f"{self._seen} records (skipped: {self.skipped or 'none'}); {cure}"
        )

    def get_state(self) -> dict[str, Any]:
        """JSON-able cursor behind the last document; see `set_state`."""
        return {
            "identity": dict(self._identity),
            "cursor": self._turns.cursor(),
            "history": json.dumps(self._history, separators=(",", ":")),
            "seen": self._seen,
            "yielded": self._yielded,
            "left": -1 if self._left is None else self._left,
            "skipped": list(self._counts.values()),  # in the order of REASONS
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on after the last document before ``state`` was taken.

        Raises:
            StateError: the state is of another source, order, shard or list of files.
        """
        saved = state.get("identity", {})
        for key, ours in self._identity.items():
            if saved.get(key) != ours:
                raise StateError(
                    f"source {self._source.name!r}: the saved state has {key} {saved.get(key)!r}, "
                    f"this source {ours!r}; {_cure(key)}, or start without the state"
                )
        self._turns.close()
        self._history = json.loads(state["history"])
        self._turns = self._open(cursor=state["cursor"])
        self._seen, self._yielded = int(state["seen"]), int(state["yielded"])
        self._left = None if int(state["left"]) < 0 else int(state["left"])
        self._counts = dict(zip(REASONS, map(int, state["skipped"]), strict=True))

    def close(self) -> None:
        """Close the files that are open. Idempotent."""
        turns: Turns | None = getattr(self, "_turns", None)  # None if opening failed
        if turns is not None:
            turns.close()
        super().close()


def _share_of(limit: int | None, shard: tuple[int, int]) -> int | None:
    """One shard's part of ``limit``; the parts add up to it."""
    index, count = shard
    return None if limit is None else (limit - index + count - 1) // count


def _identity(source: DocumentSource) -> dict[str, Any]:
    """What must be the same for a saved state to mean the same place."""
    spec, (index, count) = source.spec, source.shard
    content = [dataclasses.asdict(spec.text), spec.split, spec.max_documents, spec.interleave]
    content += [dataclasses.asdict(source.splits), spec.kind]
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8)
    return {
        "source": source.name,
        "split": source.split or "all",
        "seed": source.seed,
        "epoch": source.epoch,
        "shard": f"{index} of {count}",
        "shuffle": source.shuffle,
        "spec": digest.hexdigest(),
    }


def _cure(key: str) -> str:
    if key == "files":
        return "restore the files (names and sizes) that the run began with"
    if key == "revision":
        return "set the source's revision to the saved one"
    if key == "shard":
        return "open it as that shard, or deal the states of all shards anew (elastic.reshard)"
    if key == "spec":
        return "restore text, split, splits, kind, interleave and max_documents as they were"
    return f"open the source with the same {key}"
