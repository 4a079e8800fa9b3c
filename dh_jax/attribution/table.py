"""Scores as a Parquet table, one row a document, written part by part."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dh_jax.data.stores.shards import replacing
from dh_jax.errors import DataError
from dh_jax.influence.score_store import Shard
from dh_jax.inspection.rows import document_name

SCHEMA = 1
GROUP = 65_536  # rows of a row group
MOST_QUERIES = 256  # that get a column each; more are given by their mean alone


def write_table(
    path: Path,
    shards: Iterable[Shard],
    queries: Sequence[str],
    sources: Sequence[str],
    facts: dict[str, Any],
) -> int:
    """Write ``scores.parquet``; it appears whole or not at all.

    Columns: ``document`` (id, 16 hexadecimal digits), ``source``, ``offset`` (first token within
    the document), ``tokens``, ``targets``, ``score`` (mean over the queries; positive = harmful),
    ``score/<query>`` for each query, and ``self_influence`` where it was asked for. The schema's
    metadata holds ``data_handler``: JSON of the facts.

    Returns:
        Rows written.

    Raises:
        DataError: two queries have the same name, so that a column would be lost.
    """
    if twice := [name for name, count in Counter(queries).items() if count > 1]:
        raise DataError(
            f"{len(twice)} names of queries are given more than once, {twice[0]!r} among them; "
            "each is a column of the table, so name every query apart"
        )
    many = len(queries) > MOST_QUERIES
    named = [] if many or len(queries) == 1 else [f"score/{name}" for name in queries]
    metadata = {
        "data_handler": json.dumps({"schema": SCHEMA, "sign": "positive = harmful"} | facts)
    }
    writer: pq.ParquetWriter | None = None
    waiting: list[pa.Table] = []
    rows = held = 0
    with replacing(path) as partial:

        def flush() -> None:
            nonlocal writer, held
            if waiting:
                table = pa.concat_tables(waiting)
                if writer is None:
                    schema = table.schema.with_metadata(metadata)
                    writer = pq.ParquetWriter(partial, schema, compression="zstd")
                writer.write_table(table.replace_schema_metadata(metadata))
            waiting.clear()
            held = 0

        for shard in shards:
            waiting.append(_table(shard, named, sources))
            rows, held = rows + waiting[-1].num_rows, held + waiting[-1].num_rows
            if held >= GROUP:
                flush()
        flush()
        if writer is None:
            raise ValueError("a table needs at least one shard")
        writer.close()
    return rows


def _table(shard: Shard, named: Sequence[str], sources: Sequence[str]) -> pa.Table:
    columns, scores_KN = shard.columns, np.asarray(shard.scores_KN)
    names = pa.array(list(sources), pa.string())
    table: dict[str, Any] = {
        "document": pa.array([document_name(int(i)) for i in columns["document"]], pa.string()),
        "source": pa.DictionaryArray.from_arrays(pa.array(columns["source"], pa.int32()), names),
        "offset": columns["offset"],
        "tokens": columns["tokens"],
        "targets": columns["targets"],
        "score": scores_KN.mean(axis=0, dtype=np.float64),
    }
    table |= dict(zip(named, scores_KN, strict=False))
    if "self_influence" in columns:
        table["self_influence"] = columns["self_influence"]
    return pa.table(table)
