"""The last step of preparing: documents that stay -> the shards of the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dh_jax.config import SPLITS
from dh_jax.data.preparing.deciding import Decision
from dh_jax.data.preparing.piecework import Job
from dh_jax.data.stores.shards import check_blocks, checks_of, map_shard, write_shard

SHARD_TOKENS = 64 * 2**20  # a shard closes at this many tokens


class PlannedShard(NamedTuple):
    """One shard of the store: which documents of which parts, in order."""

    source: str
    split: str
    file: str  # within the store
    path: Path
    parts: list[tuple[Path, npt.NDArray[np.int64]]]  # a part and documents of it


def plan_shards(decision: Decision, names: Sequence[str], folder: Path) -> list[PlannedShard]:
    """Lay out the store: by source and split, documents in order, a new shard once one has
    `SHARD_TOKENS`. A function of the decision alone, so no worker has a say in it."""
    lengths = np.concatenate(
        [np.zeros(0, np.int64), *(np.diff(part.arrays["offsets"]) for part in decision.parts)]
    )
    plan = []
    for source, name in enumerate(names):
        for code, split in enumerate(SPLITS):
            wanted = decision.stays_D & (decision.splits_D == code)
            documents = np.flatnonzero(wanted & (decision.sources_D == source))
            for number, chosen in enumerate(_cut(documents, lengths)):
                file = f"{name}/{split}-{number:05d}.safetensors"
                parts = _by_part(decision, chosen)
                plan.append(PlannedShard(name, split, file, folder / file, parts))
    return plan


def _cut(
    documents: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> list[npt.NDArray[np.int64]]:
    shards = []
    ends = np.cumsum(lengths[documents])
    begin = taken = 0
    while begin < documents.size:
        end = min(int(np.searchsorted(ends, taken + SHARD_TOKENS)) + 1, documents.size)
        shards.append(documents[begin:end])
        begin, taken = end, int(ends[end - 1])
    return shards


def _by_part(
    decision: Decision, documents: npt.NDArray[np.int64]
) -> list[tuple[Path, npt.NDArray[np.int64]]]:
    owners = np.searchsorted(decision.starts_P1, documents, side="right") - 1
    borders = np.flatnonzero(np.diff(owners)) + 1
    heads = owners[np.concatenate([[0], borders])].tolist()
    return [
        (decision.parts[p].path, group - decision.starts_P1[p])
        for p, group in zip(heads, np.split(documents, borders), strict=True)
    ]


def write_planned(job: Job, shard: PlannedShard) -> dict[str, Any]:
    """Write one shard of the store; returns what the manifest keeps of it.

    Raises:
        DataError: a part was damaged since it was written, or the disk is full.
    """
    ids, lengths, sizes, tokens = [], [], [], []
    masks: list[npt.NDArray[np.bool_] | None] = []
    for path, documents in shard.parts:
        part = map_shard(path)
        checks, offsets = checks_of(path, part), part["offsets"]
        ids.append(part["ids"][documents])
        lengths.append(offsets[documents + 1] - offsets[documents])
        sizes.append(part["bytes"][documents])
        for begin, end in _runs(offsets, documents):
            check_blocks(checks, begin, end)
            tokens.append(part["tokens"][begin:end])
            masks.append(part["loss_mask"][begin:end] if "loss_mask" in part else None)
    mask = None
    if any(m is not None for m in masks):
        pairs = zip(masks, tokens, strict=True)
        mask = np.concatenate([np.ones(t.size, np.bool_) if m is None else m for m, t in pairs])
    return write_shard(
        shard.path,
        np.concatenate(ids),
        np.concatenate(lengths),
        np.concatenate(sizes),
        np.concatenate(tokens),
        mask,
    )


def _runs(
    offsets: npt.NDArray[np.int64], documents: npt.NDArray[np.int64]
) -> list[tuple[int, int]]:
    """Stretches of tokens that cover the documents; neighbours are one stretch."""
    borders = np.flatnonzero(np.diff(documents) != 1) + 1
    first = documents[np.concatenate([[0], borders])]
    last = documents[np.concatenate([borders - 1, [documents.size - 1]])]
    return list(zip(offsets[first].tolist(), offsets[last + 1].tolist(), strict=True))
