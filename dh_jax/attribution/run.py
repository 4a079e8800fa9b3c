"""One influence run: from a config to scores on disk, a table and a report.

A run that was stopped, however, goes on when the same command is given again: what was fitted,
the queries and every finished shard are kept, and inputs that changed are refused.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.attribution.config import AttributionConfig, check
from dh_jax.attribution.rows import Rows, learnt_documents, text_batch
from dh_jax.attribution.setup import Model, make_estimator, open_model, with_run
from dh_jax.batch import Batch, checksum
from dh_jax.config import DataConfig, ModelConfig, public_run
from dh_jax.data.loader import Loader, get_loader
from dh_jax.data.seeding import derive
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import DataError
from dh_jax.functions import as_argument
from dh_jax.influence.estimator import Estimator, Prepared, has_target
from dh_jax.influence.objective import NotFinite
from dh_jax.influence.queries import prepare, prepare_means
from dh_jax.influence.score_store import ScoreStore, Shard, open_scores
from dh_jax.influence.streaming import stream
from dh_jax.influence.thin import thinned
from dh_jax.influence.trees import fingerprint
from dh_jax.inspection.rows import document_name

# (what is done, documents done, documents in all); None: not known
Listener = Callable[[str, int, int | None], None]


class Queries(NamedTuple):
    """What is asked: groups of batches, each of which is one query, or many documents."""

    names: list[str]  # of the K queries
    groups: list[list[Batch]]
    documents: int


class Opened(NamedTuple):
    """Everything that scoring needs."""

    config: AttributionConfig
    tokenizer: TokenizerWrapper
    model: Model
    estimator: Estimator
    sources: tuple[str, ...]  # names, as Batch.source_ids_B counts them
    rows: Rows
    queries: Queries
    identity: dict[str, Any]


def open_influence(config: AttributionConfig) -> Opened:
    """Read what a config names, and work out by what its scores will be known.

    Raises:
        ConfigError, DataError, StateError: the config, the data or the model is wrong.
    """
    config = check(with_run(config))
    data = config.data
    tokenizer = TokenizerWrapper.load(data.tokenizer, add_bos=data.add_bos, add_eos=data.add_eos)
    model = open_model(config, tokenizer.vocab_size)
    estimator = make_estimator(config.estimator, model.objective, data.packing.max_segments)

    def training() -> Loader:
        return get_loader(
            data, tokenizer=tokenizer, batch_size=config.batch_size, repeat=False,
            seed=derive(config.seed, "influence", "scored"), prefetch=0,
        )  # fmt: skip

    with training() as loader:
        sources, read = loader.names, loader.get_state()["identity"] | _order(data, loader)
    queries = read_queries(config, tokenizer)
    settings = dataclasses.asdict(config.estimator)
    identity = {
        "model": _model_identity(config.model, model),
        "data": read | {"batch_size": config.batch_size, "documents": config.documents},
        "estimator": settings,
        "self_influence": config.self_influence,
        "versions": versions(),  # other releases round otherwise
        "queries": {
            "names": queries.names,
            "average": config.queries.average,
            "low_rank": config.queries.low_rank,
            "batches": [[checksum(b) for b in group] for group in queries.groups],
        },
    }
    rows = Rows(training, config.documents)
    return Opened(config, tokenizer, model, estimator, sources, rows, queries, identity)


def _model_identity(config: ModelConfig, model: Model) -> dict[str, Any]:
    """What of a model decides its scores: its arrays, and how they are read.

    Where the arrays came from does not, so a folder may move.
    """
    settings = dataclasses.asdict(config)
    for key in ("name", "pretrained", "vocab_size", "init_scale"):
        del settings[key]
    frozen = fingerprint(as_argument(model.objective.loss))  # the base beside adapters
    return {"params": fingerprint(model.params), "frozen": frozen, "config": settings}


def _order(data: DataConfig, loader: Loader) -> dict[str, Any]:
    """What decides which documents of the sources come first, so which are fitted and scored;
    the loader's own identity lets it change, as a run in training may."""
    passes = {name: [x.max_epochs, x.interleave] for name, x in data.sources.items()}
    return {"weights": loader.weights, "exhausted": data.exhausted, "passes": passes}


def read_queries(config: AttributionConfig, tokenizer: TokenizerWrapper) -> Queries:
    """The probes' documents and the texts.

    Raises:
        DataError: a probe has no document, or a text is too short.
    """
    data, asked = config.data, config.queries
    names: list[str] = []
    groups: list[list[Batch]] = []
    segments = data.packing.max_segments
    total = 0
    for name in asked.probes or ([] if asked.texts else list(data.probes or data.sources)):
        rows = Rows(
            lambda name=name: get_loader(  # type: ignore[misc]
                data, tokenizer=tokenizer, batch_size=config.estimator.chunk, split="probe",
                sources=[name], shuffle=True, repeat=False, prefetch=0,
                seed=derive(config.seed, "influence", "queries", name),
            ),
            asked.documents,
        )  # fmt: skip
        group: list[Batch] = []
        places: list[tuple[int, int]] = []  # document and offset of each
        for batch in rows:
            there = np.argwhere(learnt_documents(batch, segments))
            if len(there):
                group.append(batch)
                place = rows.places(there[:, 0], there[:, 1] + 1)
                places += zip(place.document_N.tolist(), place.offset_N.tolist(), strict=True)
        if not places:
            raise DataError(f"probe {name!r} has no document with anything to predict")
        groups.append(group)
        total += len(places)
        names += [name] if asked.average else [f"{name}/{piece_name(*place)}" for place in places]
    for number, text in enumerate(asked.texts, 1):
        groups.append([text_batch(text, tokenizer, data.max_length)])
        names.append(f"text {number}")
        total += 1
    return Queries(numbered(names), groups, total)


def piece_name(document: int, offset: int) -> str:
    """A document's id, and where a piece of it begins that is not the first."""
    return f"{document_name(document)}@{offset}" if offset else document_name(document)


def numbered(names: Sequence[str]) -> list[str]:
    """Names of which no two are alike: a text that a stream has twice is told by a number.

    >>> numbered(["a", "b", "a"])
    ['a', 'b', 'a#2']
    """
    found: Counter[str] = Counter()
    out = []
    for name in names:
        found[name] += 1
        out.append(name if found[name] == 1 else f"{name}#{found[name]}")
    return out


class Done(NamedTuple):
    """Scores on disk, and the queries they are of."""

    store: ScoreStore
    prepared: Prepared
    low_rank_error: list[float] | None  # of each query


def score_documents(opened: Opened, listener: Listener = lambda *_: None) -> Done:
    """Fit, prepare and score what is not on disk yet.

    Raises:
        StateError: the folder holds scores of other inputs; names what changed.
        DataError: a loss, gradient or score is not finite (names batch and document), or a file
            of the store is damaged.
    """
    config, estimator, params = opened.config, opened.estimator, opened.model.params
    key = jax.random.key(derive(config.seed, "influence"))
    store = open_scores(Path(config.out) / "scores", opened.identity)

    def fit() -> Any:
        listener("fitting", 0, None)
        try:
            return estimator.fit(params, _first_batches(opened), key)
        except NotFinite as error:
            raise _naming_document(opened, error) from error

    def queries() -> Prepared:
        listener("preparing queries", 0, None)
        groups = opened.queries.groups
        if config.queries.average:
            return prepare_means(estimator, params, state, groups, key)
        return prepare(estimator, params, state, [b for group in groups for b in group], key)

    def thin() -> dict[str, Any]:
        whole = queries()
        listener("factoring queries", 0, None)
        kernels = estimator.door.kernels if estimator.door else frozenset()
        factors, error_K = thinned(whole, kernels, config.queries.low_rank or 0)
        return {"prepared": factors, "error_K": error_K}

    state = _on_device(store.fitted("fitted", fit))
    lost: list[float] | None = None
    if config.queries.low_rank is None:
        prepared = _on_device(store.fitted("queries", queries))
    else:
        kept = store.fitted("low_rank", thin)
        prepared, lost = _on_device(kept["prepared"]), kept["error_K"].tolist()
    done = 0
    listener("scoring", done, config.documents)
    started = time.perf_counter()

    def scored(index: int) -> str | None:
        nonlocal done
        if not store.path(index).exists():
            return None
        shard = store.read(index)
        done += shard.scores_KN.shape[1]
        listener("scoring", done, config.documents)
        return shard.checksum

    try:
        for found in stream(
            estimator, params, state, prepared, opened.rows, key,
            self_influence=config.self_influence, scored=scored,
        ):  # fmt: skip
            place = opened.rows.places(found.row_N, found.segment_N)
            columns = {
                "document": place.document_N,
                "offset": place.offset_N,
                "tokens": place.tokens_N,
                "targets": found.targets_N,
                "source": found.source_N,
                "row": found.row_N,
                "segment": found.segment_N,
                "seconds": np.full(len(found.row_N), time.perf_counter() - started),
            }
            if found.self_N is not None:
                columns["self_influence"] = found.self_N
            store.write(found.batch, Shard(found.checksum, found.values_KN, columns))
            done += len(found.row_N)
            started = time.perf_counter()
            listener("scoring", done, config.documents)
    except NotFinite as error:
        raise _naming_document(opened, error) from error
    return Done(store, prepared, lost)


def _naming_document(opened: Opened, error: NotFinite) -> DataError:
    """The error with the document's id, which its batch and row are looked up for."""
    for index, _ in enumerate(opened.rows):
        if index == error.index:
            break
    place = opened.rows.places(np.array([error.row]), np.array([error.segment]))
    name, offset = document_name(int(place.document_N[0])), int(place.offset_N[0])
    return DataError(f"{error}; it is document {name} from its token {offset} on")


def _first_batches(opened: Opened) -> list[Batch]:
    """Batches of the documents that are fitted."""
    found, count = [], 0
    for batch in opened.rows:
        found.append(batch)
        count += int(has_target(batch, opened.estimator.scope).sum())
        if count >= opened.config.estimator.fit_documents:
            break
    return found


def _on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("data-handler", "jax", "flax")}


def describe(opened: Opened, done: Done, command: str | None) -> dict[str, Any]:
    """What ``influence.json`` says of a run beside its scores."""
    stats = (opened.rows.stats or {}).get("sources", {})
    return {
        "command": command,
        "config": public_run(opened.config),
        "model": opened.model.origin,
        "sources": list(opened.sources),
        "queries": opened.queries.names,
        "query_documents": opened.queries.documents,
        "coverage": opened.estimator.coverage(opened.model.params),
        "low_rank_error": done.low_rank_error,
        "skipped": {
            name: {"truncated_tokens": source["truncated_tokens"]} | source["skipped"]
            for name, source in stats.items()
        },
        "versions": versions(),
    }
