"""The loaders of `dh_jax.data` for torch trainers: the same rows, in Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from dh_jax.batch import Batch, Origins
from dh_jax.config import DataConfig
from dh_jax.data import loader as data

IGNORED = -100  # the label that torch's cross_entropy ignores by default

TorchBatch = dict[str, torch.Tensor]


def get_loader(config: str | Path | DataConfig | Mapping[str, Any], **options: Any) -> TorchLoader:
    """`dh_jax.data.loader.get_loader`, yielding torch tensors on the CPU.

    Args:
        config: a shipped name, a YAML file, a mapping, or a `DataConfig`.
        **options: those of the JAX loader; ``shard`` is (data-parallel rank, size).

    Returns:
        An iterator of batches as `as_torch` describes them, with the weights, statistics and
        state of the loader below it. Loading initialises no JAX backend.
    """
    return TorchLoader(data.get_loader(config, **options), options.get("shard", (0, 1)))


def as_torch(batch: Batch) -> TorchBatch:
    """A NumPy `Batch` in Hugging Face's conventions, B rows of T tokens.

    Returns:
        ``input_ids``, ``position_ids`` (from 0 in every document) and ``segment_ids`` (1, 2, ...;
        0 = padding), all int32 ``[B, T]`` sharing memory with the batch; ``source_ids`` int32
        ``[B]``, likewise; ``shift_labels`` int64 ``[B, T]``, the target of each position, and
        ``labels`` int64 ``[B, T]``, the same one place to the right, both -100 where nothing is
        learnt. Labels are the one copy: torch's losses refuse int32. Plain ``labels`` cannot
        hold the last target of a document that goes on in another row; ``shift_labels`` does.
    """
    targets_BT = np.where(batch.loss_mask_BT, batch.targets_BT, IGNORED).astype(np.int64)
    labels_BT = np.full_like(targets_BT, IGNORED)
    labels_BT[:, 1:] = targets_BT[:, :-1]
    # A split document's last target would otherwise land on the next document's first token.
    labels_BT[batch.positions_BT == 0] = IGNORED
    return {
        "input_ids": torch.from_numpy(batch.tokens_BT),
        "labels": torch.from_numpy(labels_BT),
        "shift_labels": torch.from_numpy(targets_BT),
        "position_ids": torch.from_numpy(batch.positions_BT),
        "segment_ids": torch.from_numpy(batch.segment_ids_BT),
        "source_ids": torch.from_numpy(batch.source_ids_B),
    }


def document_mask(segment_ids_BT: torch.Tensor) -> torch.Tensor:
    """Attention to earlier tokens of the same document, bool ``[B, 1, T, T]``, True = may see.

    For `scaled_dot_product_attention`, and so for a Hugging Face model with
    ``attn_implementation="sdpa"``; ``"eager"`` adds masks to scores and needs the same as floats.
    Padding is segment 0 and sees padding only, so no row is empty.
    """
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return same_BTT.tril()[:, None]


class TorchLoader:
    """An iterator of torch batches over a `dh_jax` loader; a context manager."""

    def __init__(self, loader: data.Loader, shard: tuple[int, int] = (0, 1)):
        self._loader = loader
        self.shard = shard  # (data-parallel rank, size)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TorchBatch:
        return as_torch(next(self._loader))

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

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state behind the last delivered batch."""
        return self._loader.get_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind the batch that was delivered last when the state was taken."""
        self._loader.set_state(state)

    def close(self) -> None:
        self._loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
