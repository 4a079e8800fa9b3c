"""Decontamination: no training document may share an n-gram of words with evaluation texts.

The rule is GPT-3's (Brown et al. 2020, appendix C): 13 words in a row, lower case, without
punctuation; an n-gram found in more than ten training documents is boilerplate and does not
count. Theirs cuts 200 characters around a match out; here the document goes as a whole, and a
JSONL file says which, from where, and on account of which words.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

from dh_jax.config import DataConfig, DecontaminationConfig
from dh_jax.data.preparing.ngrams import Hashes, hash_ngrams, hash_words, words_of
from dh_jax.data.preparing.piecework import Job, Lot, read_kept
from dh_jax.data.sources import DocumentSource
from dh_jax.data.stores.shards import replacing
from dh_jax.errors import DataError

GRAMS = "grams.safetensors"


class Grams(NamedTuple):
    """The n-grams of some evaluation texts."""

    by_length: dict[int, Hashes]  # words -> sorted distinct hashes
    texts: int
    too_short: int  # texts of fewer than ``shortest`` words, which cannot be looked for


class Chosen(NamedTuple):
    """Some documents of a lot, for a task."""

    lot: Lot
    wanted_D: npt.NDArray[np.bool_]  # over its mapped documents


class Match(NamedTuple):
    """An n-gram of a document that is also an evaluation text's."""

    gram: int
    start: int  # word of the document
    length: int  # words


def grams_of(texts: Iterable[str], config: DecontaminationConfig) -> Grams:
    """The n-grams of evaluation texts; a text of fewer than n words is one n-gram as a whole."""
    found: dict[int, list[Hashes]] = {}
    count = too_short = 0
    for text in texts:
        count += 1
        words = words_of(text)
        if len(words) < config.shortest:
            too_short += 1
            continue
        n = min(config.ngram, len(words))
        found.setdefault(n, []).append(hash_ngrams(hash_words(words), n))
    return Grams({n: np.unique(np.concatenate(g)) for n, g in found.items()}, count, too_short)


def merge(parts: Iterable[Grams]) -> Grams:
    """The n-grams of all parts together."""
    found: dict[int, list[Hashes]] = {}
    texts = too_short = 0
    for part in parts:
        texts, too_short = texts + part.texts, too_short + part.too_short
        for n, hashes in part.by_length.items():
            found.setdefault(n, []).append(hashes)
    return Grams({n: np.unique(np.concatenate(g)) for n, g in found.items()}, texts, too_short)


def matches(words: list[str], grams: Grams) -> list[Match]:
    """Every distinct n-gram of a document that the evaluation texts hold, at its first place."""
    hashes = hash_words(words)
    found: list[Match] = []
    for n, known in sorted(grams.by_length.items()):
        ours = hash_ngrams(hashes, n)
        places = np.searchsorted(known, ours).clip(max=known.size - 1)
        hits = np.flatnonzero(known[places] == ours)
        _, first = np.unique(ours[hits], return_index=True)
        found += [Match(int(ours[hits[i]]), int(hits[i]), n) for i in sorted(first)]
    return found


# --- evaluation texts ------------------------------------------------------------------------


def evaluation_texts(config: DataConfig) -> Iterator[str]:
    """The texts of ``prepare.decontamination.against``."""
    for name, spec in config.prepare.decontamination.against.items():
        source = DocumentSource(
            f"decontamination.against.{name}",
            spec,
            split=None,
            splits=config.splits,
            shuffle=False,
            on_error=config.on_error,
        )
        for document in source:
            yield document.text


def collect_lot(job: Job, chosen: Chosen) -> Grams:
    """The n-grams of a lot's held-out documents."""
    documents = (d.text for at, d in read_kept(job, chosen.lot) if chosen.wanted_D[at])
    return grams_of(documents, job.config.prepare.decontamination)


def save_grams(path: Path, grams: Grams) -> None:
    """Write what `match_lot` reads."""
    with replacing(path) as partial:
        partial.write_bytes(save({str(n): hashes for n, hashes in grams.by_length.items()}))


@lru_cache(maxsize=1)
def _load_grams(path: Path, changed: int) -> Grams:
    """``changed``, its time of modification, keeps another preparation's out of the cache."""
    del changed
    return Grams({int(n): hashes for n, hashes in load_file(path).items()}, 0, 0)


# --- training documents ----------------------------------------------------------------------


def match_lot(job: Job, chosen: Chosen) -> int:
    """Look through a lot's training documents; how many share an n-gram.

    Writes what it found as JSONL, a line for each such document, with its words: which of the
    n-grams are boilerplate is known only when all lots are counted.
    """
    path = job.folder / GRAMS
    grams = _load_grams(path, path.stat().st_mtime_ns)
    count = 0
    with replacing(_found_file(job, chosen.lot)) as partial, partial.open("w") as file:
        for at, document in read_kept(job, chosen.lot):
            if not chosen.wanted_D[at]:
                continue
            words = words_of(document.text)
            found = matches(words, grams)
            if found:
                count += 1
                line = {
                    "place": at,
                    "id": f"{document.id:016x}",
                    "where": document.where,
                    "matches": found,
                    "words": words,
                }
                file.write(json.dumps(line) + "\n")
    return count


def _found_file(job: Job, lot: Lot) -> Path:
    return job.folder / f"found-{lot.number:06d}.jsonl"


def _found(job: Job, lot: Lot) -> Iterator[dict[str, Any]]:
    with _found_file(job, lot).open() as file:
        for line in file:
            yield json.loads(line)


def judge(job: Job, lots: list[Lot], report: Path) -> dict[int, list[int]]:
    """Decide which documents are contaminated, and write the report.

    Args:
        job: whose folder `match_lot` wrote into.
        lots: those it was given, in order.
        report: JSONL to write, a line for each document removed: ``id``, ``source``, ``where``,
            the overlapping ``ngram``, and ``training_documents``, in how many of them it is.

    Returns:
        Places of the contaminated documents by number of the lot.
    """
    limit = job.config.prepare.decontamination.max_documents
    spread = Counter(
        gram for lot in lots for line in _found(job, lot) for gram, _, _ in line["matches"]
    )
    removed: dict[int, list[int]] = {}
    with replacing(report) as partial, partial.open("w") as file:
        for lot in lots:
            for line in _found(job, lot):
                telling = [Match(*m) for m in line["matches"] if spread[m[0]] <= limit]
                if not telling:
                    continue
                removed.setdefault(lot.number, []).append(line["place"])
                gram, start, length = min(telling, key=lambda match: match.start)
                entry = {
                    "id": line["id"],
                    "source": lot.source,
                    "where": line["where"],
                    "ngram": " ".join(line["words"][start : start + length]),
                    "training_documents": spread[gram],
                }
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return removed


def refuse_empty(grams: Grams) -> None:
    """Decontamination against nothing would be a silent no-op.

    Raises:
        DataError: there is no evaluation text long enough.
    """
    if not grams.by_length:
        raise DataError(
            f"decontamination has no n-gram to look for: {grams.texts} evaluation texts, "
            f"{grams.too_short} of them shorter than prepare.decontamination.shortest; lower it, "
            "name other texts under against, or hold documents out"
        )
