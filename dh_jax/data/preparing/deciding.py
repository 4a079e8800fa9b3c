"""The second step of preparing: everything that needs to see all documents at once.

In memory are ids, lengths and verdicts (about 60 bytes a document at the peak); texts, tokens
and signatures stay on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dh_jax.config import SPLITS
from dh_jax.data.preparing import decontaminate
from dh_jax.data.preparing.deduplicate import (
    REASONS,
    STAYS,
    Codes,
    Verdict,
    drop_exact,
    drop_near,
    role_code,
)
from dh_jax.data.preparing.near_duplicates import clusters
from dh_jax.data.preparing.piecework import Job, Lot, Part, open_lot, read_kept
from dh_jax.data.preparing.runners import Runner
from dh_jax.data.stores.shards import file_checksum
from dh_jax.errors import DataError

REPORT = "contamination.jsonl"

Tell = Callable[[int, int], None]


class Decision(NamedTuple):
    """What becomes of all D documents, which lie in P parts of lots, in order."""

    parts: list[Part]
    starts_P1: npt.NDArray[np.int64]  # a part's documents are starts[p]:starts[p + 1]
    sources_D: npt.NDArray[np.int32]  # index into the names of sources
    splits_D: Codes  # index into SPLITS
    stays_D: npt.NDArray[np.bool_]
    documents: list[int]  # of each source, before anything was left out here
    left_out: dict[str, dict[str, int]]  # source -> reason -> documents
    decontamination: dict[str, Any] | None  # for the manifest


def decide(
    job: Job,
    lots: Sequence[Lot],
    names: Sequence[str],
    folder: Path,
    run: Runner,
    tell: Tell,
) -> Decision:
    """Decide over the documents of all mapped lots.

    Args:
        job: the preparation.
        lots: all mapped, in order.
        names: of the sources, in order.
        folder: of the store to be, for the report on contamination.
        run: does work on lots.
        tell: called with (passes done, all) over lots.

    Raises:
        DataError: two sets share a document and ``on_error`` is ``raise``.
    """
    parts = [part for lot in lots for part in open_lot(job, lot)]
    sizes = np.array([part.arrays["ids"].size for part in parts], np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    none: list[npt.NDArray[Any]] = [np.zeros(0, np.uint64)]
    ids = np.concatenate(none + [part.arrays["ids"] for part in parts])
    sources = np.repeat(np.array([names.index(part.lot.source) for part in parts], np.int32), sizes)
    roles_of = {lot.source: role_code(lot.spec.split) for lot in lots}
    roles = np.array([roles_of[name] for name in names], np.int8)[sources]
    splits = job.config.splits
    verdict, first = drop_exact(ids, roles, splits)
    if job.config.on_error == "raise":
        _refuse_overlap(job, parts, starts, verdict, first)
    near = job.config.prepare.near_duplicates
    if near.action != "ignore" and parts:
        marks = [part.arrays["minhash"] for part in parts]
        alike = clusters(marks, verdict.reasons_D == STAYS, near)
        verdict = drop_near(verdict, ids, roles, alike, splits, near.action)
    clean = job.config.prepare.decontamination
    account = None
    if clean.against or clean.held_out:
        owners = np.repeat(np.array([part.lot.number for part in parts], np.int64), sizes)
        verdict, account = _decontaminate(job, lots, owners, verdict, folder, run, tell)
    return Decision(
        parts,
        starts,
        sources,
        verdict.splits_D,
        verdict.reasons_D == STAYS,
        np.bincount(sources, minlength=len(names)).tolist(),
        _left_out(names, sources, verdict),
        account,
    )


def _left_out(
    names: Sequence[str], sources: npt.NDArray[np.int32], verdict: Verdict
) -> dict[str, dict[str, int]]:
    counts = Counter(zip(sources.tolist(), verdict.reasons_D.tolist(), strict=True))
    left_out: dict[str, dict[str, int]] = {name: {} for name in names}
    for (source, reason), count in sorted(counts.items()):
        if reason != STAYS:
            left_out[names[source]][REASONS[reason]] = count
    return left_out


def _refuse_overlap(
    job: Job,
    parts: Sequence[Part],
    starts: npt.NDArray[np.int64],
    verdict: Verdict,
    first_D: npt.NDArray[np.int64],
) -> None:
    overlaps = np.flatnonzero(verdict.reasons_D == REASONS.index("held_out"))
    if not overlaps.size:
        return
    document = int(overlaps[0])
    p = int(np.searchsorted(starts, document, side="right")) - 1
    part = parts[p]
    wanted = int(part.arrays["ids"][document - starts[p]])
    where = next(d.where for _, d in read_kept(job, part.lot) if d.id == wanted)
    here, before = (SPLITS[verdict.splits_D[at]] for at in (document, first_D[document]))
    raise DataError(
        f"source {part.lot.source!r}: {where} belongs to {here} but is already in {before} "
        f"({overlaps.size} such documents); take it out of one of them, give both sources "
        "'split: hash', or set on_error: skip to drop it here"
    )


def _decontaminate(
    job: Job,
    lots: Sequence[Lot],
    owners_D: npt.NDArray[np.int64],
    verdict: Verdict,
    folder: Path,
    run: Runner,
    tell: Tell,
) -> tuple[Verdict, dict[str, Any]]:
    """Leave out training documents that overlap with evaluation texts.

    Two passes over the texts: one over lots with held-out documents, if asked for, which
    gathers their n-grams; one over those with training documents, which looks for them.
    """
    clean = job.config.prepare.decontamination
    stays = verdict.reasons_D == STAYS
    train = verdict.splits_D == SPLITS.index("train")
    held_out = _choose(lots, owners_D, stays & ~train) if clean.held_out else []
    training = _choose(lots, owners_D, stays & train)
    total = len(held_out) + len(training)
    grams = [decontaminate.grams_of(decontaminate.evaluation_texts(job.config), clean)]
    for done, (_, found) in enumerate(run(decontaminate.collect_lot, held_out), 1):
        grams.append(found)
        tell(done, total)
    known = decontaminate.merge(grams)
    decontaminate.refuse_empty(known)
    decontaminate.save_grams(job.folder / decontaminate.GRAMS, known)
    for done, _ in enumerate(run(decontaminate.match_lot, training), 1 + len(held_out)):
        tell(done, total)
    removed = decontaminate.judge(job, [chosen.lot for chosen in training], folder / REPORT)
    reasons = verdict.reasons_D.copy()
    for number, places in removed.items():
        begin = int(np.searchsorted(owners_D, number))
        reasons[begin + np.array(places)] = REASONS.index("contaminated")
    account = {
        "evaluation_texts": known.texts,
        "too_short": known.too_short,
        "removed": sum(len(places) for places in removed.values()),
        "report": REPORT,
        "blake2b": file_checksum(folder / REPORT),
    }
    return Verdict(verdict.splits_D, reasons), account


def _choose(
    lots: Sequence[Lot], owners_D: npt.NDArray[np.int64], wanted_D: npt.NDArray[np.bool_]
) -> list[decontaminate.Chosen]:
    """The lots that hold wanted documents, each with which."""
    borders = np.searchsorted(owners_D, np.arange(len(lots) + 1))
    chosen = []
    for lot in lots:
        wanted = wanted_D[borders[lot.number] : borders[lot.number + 1]]
        if wanted.any():
            chosen.append(decontaminate.Chosen(lot, wanted))
    return chosen
