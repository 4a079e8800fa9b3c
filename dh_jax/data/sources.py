"""Sources: files or hub data sets -> documents with stable ids, each in exactly one split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain

from dh_jax.config import SPLITS, FilesSource, HubSource, SourceConfig, SplitConfig
from dh_jax.data.conversations import read_conversation
from dh_jax.data.files import FileRecords
from dh_jax.data.hub import HubRecords
from dh_jax.data.records import REASONS, Fault, Record, RecordStream, needed_columns, render
from dh_jax.errors import ConfigError, DataError, StateError

HELD_OUT = ("probe", "eval")


class Document(NamedTuple):
    """A text of a source."""

    text: str  # of a conversation: its canonical JSON (`conversations.read_conversation`)
    id: int  # unsigned 64-bit hash of the content: equal texts have equal ids
    where: str  # "a.jsonl:17", "a.parquet:row 17", "a.txt", "org/name/a.parquet:row 17"


def document_id(text: str) -> int:
    """The first 8 bytes, little endian, of the BLAKE2b digest of the text in UTF-8."""
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
    """
    if role != "hash":
        return role
    place = (document_id >> 11) * 2.0**-53
    if place < splits.probe:
        return "probe"
    return "eval" if place >= 1.0 - splits.eval else "train"


class DocumentSource(grain.IterDataset[Document]):
    """One pass over one source, restricted to one split and one shard of its records.

    Records are dealt to shards in turn, so shards are disjoint and complete whatever the number
    of files. With ``shuffle`` the order of files depends on seed and epoch; within a file the
    order is the file's (packing windows and mixing shuffle further).

    Args:
        name: of the source, for errors and saved states.
        spec: a validated `FilesSource` or `HubSource`.
        split: ``train``, ``probe`` or ``eval``; None for the documents of all three.
        splits: fractions held out.
        seed: of the order of files.
        epoch: passes made before this one.
        shard: (index, count).
        shuffle: whether files are read in another order at every epoch.
        on_error: ``raise``, or ``skip`` to count bad records by reason in ``skipped``.

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
        self.on_error = on_error

    def __iter__(self) -> DocumentIterator:
        return DocumentIterator(self)

    def __str__(self) -> str:
        return f"DocumentSource({self.name!r}, split={self.split!r})"

    def order(self, count: int) -> Sequence[int]:
        """The order in which to read ``count`` files: a function of seed and epoch alone."""
        if not self.shuffle:
            return range(count)
        key = f"{self.seed}/{self.epoch}/".encode()
        return sorted(range(count), key=lambda i: hashlib.blake2b(key + str(i).encode()).digest())

    def records(self) -> RecordStream:
        """Open the source at its first record."""
        if isinstance(self.spec, FilesSource):
            return FileRecords(self.name, self.spec, self.order)
        if isinstance(self.spec, HubSource):
            return HubRecords(self.name, self.spec, self.order)
        raise ConfigError(f"source {self.name!r}: kind {self.spec.kind!r} cannot be read")


class DocumentIterator(grain.DatasetIterator[Document]):
    """Iterator of a `DocumentSource`; its state is a few integers and hashes, fit for JSON."""

    def __init__(self, source: DocumentSource) -> None:
        super().__init__()
        self._source = source
        self._records = source.records()
        self._identity = _identity(source) | self._records.identity()
        self._position = 0  # records seen, of all shards
        self._yielded = 0
        self._counts = dict.fromkeys(REASONS, 0)

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
        limit = self._source.spec.max_documents
        index, count = self._source.shard
        while limit is None or self._position < limit:
            try:
                record = next(self._records)
            except StopIteration:
                break
            mine = self._position % count == index
            self._position += 1
            document = self._document(record) if mine else None
            if document is not None:
                self._yielded += 1
                return document
        if not self._yielded:
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
        shard = f" for shard {source.shard[0]} of {source.shard[1]}" if source.shard[1] > 1 else ""
        cure = "check its paths and text column"
        if source.spec.split == "hash" and source.split in HELD_OUT:
            share = getattr(source.splits, source.split)
            cure = f"raise splits.{source.split} (now {share:g}) or give the source more documents"
        return (
            f"source {source.name!r} has no {source.split or 'usable'} document{shard} among "
            f"{self._position} records (skipped: {self.skipped or 'none'}); {cure}"
        )

    def get_state(self) -> dict[str, Any]:
        return {
            "identity": dict(self._identity),
            "cursor": self._records.cursor(),
            "position": self._position,
            "yielded": self._yielded,
            "skipped": dict(self._counts),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on after the last document before ``state`` was taken.

        Raises:
            StateError: the state is of another source, order or list of files.
        """
        saved = state.get("identity", {})
        for key, ours in self._identity.items():
            if saved.get(key) != ours:
                raise StateError(
                    f"source {self._source.name!r}: the saved state has {key} {saved.get(key)!r}, "
                    f"this source {ours!r}; {_cure(key)}, or start without the state"
                )
        self._records.seek(state["cursor"])
        self._position, self._yielded = int(state["position"]), int(state["yielded"])
        self._counts = {reason: int(state["skipped"].get(reason, 0)) for reason in REASONS}

    def close(self) -> None:
        records: RecordStream | None = getattr(self, "_records", None)  # None if opening failed
        if records is not None:
            records.close()
        super().close()


def _identity(source: DocumentSource) -> dict[str, Any]:
    """What must be the same for a saved state to mean the same place."""
    spec, (index, count) = source.spec, source.shard
    content = [dataclasses.asdict(spec.text), spec.split, spec.max_documents]
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
    if key == "spec":
        return "restore text, split, splits, kind and max_documents as they were"
    return f"open the source with the same {key}"
