"""Writing a teacher's cache: the teacher over every document of a data config, once.

Sources are gone through one after another, in the order of their documents, so the cache knows
nothing of mixtures and epochs. Shards are written under temporary names, each with the loader's
state behind it; a run killed anywhere goes on from its last whole shard and ends with the same
bytes, since a batch's composition does not depend on where it was begun.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dh_jax.batch import Batch, Origins, TopKLogits
from dh_jax.config import DataConfig, load_data_config
from dh_jax.data.loader import Loader, get_loader
from dh_jax.data.seeding import derive
from dh_jax.data.store import manifest_checksum
from dh_jax.data.stores.shards import file_checksum, replacing, write_arrays, write_json
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distillation.cached import (
    BLOCK_ROWS,
    MANIFEST,
    SCHEMA,
    CachedTeacher,
    crc_of,
    open_cache,
    pieces_of,
)
from dh_jax.distillation.codec import Layout, encode, layout
from dh_jax.distillation.teacher import TeacherWrapper
from dh_jax.distributed.mesh import to_device
from dh_jax.errors import ConfigError, StateError

SHARD_ENTRIES = 1 << 15  # a shard closes behind the batch that reaches this: 6 MB at K = 64
PLAN = "plan.json"

Progress = Callable[[str, int], None]  # (source, entries written of it)


class _Shard(NamedTuple):
    """Pieces not yet written."""

    ids: list[int]
    offsets: list[int]
    lengths: list[int]
    crcs: list[int]
    counts: list[int]
    records: list[Any]


def write_cache(
    teacher: TeacherWrapper,
    config: DataConfig,
    folder: str | Path,
    mesh: Mesh,
    *,
    tokenizer: TokenizerWrapper,
    entries: int = 64,
    temperature: float = 1.0,
    codec: str = "plain",
    sampled: bool = False,
    batch_size: int = 8,
    shard_entries: int = SHARD_ENTRIES,
    progress: Progress | None = None,
) -> CachedTeacher:
    """Run a teacher over the training documents of a data config and keep what it said.

    Args:
        teacher: with a fingerprint.
        config: its sources, row length and cutting of long documents.
        folder: of the cache. One begun for the same teacher and data goes on; a finished one is
            opened and nothing is done.
        mesh: where batches go.
        tokenizer: of teacher and data alike.
        entries: K.
        temperature: of the stored distributions.
        codec: ``plain`` or ``dense``; see `codec`.
        sampled: K draws, for the estimator ``sampled``, instead of the K most probable ids.
        batch_size: rows the teacher sees at once.
        shard_entries: of a shard.
        progress: called behind every batch.

    Returns:
        The cache, opened.

    Raises:
        ConfigError: the teacher has no fingerprint, or a size makes no sense.
        StateError: the folder holds a cache of something else, or documents are cut by rows.
        DataError: the data cannot be read, or the disk is full.
    """
    if teacher.fingerprint is None:
        raise ConfigError("the teacher has no fingerprint, so a cache could not say whose it is")
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; it must be above 0")
    config, folder = load_data_config(config), Path(folder)
    with _loader(config, tokenizer, list(config.sources), batch_size) as loader:
        identity = loader.identity
    of = layout(codec, entries, tokenizer.vocab_size, sampled)
    facts = {
        "schema": SCHEMA,
        "kind": "teacher",
        "teacher": teacher.fingerprint,
        **pieces_of(identity),
        "vocabulary": tokenizer.vocab_size,
        "entries": entries,
        "temperature": temperature,
        "codec": codec,
        "sampled": sampled,
        "batch_size": batch_size,
        "shard_entries": shard_entries,
    }
    if (folder / MANIFEST).exists():
        found = open_cache(folder, teacher=teacher.fingerprint)
        _refuse_other(folder, found.manifest, facts)
        _tidy(folder)
        return found
    if (folder / PLAN).exists():
        _refuse_other(folder, json.loads((folder / PLAN).read_text()), facts)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, facts)
    shards: list[dict[str, Any]] = []
    for name in config.sources:
        with _loader(config, tokenizer, [name], batch_size) as loader:
            shards += _write_source(
                teacher, loader, name, folder, mesh, of, facts, progress or (lambda *_: None)
            )
    manifest = facts | {"shards": shards}
    write_json(folder / MANIFEST, manifest | {"blake2b": manifest_checksum(manifest)})
    _tidy(folder)
    return open_cache(folder)


def _tidy(folder: Path) -> None:
    """Remove notes, and what a killed process left half written (also beside the manifest)."""
    for path in [folder / PLAN, *folder.glob("*/*.json"), *folder.rglob(".*.partial")]:
        path.unlink(missing_ok=True)


def _loader(
    config: DataConfig, tokenizer: TokenizerWrapper, sources: list[str], batch_size: int
) -> Loader:
    return get_loader(
        config, tokenizer=tokenizer, batch_size=batch_size, sources=sources,
        weights=dict.fromkeys(sources, 1.0), shuffle=False, repeat=False,
    )  # fmt: skip


def _refuse_other(folder: Path, saved: dict[str, Any], facts: dict[str, Any]) -> None:
    for key, ours in facts.items():
        if saved.get(key) != ours:
            raise StateError(
                f"{folder} holds a cache made with {key} {saved.get(key)}, this one would have "
                f"{ours}; choose another folder, or remove that one"
            )


def _write_source(
    teacher: TeacherWrapper,
    loader: Loader,
    name: str,
    folder: Path,
    mesh: Mesh,
    of: Layout,
    facts: dict[str, Any],
    progress: Progress,
) -> list[dict[str, Any]]:
    written: list[dict[str, Any]] = []
    total = 0

    def path(suffix: str) -> Path:
        return folder / name / f"teacher-{len(written):05d}.{suffix}"

    while (kept := path("json")).exists() and path("safetensors").exists():
        step = json.loads(kept.read_text())
        if file_checksum(path("safetensors")) != step["shard"]["blake2b"]:
            break
        loader.set_state(step["state"])
        written.append(step["shard"])
        total += step["shard"]["entries"]
    if total:
        progress(name, total)  # of an earlier start
    shard = _Shard([], [], [], [], [], [])
    key = jax.random.key(derive(0, name)) if facts["sampled"] else None
    number = int(loader.get_state()["batches"])

    def flush() -> None:
        nonlocal shard
        if not shard.ids:
            return
        starts = np.concatenate([[0], np.cumsum(shard.counts)]).astype(np.int64)
        arrays: dict[str, Any] = {
            "ids": np.array(shard.ids, np.uint64),
            "offsets": np.array(shard.offsets, np.int64),
            "starts": starts,
            "lengths": np.array(shard.lengths, np.uint32),
            "crcs": np.array(shard.crcs, np.uint32),
        }
        records = np.concatenate([np.zeros((0, of.width), np.uint8), *shard.records])
        sums = write_arrays(path("safetensors"), arrays, {"records": records}, BLOCK_ROWS)
        entry = {
            "file": f"{name}/{path('safetensors').name}",
            "pieces": len(shard.ids),
            "entries": len(records),
        } | sums
        step = {"shard": entry, "state": loader.get_state()}
        with replacing(path("json")) as partial:
            partial.write_text(json.dumps(step))
        written.append(entry)
        shard = _Shard([], [], [], [], [], [])

    for batch in loader:
        number += 1
        placed = to_device(batch, mesh)
        own = None if key is None else jax.random.fold_in(key, number)
        found = teacher.top_k(
            placed, facts["entries"], facts["temperature"], own, facts["vocabulary"]
        )
        _add(shard, batch, loader.origins, jax.device_get(found), of)
        waiting = sum(map(len, shard.records))
        progress(name, total + waiting)
        if waiting >= facts["shard_entries"]:
            total += waiting
            flush()
    flush()
    return written


def _add(shard: _Shard, batch: Batch, origins: Origins, found: TopKLogits, of: Layout) -> None:
    """A batch's pieces, and the entries of what is learnt in them, row by row."""
    shard.records.append(encode(TopKLogits(*(x[batch.loss_mask_BT] for x in found)), of))
    for b in range(len(batch.tokens_BT)):
        end = 0
        for document, offset, length in zip(*(column[b] for column in origins), strict=True):
            if not length:
                break
            begin, end = end, end + int(length)
            mask = batch.loss_mask_BT[b, begin:end]
            shard.ids.append(int(document))
            shard.offsets.append(int(offset))
            shard.lengths.append(int(length))
            shard.crcs.append(crc_of(batch.tokens_BT[b, begin:end], mask))
            shard.counts.append(int(mask.sum()))
