"""get_loader: from a data config to batches. The only file that knows the whole order:
sources -> tokens -> rows -> mixture -> batches, prefetched on the host as NumPy arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dh_jax.config import (
    SPLITS,
    TOKEN_SOURCES,
    DataConfig,
    SourceConfig,
    decisive_spec,
    load_data_config,
    weights_of,
)
from dh_jax.data.datasets.pretrain import PretrainDataset
from dh_jax.data.delivery import Join, Loader
from dh_jax.data.held_out import gives_way, held_elsewhere
from dh_jax.data.mixing import MixedDataset
from dh_jax.data.prepare import open_prepared
from dh_jax.data.store import StoredDocuments, TokenStore
from dh_jax.data.stores.token_sources import open_token_source
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError

__all__ = ["Loader", "get_loader"]


def get_loader(
    config: str | Path | DataConfig | Mapping[str, Any],
    *,
    tokenizer: TokenizerWrapper | str | Path | None = None,
    batch_size: int,
    max_length: int | None = None,
    split: str = "train",
    seed: int | None = None,
    shard: tuple[int, int] = (0, 1),
    sources: list[str] | None = None,
    weights: Mapping[str, float] | None = None,
    shuffle: bool | None = None,
    repeat: bool | None = None,
    prefetch: int | None = None,
    join: Join | None = None,
    unlearnt: int | None = None,
) -> Loader:
    """Batches of a data config: packed, mixed, resumable, with weights that may change.

    Args:
        config: a shipped name (``"mixed_pretrain"``), a YAML file, a mapping, or a `DataConfig`.
        tokenizer: anything `TokenizerWrapper.wrap` takes; default ``config.tokenizer``.
        batch_size: rows of the *global* batch; each of ``shard[1]`` hosts gets its equal part.
        max_length: T, tokens of a row; default ``config.max_length``.
        split: ``train``, ``probe`` or ``eval``. ``probe`` yields the config's probe sets.
        seed: of order and packing; default ``config.seed``.
        shard: (index, count) of this host.
        sources: only these; their weights are scaled to sum to 1.
        weights: instead of the config's, for the sources named.
        shuffle, repeat: default True for train, False for probe and eval (one pass, in order).
        prefetch: batches made ahead by a background thread; default ``config.prefetch``.
        join: ``(batch, origins) -> batch``, for every batch that is made; `CachedTeacher.join`
            gives batches their teacher.
        unlearnt: targets are int64, and this number where nothing is learnt, as torch's losses
            take them; default: int32.

    Raises:
        ConfigError: the config or an argument is wrong.
        DataError: a source or the store cannot be read.
        StateError: the store belongs to another tokenizer or pipeline.
    """
    config = as_prepared = load_data_config(config)
    if max_length is not None:
        config = load_data_config(dataclasses.replace(config, max_length=max_length))
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    index, count = shard
    if not 0 <= index < count or batch_size < 1 or batch_size % count:
        raise ConfigError(
            f"batch_size {batch_size} over shard {shard}: the size must be a positive multiple "
            "of the number of shards, and the index below it"
        )
    training = split == "train"
    shuffle = training if shuffle is None else shuffle
    repeat = training if repeat is None else repeat
    seed = config.seed if seed is None else seed
    wrapper = TokenizerWrapper.wrap(
        tokenizer or config.tokenizer, add_bos=config.add_bos, add_eos=config.add_eos
    )
    chosen = _chosen(config, split, sources)
    store = None
    if config.store is not None:
        store = open_prepared(as_prepared, wrapper)
    stored = {
        name: _stored(source, spec, config, split, store) for name, (source, spec) in chosen.items()
    }
    at_random = all(documents is not None for documents in stored.values())
    if count > 1 and not at_random and any(documents is not None for documents in stored.values()):
        raise ConfigError(
            f"{count} hosts cannot mix streamed sources with token stores read in place; "
            "prepare the streamed ones first (`dh prepare`, data.store=...)"
        )
    held = {} if at_random else held_elsewhere(config, split, {n for n, _ in chosen.values()})
    rows = {
        name: PretrainDataset(
            source,
            spec,
            config,
            tokenizer=wrapper,
            documents=stored[name],
            split=split,
            seed=seed,
            shuffle=shuffle,
            repeat=repeat,
            shard=shard,
            held_out=held.get(source, frozenset()),
            gives_way=gives_way(config, spec),
        )
        for name, (source, spec) in chosen.items()
    }
    mixture = MixedDataset(
        rows,
        _weights(config, split, chosen, weights),
        row_length=config.max_length,
        unit=config.weight_unit,
        exhausted=config.exhausted,
    )
    return Loader(
        iter(mixture),
        config,
        wrapper,
        batch_size=batch_size,
        # Rows of stores are planned alike on every host, which keeps its part of each batch;
        # streamed documents are dealt out to hosts at the source.
        shard=shard if at_random else (0, 1),
        drawn=batch_size if at_random else batch_size // count,
        prefetch=config.prefetch if prefetch is None else prefetch,
        identity={
            "tokenizer": wrapper.fingerprint,
            "row_length": config.max_length,
            "packing": dataclasses.asdict(config.packing),
            "unit": config.weight_unit,
            "stored": at_random,
            "split": split,
            "seed": seed,
            "sources": {n: _fingerprint(*source, config, wrapper) for n, source in chosen.items()},
            "stores": {n: part.fingerprint for n, part in stored.items() if part is not None},
        },
        join=join,
        unlearnt=unlearnt,
    )


def _fingerprint(
    name: str, spec: SourceConfig, config: DataConfig, tokenizer: TokenizerWrapper
) -> str:
    """Hash of what decides which documents a source yields."""
    content: list[Any] = [name, decisive_spec(spec)]
    content += [dataclasses.asdict(config.splits), config.on_error]
    if spec.text.conversation:
        content += [tokenizer.chat_template, tokenizer.special_tokens]
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _stored(
    name: str, spec: SourceConfig, config: DataConfig, split: str, store: TokenStore | None
) -> StoredDocuments | None:
    """A source's documents where they can be read at random; None where they are streamed."""
    if isinstance(spec, TOKEN_SOURCES):
        return open_token_source(spec, split, config.splits)
    return None if store is None else store.documents(name, split)


def _chosen(
    config: DataConfig, split: str, names: list[str] | None
) -> dict[str, tuple[str, SourceConfig]]:
    """Name -> (source it reads, its spec). A probe may be the probe split of a source."""
    if split == "probe" and config.probes:
        known = {
            name: (spec, config.sources[spec]) if isinstance(spec, str) else (name, spec)
            for name, spec in config.probes.items()
        }
    else:
        known = {name: (name, spec) for name, spec in config.sources.items()}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"no {split} source {name!r}; known: {', '.join(known)}")
    return {name: known[name] for name in names} if names else known


def _weights(
    config: DataConfig,
    split: str,
    chosen: Mapping[str, Any],
    given: Mapping[str, float] | None,
) -> dict[str, float]:
    if given is not None:
        return dict(given)
    if split == "probe" and config.probes:
        return dict.fromkeys(chosen, 1.0 / len(chosen))
    weights = {name: w for name, w in weights_of(config.sources).items() if name in chosen}
    if len(weights) == 1:  # one source alone, also one of weight 0
        return dict.fromkeys(weights, 1.0)
    return weights
