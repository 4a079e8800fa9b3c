"""Where a document is: its shard and tokens in a prepared store, its record in its source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dh_jax.config import DataConfig, FilesSource, SourceConfig
from dh_jax.data.prepare import open_prepared, text_sources
from dh_jax.data.sources import Document, DocumentSource, split_of
from dh_jax.data.store import TokenStore
from dh_jax.data.text.encoding import make_encoder
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import DataError, UserError
from dh_jax.inspection.rows import Span, document_name, spans_of

Progress = Callable[[str, int], None]  # source, documents looked at so far
REPORT_EVERY = 1000  # documents


class Found(NamedTuple):
    """A document and where it is."""

    document: str  # its id
    source: str
    split: str
    shard: Path | None  # of the store; None where there is no store
    offset: int | None  # its first token within the shard
    token_ids: list[int]
    targets: int  # tokens that are learnt; never the first, which nothing predicts
    spans: list[Span]
    where: str | None = None  # its record, "a.jsonl:17"; None where that is not known
    unknown: str | None = None  # why not, once it was looked for


def find_document(
    config: DataConfig, document_id: int, *, progress: Progress | None = None
) -> Found:
    """Find a document by its id: in the config's store, or else by reading its sources.

    Args:
        config: a validated data config.
        document_id: 64 bits, as `dh_jax.batch.Origins` has them.
        progress: called from time to time while sources are read.

    Raises:
        DataError: no document has this id; says what was looked through.
        ConfigError, StateError: whatever keeps the config from being read.
    """
    tokenizer = TokenizerWrapper.load(
        config.tokenizer, add_bos=config.add_bos, add_eos=config.add_eos
    )
    if config.store is not None:
        store = open_prepared(config, tokenizer)
        return _in_store(store, document_id, tokenizer)
    skipped: Counter[str] = Counter()
    for name, spec in text_sources(config).items():
        document = _read(name, spec, config, document_id, progress, skipped)
        if document is None:
            continue
        (encoded,) = make_encoder(spec, config, tokenizer)([document], skipped)
        if encoded is None:
            raise DataError(
                f"source {name!r}: {document.where} is document {document_name(document_id)}, but "
                f"training leaves it out ({', '.join(+skipped)})"
            )
        mask = encoded.loss_mask
        return _found(
            document_id, name, split_of(document_id, config.splits, spec.split), encoded.tokens,
            np.ones(encoded.tokens.size, np.bool_) if mask is None else mask, tokenizer,
        )._replace(where=document.where)  # fmt: skip
    unread = f" (records that could not be used: {dict(skipped)})" if skipped else ""
    raise DataError(
        f"no document {document_name(document_id)} in sources {', '.join(text_sources(config))}"
        f"{unread}; is this the data config that it was seen with?"
    )


def find_record(config: DataConfig, found: Found, *, progress: Progress | None = None) -> Found:
    """Look for the record of a document of a store in its source, where that is at hand.

    Args:
        config: the data config that `find_document` found it by.
        found: what that returned.
        progress: called from time to time while the source is read.

    Returns:
        ``found`` with its ``where``, or with the reason why that is not known.
    """
    spec = text_sources(config)[found.source]
    if not isinstance(spec, FilesSource):
        why = f"source {found.source!r} is not files but {spec.kind}, so it was not read through"
        return found._replace(unknown=why)
    skipped: Counter[str] = Counter()
    try:
        document = _read(found.source, spec, config, int(found.document, 16), progress, skipped)
    except UserError as error:
        return found._replace(unknown=f"not at hand: {error}")
    if document is None:
        return found._replace(unknown=f"no longer in source {found.source!r}: its files changed")
    return found._replace(where=document.where)


def _read(
    name: str,
    spec: SourceConfig,
    config: DataConfig,
    document_id: int,
    progress: Progress | None,
    skipped: Counter[str],
) -> Document | None:
    """Read a source up to the document. Records that cannot be used are counted."""
    source = DocumentSource(
        name, spec, split=None, splits=config.splits, shuffle=False, on_error="skip"
    )
    with closing(iter(source)) as documents:
        for count, document in enumerate(documents):
            if document.id == document_id:
                return document
            if progress is not None and count % REPORT_EVERY == 0:
                progress(name, count)
        skipped.update(documents.skipped)
    return None


def _in_store(store: TokenStore, document_id: int, tokenizer: TokenizerWrapper) -> Found:
    looked = 0
    for source, split, shards in _shards(store):
        documents = store.documents(source, split)
        looked += documents.ids_D.size
        places = np.flatnonzero(documents.ids_D == np.uint64(document_id))
        if not places.size:
            continue
        number, start, length = (
            int(column[places[0]])
            for column in (documents.shards_D, documents.starts_D, documents.lengths_D)
        )
        shard, inside = documents.shards[number], slice(start, start + length)
        mask = np.ones(length, np.bool_) if shard.loss_mask is None else shard.loss_mask[inside]
        found = _found(document_id, source, split, shard.tokens[inside], mask, tokenizer)
        return found._replace(shard=store.folder / shards[number]["file"], offset=start)
    raise DataError(
        f"no document {document_name(document_id)} among the {looked:,} of store {store.folder}; "
        "is this the data config that it was seen with?"
    )


def _shards(store: TokenStore) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    for source, splits in store.manifest["sources"].items():
        for split, shards in splits.items():
            if shards:
                yield source, split, shards


def _found(
    document_id: int,
    source: str,
    split: str,
    tokens_n: npt.NDArray[Any],
    mask_n: npt.NDArray[np.bool_],
    tokenizer: TokenizerWrapper,
) -> Found:
    learnt_n = np.array(mask_n)
    learnt_n[:1] = False
    return Found(
        document_name(document_id), source, split, None, None, tokens_n.tolist(),
        int(learnt_n.sum()), spans_of(tokens_n, learnt_n, tokenizer),
    )  # fmt: skip
