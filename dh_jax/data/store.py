"""The prepared token store: write once, read at random.

A folder of safetensors shards, ``<source>/<split>-00000.safetensors``, and ``manifest.json``::

    offsets          [D+1] int64           document d is tokens[offsets[d]:offsets[d + 1]]
    ids              [D]  uint64           content hash of each document's text
    bytes            [D]  int64            UTF-8 bytes of each document's text
    tokens_crc32     [N]  uint32           of each block of 32,768 tokens; see `shards`
    loss_mask_crc32  [N]  uint32, optional
    tokens           [n]  uint16 or uint32 documents end to end
    loss_mask        [n]  bool, optional   which tokens are learnt; absent: all

Shards are memory-mapped; the index (28 bytes a document) is held in memory.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dh_jax.config import SPLITS
from dh_jax.data.packing import TokenShard
from dh_jax.data.stores.shards import (
    SCHEMA,
    ShardChecks,
    check_blocks,
    checks_of,
    file_checksum,
    map_shard,
    write_json,
)
from dh_jax.errors import DataError, StateError

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "StoredDocuments",
    "TokenStore",
    "check_blocks",
    "file_checksum",
    "manifest_checksum",
    "map_shard",
    "open_store",
    "write_json",
]

MANIFEST = "manifest.json"
COUNTS = ("documents", "tokens", "bytes")


class StoredDocuments(NamedTuple):
    """All D documents of one source and split, ready for random access.

    A reader calls `check_blocks` with ``checks[shard]`` and the tokens it is about to use.
    """

    shards: tuple[TokenShard, ...]
    shards_D: npt.NDArray[np.int32]
    starts_D: npt.NDArray[np.int64]
    lengths_D: npt.NDArray[np.int64]
    ids_D: npt.NDArray[np.uint64]
    checks: tuple[ShardChecks, ...] = ()  # of each shard; empty for documents in memory
    fingerprint: str = ""  # of what is stored; a place among other documents means nothing here


class TokenStore(NamedTuple):
    """An opened store: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    def documents(self, source: str, split: str) -> StoredDocuments:
        """Memory-map the shards of one source and split.

        Raises:
            DataError: the store has no such documents, or a shard is missing, cut short, or
                damaged in its index. Damaged tokens are found by `check_blocks` and `verify`.
        """
        shards = self.manifest["sources"].get(source, {}).get(split, [])
        if not shards:
            raise DataError(
                f"store {self.folder} holds no {split} documents of source {source!r}; "
                f"raise splits.{split}, or prepare the store again with that source"
            )
        paths = [self.folder / shard["file"] for shard in shards]
        mapped = [
            map_shard(path, shard["crc32"]) for path, shard in zip(paths, shards, strict=True)
        ]
        for path, shard, arrays in zip(paths, shards, mapped, strict=True):
            if arrays["ids"].size != shard["documents"] or arrays["tokens"].size != shard["tokens"]:
                raise DataError(
                    f"shard {path} holds {arrays['ids'].size} documents, its manifest says "
                    f"{shard['documents']}; prepare the store again"
                )
        return StoredDocuments(
            tuple(TokenShard(a["tokens"], a.get("loss_mask")) for a in mapped),
            np.repeat(np.arange(len(mapped), dtype=np.int32), [a["ids"].size for a in mapped]),
            np.concatenate([a["offsets"][:-1] for a in mapped]),
            np.concatenate([np.diff(a["offsets"]) for a in mapped]),
            np.concatenate([a["ids"] for a in mapped]),
            tuple(checks_of(path, arrays) for path, arrays in zip(paths, mapped, strict=True)),
            _digest([shard["blake2b"] for shard in shards]),
        )

    def total(self, source: str, split: str, what: str) -> int:
        """Total ``documents``, ``tokens`` or ``bytes`` of one source and split."""
        shards = self.manifest["sources"].get(source, {}).get(split, [])
        return sum(shard[what] for shard in shards)

    def totals(self) -> dict[str, Any]:
        """Counts by source and split, and what was left out by reason; fit for JSON."""
        return {
            name: {
                split: {what: self.total(name, split, what) for what in COUNTS} for split in SPLITS
            }
            | {"left_out": self.manifest["skipped"].get(name, {})}
            for name in self.manifest["sources"]
        }

    def verify(self) -> int:
        """Read every shard and compare checksums; returns how many were checked.

        Raises:
            DataError: a shard's bytes are not those that were written.
        """
        checked = 0
        groups = [s for splits in self.manifest["sources"].values() for s in splits.values()]
        for shard in (shard for shards in groups for shard in shards):
            path = self.folder / shard["file"]
            if not path.is_file() or file_checksum(path) != shard["blake2b"]:
                raise DataError(f"shard {path} is damaged or missing; prepare the store again")
            checked += 1
        return checked


def open_store(
    folder: str | Path, *, tokenizer: str | None = None, pipeline: str | None = None
) -> TokenStore:
    """Open a prepared store, refusing one made by another tokenizer or from another pipeline.

    Args:
        folder: where ``dh prepare`` wrote it.
        tokenizer: expected `TokenizerWrapper.fingerprint`.
        pipeline: expected fingerprint of sources, splits and text columns.

    Raises:
        DataError: there is no store, or it is not one of ours.
        StateError: it was prepared with another tokenizer, pipeline or schema.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise DataError(
            f"no prepared store at {folder}; run `dh prepare data=...`, or set data.store=null to "
            "stream"
        ) from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"{folder / MANIFEST} is not JSON ({error}); prepare again") from None
    for key, expected in (("schema", SCHEMA), ("tokenizer", tokenizer), ("pipeline", pipeline)):
        if expected is not None and manifest.get(key) != expected:
            raise StateError(
                f"store {folder} was prepared with {key} {manifest.get(key)}, this run has "
                f"{expected}; prepare it again or use another folder (data.store=...)"
            )
    if manifest.get("blake2b") != manifest_checksum(manifest):
        raise DataError(f"{folder / MANIFEST} is damaged or was edited; prepare the store again")
    return TokenStore(folder, manifest)


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """128-bit BLAKE2b of a manifest but for its own ``blake2b``, in hex."""
    return _digest({key: value for key, value in manifest.items() if key != "blake2b"})


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
