"""get_loader: from a data config to batches. The only file that knows the whole order:
sources -> tokens -> rows -> mixture -> batches, prefetched on the host as NumPy arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from dh_jax.batch import Batch, Origins
from dh_jax.config import SPLITS, DataConfig, SourceConfig, load_data_config, weights_of
from dh_jax.data.batching import MixedRow, assemble
from dh_jax.data.datasets.pretrain import PretrainDataset
from dh_jax.data.mixing import MixedDataset, MixedIterator
from dh_jax.data.prepare import pipeline_fingerprint, text_sources
from dh_jax.data.sources import DocumentSource
from dh_jax.data.store import open_store
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, StateError

SCHEMA = 1


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

    Raises:
        ConfigError: the config or an argument is wrong.
        DataError: a source or the store cannot be read.
        StateError: the store belongs to another tokenizer or pipeline.
    """
    config = load_data_config(config)
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
        store = open_store(
            config.store, tokenizer=wrapper.fingerprint, pipeline=pipeline_fingerprint(config)
        )
    held_out = _held_out(config) if training and store is None else frozenset()
    rows = {
        name: PretrainDataset(
            source,
            spec,
            config,
            tokenizer=wrapper,
            store=store,
            split=split,
            seed=seed,
            shuffle=shuffle,
            repeat=repeat,
            shard=shard,
            held_out=held_out,
        )
        for name, (source, spec) in chosen.items()
    }
    mixture = MixedDataset(
        rows,
        _weights(config, split, chosen, weights),
        row_length=config.max_length,
        unit=config.weight_unit,
    )
    return Loader(
        iter(mixture),
        config,
        wrapper,
        batch_size=batch_size,
        # Rows of a store are planned alike on every host, which keeps its part of each batch;
        # streamed documents are dealt out to hosts at the source.
        shard=shard if store is not None else (0, 1),
        drawn=batch_size if store is not None else batch_size // count,
        prefetch=config.prefetch if prefetch is None else prefetch,
    )


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


def _held_out(config: DataConfig) -> frozenset[int]:
    """Ids of documents in sets that are held out whole (read once, at the start)."""
    ids: set[int] = set()
    for name, spec in text_sources(config).items():
        if spec.split in ("probe", "eval"):
            documents = DocumentSource(
                name,
                spec,
                split=spec.split,
                splits=config.splits,
                shuffle=False,
                on_error=config.on_error,
            )
            ids.update(document.id for document in documents)
    return frozenset(ids)


class _Made(NamedTuple):
    batch: Batch
    origins: Origins
    fill: int  # tokens in the batch's rows
    state: dict[str, Any]  # of the mixture behind this batch


class Loader:
    """An iterator of `Batch` (NumPy). Made by `get_loader`; a context manager.

    What prefetching has made but not delivered is never lost: saving and changing weights both
    start from the last batch *delivered*.
    """

    def __init__(
        self,
        mixture: MixedIterator,
        config: DataConfig,
        tokenizer: TokenizerWrapper,
        *,
        batch_size: int,
        shard: tuple[int, int],
        drawn: int,
        prefetch: int,
    ):
        self.config, self.tokenizer, self.batch_size = config, tokenizer, batch_size
        self.row_length = config.max_length
        self._mixture, self._drawn, self._shard = mixture, drawn, shard
        self._prefetch = prefetch
        self._worker = ThreadPoolExecutor(1, "dh-loader") if prefetch else None
        self._ahead: deque[Future[_Made | None]] = deque()
        self._delivered_state = mixture.get_state()
        self._weights = mixture.weights
        self._batches = 0
        self._fill = 0
        self._origins: Origins | None = None

    # --- iterating ---

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            if self._worker is None:
                made = self._make()
            else:
                while len(self._ahead) <= self._prefetch:
                    self._ahead.append(self._worker.submit(self._make))
                made = self._ahead.popleft().result()
        except BaseException:  # also Ctrl-C: what was drawn and not delivered must come again
            self._take_back()
            raise
        if made is None:
            raise StopIteration
        self._batches += 1
        self._fill += made.fill
        self._delivered_state, self._origins = made.state, made.origins
        return made.batch

    def _make(self) -> _Made | None:
        """Draw and materialise the next batch; None at the end of the data."""
        rows: list[MixedRow] = []
        while len(rows) < self._drawn:
            row = next(self._mixture, None)
            if row is None:
                break
            rows.append(row)
        if not rows:
            return None
        state = self._mixture.get_state()
        index, count = self._shard
        size = self._drawn // count
        batch, origins = assemble(
            rows[index * size : (index + 1) * size],
            size,
            self.row_length,
            self.config.packing.max_segments,
        )
        return _Made(batch, origins, int(origins.lengths_BS.sum()), state)

    @property
    def origins(self) -> Origins:
        """Documents of the batch delivered last.

        Raises:
            StateError: no batch was delivered yet.
        """
        if self._origins is None:
            raise StateError("no batch was delivered yet; origins describe the last one")
        return self._origins

    # --- weights ---

    @property
    def names(self) -> tuple[str, ...]:
        """Source names; ``Batch.source_ids_B`` indexes them."""
        return self._mixture.names

    @property
    def weights(self) -> dict[str, float]:
        """Mixture weights in force for the next batch."""
        return dict(self._weights)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the mixture from the first batch not yet delivered on.

        Batches made ahead under the old weights are taken back and their rows dealt again, so
        nothing is lost or repeated.

        Raises:
            ConfigError: a weight is negative, not finite, or of an unknown source.
        """
        self._take_back()
        self._mixture.set_weights(weights)
        self._weights = self._mixture.weights
        self._delivered_state = self._mixture.get_state()

    def _take_back(self) -> None:
        """Return the mixture to where the last delivered batch left it."""
        for future in self._ahead:
            if not future.cancel():
                future.exception()  # wait; an error will come again when the batch is due
        self._ahead.clear()
        self._mixture.set_state(self._delivered_state)

    # --- state ---

    def get_state(self) -> dict[str, Any]:
        """JSON-able state behind the last delivered batch."""
        return {
            "schema": SCHEMA,
            "batches": self._batches,
            "fill": self._fill,
            "identity": self._identity(),
            "mixture": self._delivered_state,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue behind the batch that was delivered last when ``state`` was taken.

        Raises:
            StateError: the state is of another tokenizer, row length, packing or sources.
        """
        if state.get("schema") != SCHEMA:
            raise StateError(f"loader state has schema {state.get('schema')}, expected {SCHEMA}")
        for key, value in self._identity().items():
            saved = state["identity"].get(key)
            if saved != value:
                raise StateError(
                    f"loader state was saved with {key} {saved}, this loader has {value}; "
                    "resume with the same value or start a new run"
                )
        self._delivered_state = dict(state["mixture"])
        self._take_back()
        self._weights = self._mixture.weights
        self._batches, self._fill = int(state["batches"]), int(state["fill"])
        self._origins = None

    def _identity(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "pipeline": pipeline_fingerprint(self.config),
            "row_length": self.row_length,
            "packing": dataclasses.asdict(self.config.packing),
            "unit": self.config.weight_unit,
            "stored": self.config.store is not None,
        }

    # --- reporting ---

    def stats(self) -> dict[str, Any]:
        """What was delivered: batches, fill of the rows, and for each source its weight,
        rows, tokens, share of tokens, truncated tokens, and documents skipped by reason."""
        state = self._delivered_state
        total = sum(part["tokens"] for part in state.values())
        local = self._drawn // self._shard[1]
        capacity = self._batches * local * self.row_length
        sources = {}
        for name, part in state.items():
            windows = part["source"]["window"]
            sources[name] = {
                "weight": part["weight"],
                "rows": part["rows"],
                "tokens": part["tokens"],
                "share": part["tokens"] / total if total else math.nan,
                "truncated_tokens": part["truncated"],
                "epoch": windows["epoch"],
                "skipped": self._mixture.skipped(name),
            }
        return {
            "batches": self._batches,
            "tokens": total,
            "packing_efficiency": self._fill / capacity if capacity else math.nan,
            "sources": sources,
        }

    # --- closing ---

    def close(self) -> None:
        """Stop prefetching and close files. Idempotent."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self._mixture.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
