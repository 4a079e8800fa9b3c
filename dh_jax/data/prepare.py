"""Prepare: text -> token store, once, so that training reads tokens at random.

Three steps. *Map*: every lot (some files) of every source is read, identified and encoded, on
all cores or on a cluster. *Decide*: over all documents at once, which of them stay and in which
split; equal texts stay once, by default nothing else is left out. *Write*: the final shards.
Each step is a pure function of the one before, so the store's bytes do not depend on how many
worked at it, or how often it was interrupted. It appears under its name only when complete.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dh_jax.config import (
    TOKEN_SOURCES,
    DataConfig,
    SourceConfig,
    decisive_spec,
    load_data_config,
)
from dh_jax.data.preparing.deciding import Decision, decide
from dh_jax.data.preparing.piecework import Job, Lot, lots_of, map_lot
from dh_jax.data.preparing.runners import Runner, open_runner
from dh_jax.data.preparing.writing import plan_shards, write_planned
from dh_jax.data.store import MANIFEST, TokenStore, manifest_checksum, open_store
from dh_jax.data.stores.shards import SCHEMA, explained_disk, write_json
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, DataError, StateError

# Of text, below which another process costs more than it brings: starting costs about 5
# CPU-seconds, and in one process the tokenizer uses all cores by itself.
BYTES_A_WORKER = 32 * 2**20


class Progress(NamedTuple):
    """How far a preparation is; a step's numbers grow to those of its end."""

    step: str  # map, decide, write
    done: int  # lots (map), passes over lots (decide) or shards (write)
    total: int
    documents: int  # read so far
    tokens: int
    dropped: int  # duplicates and what else was left out so far


def pipeline_fingerprint(config: DataConfig, tokenizer: TokenizerWrapper) -> str:
    """Hash of everything, but the tokenizer's vocabulary, that decides what a store holds."""
    parts: dict[str, Any] = {}
    for name, spec in text_sources(config).items():
        parts[name] = decisive_spec(spec)
    content: list[Any] = [parts, dataclasses.asdict(config.splits), config.on_error]
    near, clean = config.prepare.near_duplicates, config.prepare.decontamination
    if near.action != "ignore":
        content.append(dataclasses.asdict(near))
    if clean.against or clean.held_out:
        content.append(dataclasses.asdict(clean))
    if any(spec.text.conversation for spec in text_sources(config).values()):
        # They are rendered by the chat template, and shortened to a row.
        content += [tokenizer.chat_template, tokenizer.special_tokens, config.max_length]
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def open_prepared(config: DataConfig, tokenizer: TokenizerWrapper) -> TokenStore:
    """The store that ``config.store`` names, which must be of this config and tokenizer.

    Raises:
        DataError, StateError: see `open_store`.
    """
    assert config.store is not None, "asked only of configs that name a store"
    return open_store(
        config.store,
        tokenizer=tokenizer.fingerprint,
        pipeline=pipeline_fingerprint(config, tokenizer),
    )


def text_sources(config: DataConfig) -> dict[str, SourceConfig]:
    """Every source that has text of its own: the mixture's, and probes that are not the probe
    split of one of them. Sets held out whole come first, so that they keep a document that a
    training source also has.

    Raises:
        ConfigError: a name is that of a probe and of a source.
    """
    own: dict[str, SourceConfig] = {}
    for name, spec in itertools.chain(config.probes.items(), config.sources.items()):
        if isinstance(spec, (str, *TOKEN_SOURCES)):  # those that hold tokens are read in place
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
    backend: str | None = None,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TokenStore:
    """Tokenise a data config into a store and open it; do nothing if it is already there.

    Killed or failed, it may be run again and goes on with the lots that are not finished. They
    lie beside the store in ``.NAME.partial``, whose size is about the store's own.

    Args:
        config: a data config or its name.
        tokenizer: overrides ``config.tokenizer``.
        folder: overrides ``config.store``. With Ray, a folder that all machines see.
        backend: overrides ``config.prepare.backend``: ``local`` or ``ray``.
        workers: overrides ``config.prepare.workers``: processes of the local backend.
        progress: called whenever a lot is finished.

    Raises:
        ConfigError: no folder is given, or the config is wrong.
        DataError: a source cannot be read, the disk is full, or a probe or eval set shares a
            document with training (with ``on_error: skip`` it is dropped from training and
            counted).
        StateError: the folder holds a store of another tokenizer or pipeline, or another
            process is preparing it.
    """
    config = load_data_config(config)
    target = Path(folder or config.store or "")
    if not target.name:
        raise ConfigError("no folder to prepare into; set data.store=FOLDER")
    wrapper = TokenizerWrapper.wrap(
        tokenizer or config.tokenizer, add_bos=config.add_bos, add_eos=config.add_eos
    )
    expected = {"tokenizer": wrapper.fingerprint, "pipeline": pipeline_fingerprint(config, wrapper)}
    workshop = target.with_name(f".{target.name}.partial")
    if target.exists() and not (target / MANIFEST).exists():
        raise DataError(f"{target} exists and is not a token store; choose another data.store")
    if not target.exists() or workshop.exists():  # both: it was killed while tidying up
        with _alone_in(workshop):
            if not target.exists():
                job = Job(workshop / "lots", config, wrapper)
                lots = lots_of(text_sources(config))
                _keep_what_fits(workshop, job, expected, lots)
                chosen = _workers(workers or config.prepare.workers, lots)
                try:
                    with open_runner(job, backend or config.prepare.backend, chosen) as run:
                        _prepare(job, lots, workshop / "store", expected, run, progress)
                finally:
                    _sweep(job)  # what a worker was at when another failed
                os.replace(workshop / "store", target)
            shutil.rmtree(workshop, ignore_errors=True)
    return open_store(target, **expected)


def _workers(wanted: int | None, lots: Sequence[Lot]) -> int:
    if wanted is None:
        size = sum(lot.size for lot in lots)
        wanted = min(len(os.sched_getaffinity(0)), 1 + size // BYTES_A_WORKER)
    return max(1, min(wanted, len(lots)))


def _prepare(
    job: Job,
    lots: Sequence[Lot],
    folder: Path,
    expected: dict[str, str],
    run: Runner,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Map, decide and write everything into ``folder``."""
    names = list(text_sources(job.config))
    skipped = {name: Counter[str]() for name in names}
    documents = tokens = 0

    def tell(step: str, done: int, total: int) -> None:
        if progress is not None:
            dropped = sum(sum(counts.values()) for counts in skipped.values())
            progress(Progress(step, done, total, documents, tokens, dropped))

    for done, (index, facts) in enumerate(run(map_lot, lots), 1):
        skipped[lots[index].source].update(facts["skipped"])
        documents, tokens = documents + facts["documents"], tokens + facts["tokens"]
        tell("map", done, len(lots))
    decision = decide(job, lots, names, folder, run, lambda *at: tell("decide", *at))
    for name, reasons in decision.left_out.items():
        skipped[name].update(reasons)
    _refuse_nothing(names, decision, skipped)
    shards: dict[str, dict[str, list[Any]]] = {}
    plan = plan_shards(decision, names, folder)
    written: list[Any] = [None] * len(plan)
    for done, (index, facts) in enumerate(run(write_planned, plan), 1):
        written[index] = facts
        tell("write", done, len(plan))
    for task, facts in zip(plan, written, strict=True):
        of_source = shards.setdefault(task.source, {})
        of_source.setdefault(task.split, []).append({"file": task.file, **facts})
    manifest = {
        "schema": SCHEMA,
        **expected,
        "vocab_size": job.tokenizer.vocab_size,
        "name": job.config.name,
        "sources": {name: shards.get(name, {}) for name in names},
        "skipped": {name: dict(sorted(counts.items())) for name, counts in skipped.items()},
        **({"decontamination": decision.decontamination} if decision.decontamination else {}),
    }
    manifest["blake2b"] = manifest_checksum(manifest)
    write_json(folder / MANIFEST, manifest)


def _refuse_nothing(
    names: Sequence[str], decision: Decision, skipped: dict[str, Counter[str]]
) -> None:
    for name, count in zip(names, decision.documents, strict=True):
        if count == 0:
            raise DataError(
                f"source {name!r} has no usable document (left out: {dict(skipped[name])}); check "
                "its paths and text column"
            )


# --- the workshop ----------------------------------------------------------------------------


@contextmanager
def _alone_in(workshop: Path) -> Iterator[None]:
    """Hold the lock of a workshop. The system lets it go with the process, however that ends.

    Raises:
        StateError: another process holds it.
    """
    with explained_disk(workshop):
        workshop.mkdir(parents=True, exist_ok=True)
        file = (workshop / "lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have finished and removed it since it was opened.
            current = os.stat(workshop / "lock").st_ino == os.fstat(file.fileno()).st_ino
        except (BlockingIOError, FileNotFoundError):
            current = False
        if not current:
            raise StateError(
                f"another process is preparing into {workshop}; wait for it, or choose another "
                "data.store"
            )
        yield


def _keep_what_fits(
    workshop: Path, job: Job, expected: dict[str, str], lots: Sequence[Lot]
) -> None:
    """Keep finished lots if they are of this very work, and remove everything else."""
    identity = [SCHEMA, expected, [_identity(lot) for lot in lots]]
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    plan = workshop / "plan.json"
    shutil.rmtree(workshop / "store", ignore_errors=True)
    try:
        fits = json.loads(plan.read_text()) == digest
    except (FileNotFoundError, ValueError):  # ValueError: cut short by a crash
        fits = False
    if not fits:
        shutil.rmtree(job.folder, ignore_errors=True)
        plan.unlink(missing_ok=True)
    _sweep(job)
    write_json(plan, digest)


def _sweep(job: Job) -> None:
    """Remove lots that were begun and not finished."""
    for rest in job.folder.glob(".*.partial"):
        shutil.rmtree(rest, ignore_errors=True)


def _identity(lot: Lot) -> Any:
    """What a lot is made of: files with sizes and times. A hub's addresses name the commit."""
    files = [[piece.path, piece.size, _modified(piece.path)] for piece in lot.pieces]
    return [lot.source, files]


def _modified(path: str) -> int | None:
    """When a file changed, ns; None where it is not on this machine."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None
