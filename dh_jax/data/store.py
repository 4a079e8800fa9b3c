"""The prepared token store: write once, read at random.

A folder of safetensors shards, ``<source>/<split>-00000.safetensors``, and ``manifest.json``::

    tokens     [n]  uint16 or uint32    documents end to end
    offsets    [D+1] int64              document d is tokens[offsets[d]:offsets[d + 1]]
    ids        [D]  uint64              content hash of each document's text
    bytes      [D]  int64               UTF-8 bytes of each document's text
    loss_mask  [n]  bool, optional      which tokens are learnt; absent: all

Shards are memory-mapped; the index (20 bytes a document) is held in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from dh_jax.data.encoding import TokenDocument, join
from dh_jax.data.packing import TokenShard
from dh_jax.errors import DataError, StateError

SCHEMA = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 64 * 2**20  # a shard closes at this many tokens


class StoredDocuments(NamedTuple):
    """All D documents of one source and split, ready for random access."""

    shards: tuple[TokenShard, ...]
    shards_D: npt.NDArray[np.int32]
    starts_D: npt.NDArray[np.int64]
    lengths_D: npt.NDArray[np.int64]
    ids_D: npt.NDArray[np.uint64]


# --- writing ---------------------------------------------------------------------------------


class ShardWriter:
    """Gathers documents of one source and split into shards, each written atomically."""

    def __init__(self, folder: Path, source: str, split: str, dtype: npt.DTypeLike):
        self._folder, self._source, self._split = folder, source, split
        self._dtype = np.dtype(dtype)
        self._documents: list[TokenDocument] = []
        self._tokens = 0
        self.shards: list[dict[str, Any]] = []

    def add(self, documents: Iterable[TokenDocument]) -> None:
        for document in documents:
            self._documents.append(document)
            self._tokens += document.tokens.size
            if self._tokens >= SHARD_TOKENS:
                self.flush()

    def flush(self) -> None:
        if not self._documents:
            return
        documents, self._documents, self._tokens = self._documents, [], 0
        lengths = np.array([d.tokens.size for d in documents], np.int64)
        joined = join(documents)
        arrays: dict[str, Any] = {
            "tokens": joined.tokens.astype(self._dtype),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "ids": np.array([d.id for d in documents], np.uint64),
            "bytes": np.array([d.bytes for d in documents], np.int64),
        }
        if joined.loss_mask is not None:
            arrays["loss_mask"] = joined.loss_mask
        name = f"{self._source}/{self._split}-{len(self.shards):05d}.safetensors"
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(arrays, partial, metadata={"schema": str(SCHEMA)})
        checksum = file_checksum(partial)
        os.replace(partial, path)
        self.shards.append(
            {
                "file": name,
                "documents": len(documents),
                "tokens": int(lengths.sum()),
                "bytes": int(arrays["bytes"].sum()),
                "blake2b": checksum,
            }
        )


def file_checksum(path: Path) -> str:
    """128-bit BLAKE2b of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a temporary name and move it into place."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


# --- reading ---------------------------------------------------------------------------------


class TokenStore(NamedTuple):
    """An opened store: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    def documents(self, source: str, split: str) -> StoredDocuments:
        """Memory-map the shards of one source and split.

        Raises:
            DataError: the store has no such documents, or a shard is missing or cut short.
        """
        shards = self.manifest["sources"].get(source, {}).get(split, [])
        if not shards:
            raise DataError(
                f"store {self.folder} holds no {split} documents of source {source!r}; "
                f"raise splits.{split}, or prepare the store again with that source"
            )
        mapped = [map_shard(self.folder / shard["file"]) for shard in shards]
        for shard, arrays in zip(shards, mapped, strict=True):
            if arrays["ids"].size != shard["documents"] or arrays["tokens"].size != shard["tokens"]:
                raise DataError(
                    f"shard {self.folder / shard['file']} holds {arrays['ids'].size} documents, "
                    f"its manifest says {shard['documents']}; prepare the store again"
                )
        return StoredDocuments(
            tuple(TokenShard(a["tokens"], a.get("loss_mask")) for a in mapped),
            np.repeat(np.arange(len(mapped), dtype=np.int32), [a["ids"].size for a in mapped]),
            np.concatenate([a["offsets"][:-1] for a in mapped]),
            np.concatenate([np.diff(a["offsets"]) for a in mapped]),
            np.concatenate([a["ids"] for a in mapped]),
        )

    def total(self, source: str, split: str, what: str) -> int:
        """Total ``documents``, ``tokens`` or ``bytes`` of one source and split."""
        shards = self.manifest["sources"].get(source, {}).get(split, [])
        return sum(shard[what] for shard in shards)

    def verify(self) -> int:
        """Read every shard and compare checksums; returns how many were checked.

        Raises:
            DataError: a shard's bytes are not those that were written.
        """
        checked = 0
        for splits in self.manifest["sources"].values():
            for shard in (shard for shards in splits.values() for shard in shards):
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
            f"no prepared store at {folder}; run `dh prepare`, or set data.store=null to stream"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{folder / MANIFEST} is not JSON ({error}); prepare again") from None
    for key, expected in (("schema", SCHEMA), ("tokenizer", tokenizer), ("pipeline", pipeline)):
        if expected is not None and manifest.get(key) != expected:
            raise StateError(
                f"store {folder} was prepared with {key} {manifest.get(key)}, this run has "
                f"{expected}; prepare it again or use another folder (data.store=...)"
            )
    return TokenStore(folder, manifest)


_DTYPES = {"U16": "<u2", "U32": "<u4", "U64": "<u8", "I64": "<i8", "BOOL": "|b1"}


def map_shard(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a safetensors file as read-only memory maps.

    Raises:
        DataError: the file is missing, cut short, or not safetensors.
    """
    try:
        data = np.memmap(path, mode="r", dtype=np.uint8)
        (header_size,) = struct.unpack("<Q", data[:8].tobytes())
        header = json.loads(data[8 : 8 + header_size].tobytes())
        arrays = {}
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + header_size + at for at in tensor["data_offsets"])
            if end > data.size:
                raise ValueError(f"tensor {name!r} ends at byte {end} of {data.size}")
            arrays[name] = np.frombuffer(data[begin:end], dtype=_DTYPES[tensor["dtype"]])
        return arrays
    except FileNotFoundError:
        raise DataError(f"shard {path} is missing; prepare the store again") from None
    except (ValueError, KeyError, struct.error) as error:
        raise DataError(f"shard {path} is damaged ({error}); prepare the store again") from error
