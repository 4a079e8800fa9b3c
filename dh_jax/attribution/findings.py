"""What a run's scores say, for its report: sources, extreme documents and their tokens.

Shapes: K queries, M sources, T tokens. Helpfulness, which a report shows, is minus the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.attribution.rows import learnt_documents
from dh_jax.attribution.run import Opened
from dh_jax.batch import Batch
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.influence.estimator import Prepared
from dh_jax.influence.score_store import ScoreStore
from dh_jax.influence.summaries import Ends, Groups, GroupStatistics
from dh_jax.influence.thin import mean_query
from dh_jax.inspection.rows import document_name

MOST_QUERIES = 8  # with a section of their own; further ones count in the mean alone
LEVELS = 4  # shades of a tint on either side of none
SAMPLE = 400  # documents of a source that a figure draws
EVERY = "all queries"


class Piece(NamedTuple):
    """Some text of one shade: -LEVELS (harmful) to LEVELS (helpful); 0 is none."""

    text: str
    level: int


class Shown(NamedTuple):
    """One document as the page shows it."""

    document: str
    source: str
    offset: int
    tokens: int
    helpfulness: float
    pieces: list[Piece]
    tinted: bool


class Section(NamedTuple):
    """The documents at both ends of one query."""

    query: str
    helpful: list[Shown]
    harmful: list[Shown]
    sources: list[str]  # all of the run, in whose order figures have their colours


class Findings(NamedTuple):
    """What the page is made of."""

    queries: list[str]  # a row of `statistics` each; the first is the mean of all, if several
    sources: list[str]
    statistics: GroupStatistics  # of helpfulness
    samples: list[dict[str, list[float]]]  # by query, source: helpfulness of some documents
    sections: list[Section]
    pieces: int  # scored: whole documents, and parts of those longer than a row
    documents: int  # they are of
    tokens: int
    seconds: float  # of scoring alone
    pace: float | None  # seconds a piece, of a typical batch behind the first, which also compiles
    self_influence: dict[str, float]  # mean by source, where it was asked for


def find(opened: Opened, store: ScoreStore, prepared: Prepared, key: jax.Array) -> Findings:
    """Go through the scores once and through the data once, for the texts of what is shown."""
    names, sources = opened.queries.names, list(opened.sources)
    shown = [EVERY, *names] if len(names) > 1 else list(names)
    shown = shown[: MOST_QUERIES + 1]
    ends = Ends(len(shown), opened.config.top)
    groups, own = Groups(len(shown), len(sources)), Groups(1, len(sources))
    values: list[list[list[float]]] = [[[] for _ in sources] for _ in shown]
    pieces_scored = tokens = 0
    documents: set[int] = set()
    paces: list[float] = []
    seconds = 0.0
    with_self = False
    for shard in store.shards():
        scores_KN = rows_shown(np.asarray(shard.scores_KN), len(names))[: len(shown)]
        source_N = shard.columns["source"]
        ends.add(scores_KN)
        groups.add(-scores_KN, source_N)
        for k, row in enumerate(-scores_KN):
            for m, value in zip(source_N.tolist(), row.tolist(), strict=True):
                if len(values[k][m]) < SAMPLE:
                    values[k][m].append(value)
        if "self_influence" in shard.columns:
            with_self = True
            own.add(shard.columns["self_influence"][None], source_N)
        pieces_scored += len(source_N)
        documents.update(shard.columns["document"].tolist())
        tokens += int(shard.columns["tokens"].sum())
        took = float(shard.columns["seconds"][:1].sum())
        seconds += took
        paces.append(took / max(len(source_N), 1))
    half = (pieces_scored + 1) // 2  # nobody is at both ends
    chosen = {
        (k, end): numbers
        for k in range(len(shown))
        for end, numbers in (
            ("helpful", ends.helpful_Kt[k][:half]),
            ("harmful", ends.harmful_Kt[k][: pieces_scored - half]),
        )
    }
    told = _read(opened, store, prepared, chosen, key)
    statistics = groups.result()
    return Findings(
        shown,
        sources,
        statistics,
        [{s: v for s, v in zip(sources, row, strict=True) if v} for row in values],
        [
            Section(name, told[k, "helpful"], told[k, "harmful"], sources)
            for k, name in enumerate(shown)
        ],
        pieces_scored,
        len(documents),
        tokens,
        seconds,
        float(np.median(paces[1:])) if paces[1:] else None,
        dict(zip(sources, own.result().mean_KM[0].tolist(), strict=True)) if with_self else {},
    )


def rows_shown(scores_KN: np.ndarray, queries: int) -> np.ndarray:
    """The scores with their mean before them, where there are several queries."""
    if queries == 1:
        return scores_KN
    return np.concatenate([scores_KN.mean(axis=0, dtype=np.float64)[None], scores_KN])


def _read(
    opened: Opened,
    store: ScoreStore,
    prepared: Prepared,
    chosen: dict[tuple[int, str], np.ndarray],
    key: jax.Array,
) -> dict[tuple[int, str], list[Shown]]:
    """The chosen documents, by query and end, best first; those at the head are tinted."""
    tint = opened.config.tinted if opened.estimator.by_token is not None else 0
    wanted = {int(n) for numbers in chosen.values() for n in numbers}
    found: dict[tuple[int, str, int], Shown] = {}
    number = 0
    for index, batch in enumerate(opened.rows):
        there = np.argwhere(learnt_documents(batch, opened.config.data.packing.max_segments))
        here = range(number, number + len(there))
        if not wanted.isdisjoint(here):
            shard = store.read(index)
            scores = rows_shown(np.asarray(shard.scores_KN), len(opened.queries.names))
            for (k, end), numbers in chosen.items():
                for rank, n in enumerate(numbers.tolist()):
                    if n in here:
                        i = n - number
                        row, segment = (int(x) for x in there[i])
                        tokens_n, shares_n = _tokens(
                            opened, prepared, batch, k, row, segment, rank < tint, key
                        )
                        found[k, end, n] = Shown(
                            document_name(int(shard.columns["document"][i])),
                            opened.sources[int(shard.columns["source"][i])],
                            int(shard.columns["offset"][i]),
                            len(tokens_n),
                            -float(scores[k, i]),
                            pieces(tokens_n, shades(shares_n), opened.tokenizer),
                            rank < tint,
                        )
        number += len(there)
        wanted = {n for n in wanted if n >= number}
        if not wanted:
            break
    return {(k, e): [found[k, e, int(n)] for n in numbers] for (k, e), numbers in chosen.items()}


def _tokens(
    opened: Opened,
    prepared: Prepared,
    batch: Batch,
    k: int,
    row: int,
    segment: int,
    tint: bool,
    key: jax.Array,
) -> tuple[np.ndarray, np.ndarray]:
    """A document's tokens, and what each adds to its helpfulness (zeros where not asked for)."""
    inside_T = np.asarray(batch.segment_ids_BT[row]) == segment + 1
    tokens_n = np.asarray(batch.tokens_BT[row])[inside_T]
    if not tint or opened.estimator.by_token is None:
        return tokens_n, np.zeros(len(tokens_n))
    several = len(opened.queries.names) > 1
    if several and k == 0:
        query = mean_query(prepared)
    else:
        at = k - 1 if several else k
        query = jax.tree.map(lambda x: x[at : at + 1], prepared)
    one: Batch = jax.tree.map(lambda x: jnp.asarray(x)[row : row + 1], batch)
    shares_T = np.asarray(opened.estimator.by_token(opened.model.params, query, one, key))[0, 0]
    # A share belongs to a target, which is the token behind: the first token is nobody's.
    return tokens_n, np.concatenate([[0.0], -shares_T[inside_T][:-1]])


def shades(shares_n: np.ndarray) -> np.ndarray:
    """(n,) int levels of a tint: in proportion to the largest share, rounded."""
    most = np.abs(shares_n).max(initial=0.0)
    if not most:
        return np.zeros(len(shares_n), np.int64)
    return np.rint(LEVELS * shares_n / most).astype(np.int64)


def pieces(
    tokens_n: np.ndarray, levels_n: Sequence[int] | np.ndarray, tokenizer: TokenizerWrapper
) -> list[Piece]:
    """The text of some tokens, cut where the shade changes; the cuts lose no character."""
    levels_n = np.asarray(levels_n)
    text, out, at = tokenizer.decode(tokens_n), [], 0
    borders = [*(np.flatnonzero(np.diff(levels_n)) + 1).tolist(), len(tokens_n)]
    begin = 0
    for end in borders:
        stop = len(text)
        if end < len(tokens_n):
            before = tokenizer.decode(tokens_n[:end])
            same = (i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b)
            stop = max(at, next(same, min(len(text), len(before))))
        if stop > at:
            out.append(Piece(text[at:stop], int(levels_n[begin])))
        begin, at = end, stop
    return out
