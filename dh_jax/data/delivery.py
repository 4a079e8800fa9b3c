"""Delivery: a mixture's rows as batches, made ahead and handed out once.

What prefetching has made but not delivered is never lost: saving and changing weights both
start from the last batch *delivered*.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

from dh_jax.batch import Batch, Origins
from dh_jax.config import DataConfig
from dh_jax.data.batching import assemble
from dh_jax.data.mixing import MixedIterator, Snapshot
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import StateError

SCHEMA = 3


# Adds to a batch what is known of its pieces of documents, in the thread that makes batches.
Join: TypeAlias = Callable[[Batch, Origins], Batch]


class _Made(NamedTuple):
    batch: Batch
    origins: Origins
    fill: int  # tokens in the batch's rows
    behind: Snapshot  # the mixture behind this batch


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
        identity: Mapping[str, Any],
        join: Join | None = None,
        unlearnt: int | None = None,
    ):
        self.config, self.tokenizer, self.batch_size = config, tokenizer, batch_size
        self.row_length = config.max_length
        self._mixture, self._drawn, self._shard = mixture, drawn, shard
        self._prefetch, self._identity, self._join = prefetch, identity, join
        self._unlearnt = unlearnt
        self._worker = ThreadPoolExecutor(1, "dh-loader") if prefetch else None
        self._ahead: deque[Future[_Made | Snapshot]] = deque()
        self._delivered = mixture.snapshot()
        self._batches = 0
        self._fill = self._capacity = 0  # tokens delivered, and how many there was room for
        self._origins: Origins | None = None

    # --- iterating ---

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            if self._worker is None:
                made = self._make()
            else:
                if self._ahead and self._ahead[0].cancelled():  # a second Ctrl-C broke off the
                    self._take_back()  # taking back after the first
                while len(self._ahead) <= self._prefetch:
                    self._ahead.append(self._worker.submit(self._make))
                made = self._ahead[0].result()
                self._ahead.popleft()  # only now: what is not in it is not taken back
        except BaseException:  # also Ctrl-C: what was drawn and not delivered must come again
            self._take_back()
            raise
        if isinstance(made, Snapshot):  # the end; behind the last row more may have been left out
            self._delivered = self._delivered._replace(sources=made.sources)
            raise StopIteration
        self._batches += 1
        self._fill += made.fill
        self._capacity += self._drawn // self._shard[1] * self.row_length
        self._delivered, self._origins = made.behind, made.origins
        return made.batch

    def _make(self) -> _Made | Snapshot:
        """Draw and materialise the next batch; where the mixture stands at the end of the data."""
        rows = self._mixture.draw(self._drawn)
        behind = self._mixture.snapshot()
        if not rows:
            return behind
        index, count = self._shard
        size = self._drawn // count
        batch, origins = assemble(
            rows[index * size : (index + 1) * size],
            size,
            self.row_length,
            self.config.packing.max_segments,
            self._unlearnt,
        )
        if self._join is not None:
            batch = self._join(batch, origins)
        return _Made(batch, origins, int(origins.lengths_BS.sum()), behind)

    @property
    def origins(self) -> Origins:
        """Documents of the batch delivered last.

        Raises:
            StateError: no batch was delivered yet.
        """
        if self._origins is None:
            raise StateError("no batch was delivered yet; origins describe the last one")
        return self._origins

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which rows come, fit for JSON: tokenizer, row length, packing, seed, for
        each source a hash of what decides its documents, and of those that a store holds."""
        return dict(self._identity)

    @property
    def streamed(self) -> bool:
        """Whether documents are dealt out to hosts at the source, so that states and counts are
        of this host's rows alone."""
        return not self._identity["stored"]

    # --- weights ---

    @property
    def names(self) -> tuple[str, ...]:
        """Source names; ``Batch.source_ids_B`` indexes them."""
        return self._mixture.names

    @property
    def weights(self) -> dict[str, float]:
        """Mixture weights in force for the next batch; 0 for a source that has run dry."""
        return dict(zip(self.names, self._delivered.weights_M.tolist(), strict=True))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the mixture from the first batch not yet delivered on.

        Batches made ahead under the old weights are taken back and their rows dealt again, so
        nothing is lost or repeated.

        Raises:
            ConfigError: a weight is negative, not finite, or of an unknown source.
        """
        self._take_back()
        self._mixture.set_weights(weights)
        self._delivered = self._mixture.snapshot()

    def _take_back(self) -> None:
        """Return the mixture to where the last delivered batch left it."""
        for future in self._ahead:
            if not future.cancel():
                future.exception()  # wait; an error will come again when the batch is due
        self._ahead.clear()
        self._mixture.restore(self._delivered)

    # --- state ---

    def get_state(self) -> dict[str, Any]:
        """JSON-able state behind the last delivered batch."""
        return {
            "schema": SCHEMA,
            "batches": self._batches,
            "fill": self._fill,
            "capacity": self._capacity,
            "identity": self._identity,
            "mixture": self._mixture.describe(self._delivered),
        }

    def set_state(self, state: Mapping[str, Any], *, changed_sources: bool = False) -> None:
        """Continue behind the batch that was delivered last when ``state`` was taken.

        A state of a prepared store fits any number of hosts and any batch size: the order of
        rows knows neither.

        Args:
            state: from `get_state`, perhaps by way of JSON.
            changed_sources: sources may have been added or removed since. Those that are in both
                go on where they stood, new ones begin at their beginning, and the weights are
                this loader's. False refuses another set of sources.

        Raises:
            StateError: the state is of another tokenizer, row length, packing or source.
        """
        if state.get("schema") != SCHEMA:
            raise StateError(
                f"loader state has schema {state.get('schema')}, expected {SCHEMA}; go on with the "
                "version that saved it, or start a new run"
            )
        saved, ours = dict(state["identity"]), dict(self._identity)
        theirs, mine = saved.pop("sources"), ours.pop("sources")
        their_stores, my_stores = saved.pop("stores"), ours.pop("stores")
        for key, value in ours.items():
            if saved.get(key) != value:
                raise StateError(_other(key, saved.get(key), value))
        for name in theirs.keys() & mine.keys():
            if theirs[name] != mine[name]:
                raise StateError(_other(f"source {name!r}", theirs[name], mine[name]))
            if their_stores.get(name) != my_stores.get(name):
                stores = their_stores.get(name), my_stores.get(name)
                raise StateError(_other(f"a store of source {name!r} with content", *stores))
        if not changed_sources and theirs.keys() != mine.keys():
            raise StateError(
                f"the state is of sources {', '.join(theirs)}, this loader has {', '.join(mine)}; "
                "resume with the sources it was saved with, or pass changed_sources=True"
            )
        self._take_back()
        weights = self._mixture.weights
        kept = {name: part for name, part in state["mixture"].items() if name in mine}
        self._mixture.set_state(self._mixture.get_state() | kept)
        if theirs.keys() != mine.keys():
            self._mixture.set_weights(weights)
        self._delivered = self._mixture.snapshot()
        self._batches = int(state["batches"])
        self._fill, self._capacity = int(state["fill"]), int(state["capacity"])
        self._origins = None

    # --- reporting ---

    def stats(self) -> dict[str, Any]:
        """What was delivered: batches, fill of the rows, and for each source its weight,
        rows, tokens, share of tokens, truncated tokens, and documents skipped by reason."""
        state = self._mixture.describe(self._delivered)
        total = sum(part["tokens"] for part in state.values())
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
                "skipped": part["source"]["skipped"],
            }
        return {
            "batches": self._batches,
            "tokens": total,
            "packing_efficiency": self._fill / self._capacity if self._capacity else math.nan,
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


def _other(what: str, saved: Any, ours: Any) -> str:
    return (
        f"loader state was saved with {what} {saved}, this loader has {ours}; "
        "resume with the same value or start a new run"
    )
