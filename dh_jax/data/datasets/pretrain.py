"""PretrainDataset: one source of plain text -> packed rows, from a store or as a stream."""

from __future__ import annotations

from functools import partial

import grain

from dh_jax.config import DataConfig, SourceConfig
from dh_jax.data.packing import PackedDataset, Window, leaves
from dh_jax.data.seeding import derive
from dh_jax.data.sources import DocumentSource
from dh_jax.data.store import StoredDocuments
from dh_jax.data.text.encoding import make_encoder
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.data.windows import StoreWindows, StreamWindows


class PretrainDataset(PackedDataset):
    """Rows of T tokens of one source and split; a Grain data set like any other.

    Args:
        name: the source's name; part of its seed.
        spec: where its documents are.
        config: row length, packing, splits, error policy and seed.
        tokenizer: used when streaming.
        documents: prepared ones to read instead of streaming; see `TokenStore.documents`.
        split: train, probe or eval.
        seed: orders documents and rows; epochs differ by themselves.
        shuffle: False keeps the documents' order (evaluation).
        repeat: start the next epoch when one ends, up to the source's ``max_epochs``.
        shard: (index, count) of documents when streaming. Rows from a store are planned
            whole on every host; the loader keeps its own rows.
        held_out: document ids that must not appear when streaming.
        gives_way: leave out of a stream what a source split by content would hold out.
    """

    def __init__(
        self,
        name: str,
        spec: SourceConfig,
        config: DataConfig,
        *,
        tokenizer: TokenizerWrapper,
        documents: StoredDocuments | None = None,
        split: str = "train",
        seed: int = 0,
        shuffle: bool = True,
        repeat: bool = True,
        shard: tuple[int, int] = (0, 1),
        held_out: frozenset[int] = frozenset(),
        gives_way: bool = False,
    ):
        own_seed = derive(seed, name, split)
        epochs = spec.max_epochs if repeat else 1
        size = config.packing.window - leaves(config.packing)  # room for what one leaves the next
        windows: grain.IterDataset[Window]
        if documents is not None:
            windows = StoreWindows(
                documents,
                size,
                seed=own_seed,
                shuffle=shuffle,
                epochs=epochs,
            )
        else:
            open_epoch = partial(_open_epoch, name, spec, split, config, own_seed, shard, shuffle)
            windows = StreamWindows(
                name,
                open_epoch,
                make_encoder(spec, config, tokenizer),
                size,
                seed=own_seed,
                epochs=epochs,
                held_out=held_out,
                gives_way=config.splits if gives_way else None,
                on_error=config.on_error,
            )
        super().__init__(windows, config.max_length, config.packing, shuffle=shuffle)


def _open_epoch(
    name: str,
    spec: SourceConfig,
    split: str,
    config: DataConfig,
    seed: int,
    shard: tuple[int, int],
    shuffle: bool,
    epoch: int,
) -> DocumentSource:
    return DocumentSource(
        name,
        spec,
        split=split,
        splits=config.splits,
        seed=seed,
        epoch=epoch,
        shard=shard,
        shuffle=shuffle,
        on_error=config.on_error,
    )
