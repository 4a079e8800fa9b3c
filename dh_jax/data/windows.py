"""Windows of documents for packing: planned from a store's index, or read from a stream.

Both are Grain data sets whose iterators carry a few integers of state. An epoch is one pass;
the next one comes in another order drawn from (seed, epoch).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from dh_jax.config import SplitConfig
from dh_jax.data.packing import Shards, Window
from dh_jax.data.permutation import permuted
from dh_jax.data.seeding import derive
from dh_jax.data.sources import Document, split_of
from dh_jax.data.store import StoredDocuments
from dh_jax.data.stores.shards import BlockGuard
from dh_jax.data.text.encoding import Encoder, join
from dh_jax.errors import DataError


class StoreWindows(grain.IterDataset[Window]):
    """Windows over stored documents, in an order that is a pure function of (seed, epoch).

    The order is a permutation evaluated point by point, so neither memory nor restoring grows
    with the number of documents. An epoch is cut into windows of nearly equal size, lest its
    last one be a handful of documents in half-empty rows.

    Args:
        documents: of one source and split.
        size: most documents of a window.
        seed: of the order.
        shuffle: False keeps the store's order.
        epochs: passes before the windows end; None for no end.

    Raises:
        DataError: not one of the documents has a token.
    """

    def __init__(
        self,
        documents: StoredDocuments,
        size: int,
        *,
        seed: int,
        shuffle: bool,
        epochs: int | None,
    ):
        super().__init__()
        if not documents.lengths_D.any():  # windows without rows, and no end of them
            raise DataError(
                f"none of the {documents.lengths_D.size} stored documents has a token; prepare "
                "them again, with a tokenizer whose vocabulary has their characters"
            )
        self.documents, self.seed, self.shuffle, self.epochs = documents, seed, shuffle, epochs
        self.count = -(-documents.lengths_D.size // size)  # windows of an epoch
        self._shards = Shards(documents.shards)
        self._blocks = BlockGuard(documents.checks) if documents.checks else None

    def __iter__(self) -> grain.DatasetIterator[Window]:
        return _StoreIterator(self)

    def window(self, epoch: int, index: int) -> Window:
        """The ``index``-th window of an epoch.

        Raises:
            DataError: tokens of it are not those that were written.
        """
        documents, count = self.documents, self.documents.lengths_D.size
        start, stop = index * count // self.count, (index + 1) * count // self.count
        if self.shuffle:
            chosen = permuted(start, stop, count, derive(self.seed, epoch))
        else:
            chosen = np.arange(start, stop)
        shards, starts = documents.shards_D[chosen], documents.starts_D[chosen]
        lengths = documents.lengths_D[chosen]
        if self._blocks is not None:
            self._blocks.check(shards, starts, lengths)
        return Window(
            self._shards,
            shards,
            starts,
            lengths,
            documents.ids_D[chosen],
            derive(self.seed, epoch, index),
        )


class _StoreIterator(grain.DatasetIterator[Window]):
    def __init__(self, dataset: StoreWindows):
        super().__init__()
        self._dataset = dataset
        self._epoch, self._index = 0, 0

    def __next__(self) -> Window:
        self._assert_not_closed()
        dataset = self._dataset
        if self._index >= dataset.count:
            if self._epoch + 1 == dataset.epochs:
                raise StopIteration
            self._epoch, self._index = self._epoch + 1, 0
        window = dataset.window(self._epoch, self._index)
        self._index += 1
        return window

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "window": self._index}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch, self._index = int(state["epoch"]), int(state["window"])


class StreamWindows(grain.IterDataset[Window]):
    """Windows read and tokenised from documents as they stream by.

    Args:
        open_epoch: epoch -> a data set of `Document`.
        encode: applied to a window's documents at once, on all cores.
        size: documents of a window.
        seed: orders the rows of windows.
        epochs: passes before the windows end; None for no end.
        held_out: ids that must not appear here (documents of explicit probe and eval sets).
        on_error: what to do with one that does: ``raise``, or ``skip`` and count it.
        gives_way: leave out, and count, documents that these splits by content would hold out.
    """

    def __init__(
        self,
        name: str,
        open_epoch: Callable[[int], grain.IterDataset[Document]],
        encode: Encoder,
        size: int,
        *,
        seed: int,
        epochs: int | None,
        held_out: frozenset[int] = frozenset(),
        on_error: str = "raise",
        gives_way: SplitConfig | None = None,
    ):
        super().__init__()
        self.name, self.open_epoch, self.encode, self.size = name, open_epoch, encode, size
        self.seed, self.epochs = seed, epochs
        self.held_out, self.on_error, self.gives_way = held_out, on_error, gives_way

    def __iter__(self) -> StreamIterator:
        return StreamIterator(self)


class StreamIterator(grain.DatasetIterator[Window]):
    """Iterates stream windows; ``skipped`` counts what was left out, by reason."""

    def __init__(self, dataset: StreamWindows):
        super().__init__()
        self._dataset = dataset
        self._epoch, self._index = 0, 0
        self._documents: Any = iter(dataset.open_epoch(0))
        self._skipped: Counter[str] = Counter()
        self._kept = False  # any document of this epoch

    @property
    def skipped(self) -> dict[str, int]:
        return dict(self._skipped + Counter(self._documents.skipped))

    def __next__(self) -> Window:
        self._assert_not_closed()
        documents = self._read()
        if not documents and not self._kept:  # without end, if it repeats
            raise DataError(
                f"source {self._dataset.name!r}: every document of the pass was left out "
                f"({self.skipped}); mend what the counts name, or raise max_length if too_long"
            )
        if not documents and self._epoch + 1 != self._dataset.epochs:
            self._kept = False
            self._skipped.update(self._documents.skipped)
            self._index = 0
            self._open(self._epoch + 1)
            documents = self._read()
        if not documents:
            raise StopIteration
        encoded = self._dataset.encode(documents, self._skipped)
        kept = [document for document in encoded if document is not None]
        self._kept = self._kept or bool(kept)
        lengths = np.array([d.tokens.size for d in kept], np.int64)
        window = Window(
            Shards([join(kept)] if kept else []),
            np.zeros(len(kept), np.int32),
            np.cumsum(lengths) - lengths,
            lengths,
            np.array([d.id for d in kept], np.uint64),
            derive(self._dataset.seed, self._epoch, self._index),
        )
        self._index += 1
        return window

    def _read(self) -> list[Document]:
        """Up to a window of documents; fewer only at the end of the epoch."""
        documents: list[Document] = []
        splits = self._dataset.gives_way
        while len(documents) < self._dataset.size:
            document = next(self._documents, None)
            if document is None:
                break
            if document.id in self._dataset.held_out:
                if self._dataset.on_error == "raise":
                    raise DataError(
                        f"source {self._dataset.name!r}: {document.where} is also in a probe or "
                        "eval set; take it out of one of them, give the probe 'split: hash', or "
                        "set on_error: skip to leave it out here"
                    )
                self._skipped["held_out"] += 1
                continue
            if splits is not None and split_of(document.id, splits) != "train":
                self._skipped["held_out_by_hash"] += 1
                continue
            documents.append(document)
        return documents

    def get_state(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "window": self._index,
            "kept": self._kept,
            "documents": self._documents.get_state(),
            "skipped": dict(self._skipped),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        if int(state["epoch"]) != self._epoch:
            self._open(int(state["epoch"]))
        self._index, self._kept = int(state["window"]), bool(state.get("kept", True))
        self._documents.set_state(state["documents"])
        self._skipped = Counter(state["skipped"])

    def _open(self, epoch: int) -> None:
        self._documents.close()
        self._epoch, self._documents = epoch, iter(self._dataset.open_epoch(epoch))

    def close(self) -> None:
        """Close the files that are open. Idempotent."""
        documents = getattr(self, "_documents", None)  # None if opening failed
        if documents is not None:
            documents.close()
        super().close()
