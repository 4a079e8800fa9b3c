"""Documents as batches that can be gone through again, with where each is from.

Shapes: B rows, T tokens, S documents of a row, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dh_jax.batch import Batch, Origins
from dh_jax.data.loader import Loader
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import DataError


class Place(NamedTuple):
    """Where documents of one batch are from, in the order of `streaming.Scored`."""

    document_N: np.ndarray  # uint64 ids
    offset_N: np.ndarray  # int64, first token within the document
    tokens_N: np.ndarray  # int32


class Rows:
    """The first documents of a loader, opened anew at every pass.

    Args:
        open_loader: makes the loader; called once a pass.
        documents: how many are taken; what a last batch has beyond is masked.
    """

    def __init__(self, open_loader: Callable[[], Loader], documents: int):
        self._open, self._documents = open_loader, documents
        self.origins: Origins | None = None  # of the batch delivered last
        self.stats: dict[str, Any] | None = None  # of the last pass, as far as it went

    def __iter__(self) -> Iterator[Batch]:
        left = self._documents
        with self._open() as loader:
            for batch in loader:
                self.origins, self.stats = loader.origins, loader.stats()
                kept, count = _first(batch, self.origins.lengths_BS.shape[1], left)
                left -= count
                yield kept
                if left <= 0:
                    return

    def places(self, row_N: np.ndarray, segment_N: np.ndarray) -> Place:
        """Where documents of the batch delivered last are from."""
        assert self.origins is not None
        where = row_N, segment_N - 1
        return Place(
            self.origins.document_ids_BS[where],
            self.origins.offsets_BS[where],
            self.origins.lengths_BS[where],
        )


def learnt_documents(batch: Batch, segments: int) -> np.ndarray:
    """(B, S) bool: documents with a target."""
    learnt_BT = np.where(batch.loss_mask_BT, batch.segment_ids_BT, 0)
    return np.asarray((learnt_BT[..., None] == np.arange(1, segments + 1)).any(axis=1))


def _first(batch: Batch, segments: int, most: int) -> tuple[Batch, int]:
    """The batch with targets of its first ``most`` documents alone, and how many it has."""
    there_BS = learnt_documents(batch, segments)
    number_BS = there_BS.cumsum().reshape(there_BS.shape)
    count = int(there_BS.sum())
    if count <= most:
        return batch, count
    kept_BS = np.pad(number_BS <= most, ((0, 0), (1, 0)))  # segment 0 is padding
    kept_BT = np.take_along_axis(kept_BS, np.asarray(batch.segment_ids_BT), axis=1)
    return batch._replace(loss_mask_BT=batch.loss_mask_BT & kept_BT), most


def text_batch(text: str, tokenizer: TokenizerWrapper, row_length: int) -> Batch:
    """One text as a row of its own, cut at the row's end.

    Raises:
        DataError: it has fewer than two tokens, so nothing to predict.
    """
    tokens = np.asarray(tokenizer.encode(text), np.int32)[:row_length]
    if len(tokens) < 2:
        raise DataError(f"query text {text[:40]!r} has {len(tokens)} tokens; the least is 2")
    grid = np.zeros((4, 1, row_length), np.int32)
    grid[0, 0, : len(tokens)] = tokens
    grid[1, 0, : len(tokens) - 1] = tokens[1:]
    grid[2, 0, : len(tokens)] = 1
    grid[3, 0, : len(tokens)] = np.arange(len(tokens))
    mask = np.arange(row_length)[None] < len(tokens) - 1
    return Batch(grid[0], grid[1], mask, grid[2], grid[3], np.full(1, -1, np.int32))
