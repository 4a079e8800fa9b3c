"""The loaders of `dh_jax.data` for torch trainers: the same rows, in Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, IterableDataset

from dh_jax.batch import Batch, Origins, TopKLogits
from dh_jax.config import DataConfig, suggest
from dh_jax.data import loader as data
from dh_jax.errors import ConfigError, StateError
from dh_torch_bridge.copies import COPIED
from dh_torch_bridge.labels import IGNORED, plain_labels, shifted_labels

TorchBatch = dict[str, Any]  # tensors, and max_seqlen as a number


# What a batch has by default, and what else it can be asked for.
COLUMNS = ("input_ids", "labels", "shift_labels", "position_ids", "segment_ids", "source_ids")
MORE_COLUMNS = ("attention_mask", "cu_seqlens", "max_seqlen")
SHARED = {  # columns that are a batch's own memory
    "input_ids": "tokens_BT",
    "position_ids": "positions_BT",
    "segment_ids": "segment_ids_BT",
    "source_ids": "source_ids_B",
}


def get_loader(
    config: str | Path | DataConfig | Mapping[str, Any],
    *,
    columns: Sequence[str] = COLUMNS,
    pin_memory: bool | None = None,
    **options: Any,
) -> TorchLoader:
    """`dh_jax.data.loader.get_loader`, yielding torch tensors on the CPU.

    Args:
        config: a shipped name, a YAML file, a mapping, or a `DataConfig`.
        columns: what batches hold, of `COLUMNS` and `MORE_COLUMNS`; see `as_torch`.
        pin_memory: copy batches into pinned memory, for transfers to a GPU beside its work;
            default: where there is a GPU.
        **options: those of the JAX loader; ``shard`` is (data-parallel rank, size).

    Returns:
        An iterator of batches as `as_torch` describes them, with the weights, statistics and
        state of the loader below it. Loading initialises no JAX backend.

    Raises:
        ConfigError: a column is unknown; else as the JAX loader.
    """
    known = (*COLUMNS, *MORE_COLUMNS)
    for name in columns:
        if name not in known:
            raise ConfigError(
                f"no column {name!r}{suggest(name, list(known))}; known: {', '.join(known)}"
            )
    pinned = torch.cuda.is_available() if pin_memory is None else pin_memory
    learns = {"labels", "shift_labels"} & set(columns)
    below = data.get_loader(config, unlearnt=IGNORED if learns else None, **options)
    return TorchLoader(below, options.get("shard", (0, 1)), tuple(columns), pinned)


def as_torch(batch: Batch, columns: Sequence[str] = COLUMNS) -> TorchBatch:
    """A NumPy `Batch` in Hugging Face's conventions, B rows of T tokens.

    ==============  ========================================================================
    input_ids       int32 ``[B, T]``, the batch's own memory
    position_ids    int32 ``[B, T]``, from 0 in every document; likewise
    segment_ids     int32 ``[B, T]``, 1, 2, ... along a row, 0 = padding; likewise
    source_ids      int32 ``[B]``, numbers of `TorchLoader.names`; likewise
    shift_labels    int64 ``[B, T]``, the target of each position; -100: nothing is learnt;
                    likewise
    labels          int64 ``[B, T]``, the same one place to the right, as transformers has it
    attention_mask  bool ``[B, 1, T, T]``, of `document_mask`
    cu_seqlens      int32 ``[N + 1]``, where the documents of all rows, laid end to end, begin
                    and end; the padding of a row is one more. For kernels of variable length
    max_seqlen      int, the longest of them
    teacher         `TopKLogits` of tensors, for `dh_torch_bridge.distillation`; there where the
                    loader has a ``join`` of `CachedTeacher`
    ==============  ========================================================================

    Rows are assembled with ``shift_labels`` in int64, since torch's losses refuse int32; ``labels``
    are the one copy (counted in `COPIED` under ``labels``), and ``shift_labels`` too of a batch
    that a JAX loader has made.
    Plain ``labels`` cannot hold the last target of a document that goes on in another row;
    ``shift_labels`` does.
    """
    made: TorchBatch = {
        name: torch.from_numpy(getattr(batch, field))
        for name, field in SHARED.items()
        if name in columns
    }
    if "shift_labels" in columns or "labels" in columns:
        shifted_BT = batch.targets_BT
        if shifted_BT.itemsize < 8:  # not of a loader that was asked for int64
            shifted_BT = shifted_labels(batch.targets_BT, batch.loss_mask_BT)
            COPIED["labels"] += shifted_BT.nbytes
        made["shift_labels"] = torch.from_numpy(shifted_BT)
    if "labels" in columns:
        labels_BT = plain_labels(shifted_BT, batch.positions_BT)
        made["labels"] = torch.from_numpy(labels_BT)
        COPIED["labels"] += labels_BT.nbytes
    segments = batch.segment_ids_BT
    if "attention_mask" in columns:
        made["attention_mask"] = document_mask(torch.from_numpy(segments))
    if "cu_seqlens" in columns or "max_seqlen" in columns:
        made["cu_seqlens"] = document_bounds(torch.from_numpy(segments))
        made["max_seqlen"] = int(made["cu_seqlens"].diff().max())
    found = {name: made[name] for name in columns}
    if batch.teacher is not None:
        found["teacher"] = TopKLogits(*map(torch.from_numpy, batch.teacher))
    return found


def document_bounds(segment_ids_BT: torch.Tensor) -> torch.Tensor:
    """``cu_seqlens``: int32 ``[N + 1]`` ends of documents (and paddings) in ``B * T`` tokens."""
    first_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    first_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts_N = first_BT.flatten().nonzero()[:, 0]
    return torch.cat([starts_N, starts_N.new_tensor([first_BT.numel()])]).int()


def document_mask(segment_ids_BT: torch.Tensor) -> torch.Tensor:
    """Attention to earlier tokens of the same document, bool ``[B, 1, T, T]``, True = may see.

    For `scaled_dot_product_attention`, and so for a Hugging Face model with
    ``attn_implementation="sdpa"``; ``"eager"`` adds masks to scores and needs the same as floats.
    Padding is segment 0 and sees padding only, so no row is empty.
    """
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return same_BTT.tril()[:, None]


REMEMBERED = 8  # states of the newest batches that an `as_dataloader` has given


class TorchLoader:
    """An iterator of torch batches over a `dh_jax` loader; a context manager."""

    def __init__(
        self,
        loader: data.Loader,
        shard: tuple[int, int] = (0, 1),
        columns: tuple[str, ...] = COLUMNS,
        pin_memory: bool = False,
    ):
        self._loader = loader
        self.shard = shard  # (data-parallel rank, size)
        self._columns, self._pinned = columns, pin_memory
        self._states: dict[int, dict[str, Any]] = {}  # behind each of the newest, by number

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TorchBatch:
        batch = as_torch(next(self._loader), self._columns)
        if self._pinned:
            for name, x in batch.items():
                if isinstance(x, torch.Tensor):
                    batch[name] = x.pin_memory()
                    COPIED["pinned"] += x.nbytes
        return batch

    def as_dataloader(self) -> DataLoader[TorchBatch]:
        """This loader in a `torch.utils.data.DataLoader`, for trainers that insist on one.

        It has no workers and gives the same batches, of this rank's rows already. Change weights,
        and save and load states, through the `TorchLoader` itself. accelerate, and so
        `transformers.Trainer`, fetches a batch before it gives the last one to the model: weights
        take force one batch later, and `state_dict` must be told how many were trained on.
        """
        return DataLoader(_Batches(self), batch_size=None)

    @property
    def names(self) -> tuple[str, ...]:
        """Source names; ``source_ids`` indexes them."""
        return self._loader.names

    @property
    def origins(self) -> Origins:
        """Documents of the batch delivered last."""
        return self._loader.origins

    @property
    def weights(self) -> dict[str, float]:
        """Mixture weights in force for the next batch."""
        return self._loader.weights

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the mixture from the first batch not yet delivered on."""
        self._loader.set_weights(weights)

    def stats(self) -> dict[str, Any]:
        """Batches, tokens, packing efficiency, and each source's share."""
        return self._loader.stats()

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """JSON-able state behind the last delivered batch.

        Args:
            batches: behind this one instead, counted from 1 over all of the loader's runs, for
                trainers that fetch ahead of an `as_dataloader`.

        Raises:
            StateError: that batch is not of the last few that an `as_dataloader` has given.
        """
        if batches is None:
            return self._loader.get_state()
        if batches not in self._states:
            raise StateError(
                f"no state behind batch {batches} is remembered, only behind "
                f"{', '.join(map(str, self._states)) or 'none'}: those that as_dataloader gave last"
            )
        return self._states[batches]

    def _remember(self) -> None:
        state = self._loader.get_state()
        self._states[state["batches"]] = state
        if len(self._states) > REMEMBERED:
            del self._states[min(self._states)]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind the batch that was delivered last when the state was taken."""
        self._loader.set_state(state)
        self._states.clear()

    def close(self) -> None:
        """Stop prefetching and close files. Idempotent."""
        self._loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Batches(IterableDataset[TorchBatch]):
    def __init__(self, loader: TorchLoader):
        self._loader = loader

    def __iter__(self) -> Iterator[TorchBatch]:
        for batch in self._loader:
            self._loader._remember()
            yield batch
