"""Prepare: text -> token store, once, so that training reads tokens at random.

One pass over every source; each document goes to exactly one of train, probe and eval by a
hash of its content. Exact duplicates are dropped and counted, within and across sources. The
store appears under its name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dh_jax.config import SPLITS, DataConfig, SourceConfig, load_data_config
from dh_jax.data.encoding import make_encoder
from dh_jax.data.sources import Document, DocumentSource, split_of
from dh_jax.data.store import (
    MANIFEST,
    SCHEMA,
    ShardWriter,
    TokenStore,
    open_store,
    write_json,
)
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, DataError

ENCODE_TOGETHER = 512  # documents handed to the tokenizer at once


class Progress(NamedTuple):
    """What a progress bar may show after every few hundred documents."""

    source: str
    documents: int
    tokens: int


def pipeline_fingerprint(config: DataConfig) -> str:
    """Hash of everything, but the tokenizer, that decides which documents a store holds."""
    parts: dict[str, Any] = {}
    for name, spec in text_sources(config).items():
        parts[name] = dataclasses.asdict(spec)
        for how_often in ("weight", "max_epochs"):  # says nothing about the documents
            del parts[name][how_often]
    content = [parts, dataclasses.asdict(config.splits), config.on_error]
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def text_sources(config: DataConfig) -> dict[str, SourceConfig]:
    """Every source that has text of its own: the mixture's, and probes that are not the probe
    split of one of them. Sets held out whole come first, so that they keep a document that a
    training source also has."""
    own: dict[str, SourceConfig] = {}
    for name, spec in itertools.chain(config.probes.items(), config.sources.items()):
        if isinstance(spec, str):
            continue
        if name in own:
            raise ConfigError(f"{name!r} names both a probe and a source; rename the probe")
        own[name] = spec
    return dict(sorted(own.items(), key=lambda item: item[1].split in ("hash", "train")))


def prepare(
    config: str | Path | DataConfig,
    *,
    tokenizer: TokenizerWrapper | str | Path | None = None,
    folder: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TokenStore:
    """Tokenise a data config into a store and open it; do nothing if it is already there.

    Args:
        config: a data config or its name.
        tokenizer: overrides ``config.tokenizer``.
        folder: overrides ``config.store``.
        progress: called from time to time.

    Raises:
        ConfigError: no folder is given, or the config is wrong.
        DataError: a source cannot be read, or a probe or eval set shares a document with
            training (with ``on_error: skip`` it is dropped from training and counted).
        StateError: the folder holds a store of another tokenizer or pipeline.
    """
    config = load_data_config(config)
    target = Path(folder or config.store or "")
    if not target.name:
        raise ConfigError("no folder to prepare into; set data.store=FOLDER")
    wrapper = TokenizerWrapper.wrap(
        tokenizer or config.tokenizer, add_bos=config.add_bos, add_eos=config.add_eos
    )
    expected = {"tokenizer": wrapper.fingerprint, "pipeline": pipeline_fingerprint(config)}
    if (target / MANIFEST).exists():
        return open_store(target, **expected)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    seen: dict[int, str] = {}
    sources: dict[str, Any] = {}
    skipped: dict[str, dict[str, int]] = {}
    for name, spec in text_sources(config).items():
        sources[name], skipped[name] = _prepare_source(
            name, spec, config, wrapper, partial, seen, progress
        )
    manifest = {
        "schema": SCHEMA,
        **expected,
        "vocab_size": wrapper.vocab_size,
        "name": config.name,
        "sources": sources,
        "skipped": skipped,
    }
    write_json(partial / MANIFEST, manifest)
    if target.exists():
        raise DataError(f"{target} exists and is not a token store; choose another data.store")
    os.replace(partial, target)
    return TokenStore(target, manifest)


def _prepare_source(
    name: str,
    spec: SourceConfig,
    config: DataConfig,
    tokenizer: TokenizerWrapper,
    folder: Path,
    seen: dict[int, str],
    progress: Callable[[Progress], None] | None,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Write the shards of one source; returns them by split, and counts of what was skipped."""
    dataset = DocumentSource(
        name, spec, split=None, splits=config.splits, shuffle=False, on_error=config.on_error
    )
    documents: Any = iter(dataset)
    writers = {split: ShardWriter(folder, name, split, tokenizer.dtype) for split in SPLITS}
    encode = make_encoder(spec, config, tokenizer)
    skipped: Counter[str] = Counter()
    done = tokens_done = 0
    fresh = _fresh(name, spec, config, documents, seen, skipped)
    while group := list(itertools.islice(fresh, ENCODE_TOGETHER)):
        encoded = encode([document for document, _ in group], skipped)
        for (_, split), document in zip(group, encoded, strict=True):
            if document is not None:
                writers[split].add([document])
                tokens_done += document.tokens.size
        done += len(group)
        if progress is not None:
            progress(Progress(name, done, tokens_done))
    for writer in writers.values():
        writer.flush()
    skipped.update(documents.skipped)
    return {split: writer.shards for split, writer in writers.items()}, dict(skipped)


def _fresh(
    name: str,
    spec: SourceConfig,
    config: DataConfig,
    documents: Iterator[Document],
    seen: dict[int, str],
    skipped: Counter[str],
) -> Iterator[tuple[Document, str]]:
    """Documents not seen before, each with its split."""
    for document in documents:
        split = split_of(document.id, config.splits, spec.split)
        before = seen.get(document.id)
        if before is None:
            seen[document.id] = split
            yield document, split
        elif before == split:
            skipped["duplicate"] += 1
        elif config.on_error == "skip":
            skipped["held_out"] += 1
        else:
            raise DataError(
                f"source {name!r}: {document.where} belongs to {split} but is already in "
                f"{before}; take it out of one of them, give both sources 'split: hash', or "
                "set on_error: skip to drop it here"
            )
