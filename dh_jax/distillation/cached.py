"""CachedTeacher: a teacher's entries on disk, found again by the pieces of documents they are of.

A folder of safetensors shards and ``manifest.json``, as the token store has them. P pieces with n
entries, one for each target that is learnt::

    ids      [P] uint64     of the documents
    offsets  [P] int64      where in its document (in tokens) a piece begins
    starts   [P+1] int64    its entries are records[starts[p]:starts[p + 1]]
    lengths  [P] uint32     tokens of a piece
    crcs     [P] uint32     of its tokens and of its loss mask
    records_crc32           of every 256 records
    records  [n, W] uint8   see `codec`

Entries are joined by what a piece *is*, its document, place and tokens, while batches are put
together, so one cache serves every order, every mixture and any number of hosts and epochs. What
it does not hold exactly so is refused.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import grain
import numpy as np

from dh_jax.batch import Batch, Origins, TopKLogits
from dh_jax.data.store import manifest_checksum
from dh_jax.data.stores.shards import ShardChecks, check_blocks, map_shard
from dh_jax.distillation.codec import Layout, decode_into, layout
from dh_jax.errors import DataError, StateError

SCHEMA = 1
MANIFEST = "manifest.json"
BLOCK_ROWS = 256  # records guarded together, about 50 KiB
CURE = "make the cache again (`dh distill cache`)"


class Piece(NamedTuple):
    """What the cache holds of one piece of a document."""

    document_id: int
    offset: int  # in tokens
    length: int
    entries: TopKLogits  # [n, K], [n, K], [n]: of its learnt targets, in their order


class CachedTeacher(grain.sources.RandomAccessDataSource[Piece]):
    """Pieces of a cache, read at random; ``join`` gives a batch its teacher.

    Made by `open_cache`. ``grain.MapDataset.source(cached)`` goes through the pieces.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.layout: Layout = layout(
            manifest["codec"], manifest["entries"], manifest["vocabulary"], manifest["sampled"]
        )
        shards = manifest["shards"]
        paths = [folder / shard["file"] for shard in shards]
        mapped = [
            map_shard(path, shard["crc32"], CURE) for path, shard in zip(paths, shards, strict=True)
        ]
        self._records = [a["records"] for a in mapped]
        self._checks = [
            ShardChecks(
                path, (a["records"],), (a["records_crc32"],),
                np.zeros(a["records_crc32"].size, np.bool_), BLOCK_ROWS, CURE,
            )
            for path, a in zip(paths, mapped, strict=True)
        ]  # fmt: skip

        def column(name: str, dtype: Any) -> Any:
            return np.concatenate([np.zeros(0, dtype), *(a[name] for a in mapped)])

        self._ids, self._offsets = column("ids", np.uint64), column("offsets", np.int64)
        self._lengths, self._crcs = column("lengths", np.uint32), column("crcs", np.uint32)
        counts = [a["ids"].size for a in mapped]
        self._shards = np.repeat(np.arange(len(mapped)), counts)
        none = [np.zeros(0, np.int64)]
        self._starts = np.concatenate(none + [a["starts"][:-1] for a in mapped])
        self._stops = np.concatenate(none + [a["starts"][1:] for a in mapped])
        self._order = np.lexsort((self._offsets, self._ids))
        self._sorted_ids = self._ids[self._order]

    def __len__(self) -> int:
        """P."""
        return int(self._ids.size)

    def __getitem__(self, index: SupportsIndex) -> Piece:
        p = index.__index__()
        count = int(self._stops[p] - self._starts[p])
        K = self.layout.entries
        entries = TopKLogits(
            np.empty((count, K), np.int32), np.empty((count, K), np.float32),
            np.empty(count, np.float32),
        )  # fmt: skip
        decode_into(self._of(p), self.layout, *entries)
        return Piece(int(self._ids[p]), int(self._offsets[p]), int(self._lengths[p]), entries)

    def __repr__(self) -> str:
        return f"CachedTeacher({str(self.folder)!r}, {len(self)} pieces)"

    @property
    def fingerprint(self) -> str:
        """Of all that it holds."""
        return str(self.manifest["blake2b"])

    def join(self, batch: Batch, origins: Origins) -> Batch:
        """The same NumPy batch with the teacher's entries at every learnt target.

        At other tokens all mass is in the tail. Entries read for the first time are checked.

        Raises:
            StateError: a piece is not in the cache, or was cached with other tokens or another
                loss mask.
            DataError: entries are not those that were written.
        """
        B, T = batch.tokens_BT.shape
        K = self.layout.entries
        ids = np.zeros((B, T, K), np.int32)
        logp = np.full((B, T, K), -np.inf, np.float32)
        tail = np.zeros((B, T), np.float32)
        for b in range(B):
            end = 0
            for document, offset, length in zip(*(column[b] for column in origins), strict=True):
                if not length:
                    break
                begin, end = end, end + int(length)
                mask = batch.loss_mask_BT[b, begin:end]
                piece = self._find(document, offset, batch.tokens_BT[b, begin:end], mask)
                records = self._of(piece)
                if not len(records):
                    continue
                if mask[: len(records)].all():  # they stand one behind another
                    place: Any = slice(begin, begin + len(records))
                    decode_into(records, self.layout, ids[b, place], logp[b, place], tail[b, place])
                    continue
                place = begin + np.flatnonzero(mask)
                found = ids[b, place], logp[b, place], tail[b, place]
                decode_into(records, self.layout, *found)
                ids[b, place], logp[b, place], tail[b, place] = found
        return batch._replace(teacher=TopKLogits(ids, logp, tail))

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse a loader whose pieces would be others.

        Args:
            identity: of the loader; see `Loader.identity`.

        Raises:
            StateError: tokenizer, row length, cutting of long documents, or a source differ.
        """
        wanted = pieces_of(identity)
        for what in ("tokenizer", "row_length", "long_documents"):
            if self.manifest[what] != wanted[what]:
                raise StateError(
                    f"the teacher's cache {self.folder} was made with {what} "
                    f"{self.manifest[what]}, this run has {wanted[what]}; {CURE}"
                )
        for name, source in wanted["sources"].items():
            if self.manifest["sources"].get(name) != source:
                raise StateError(
                    f"the teacher's cache {self.folder} was made of another source {name!r} "
                    f"(its place, columns or splits have changed, or it is new); {CURE}"
                )

    def _of(self, piece: int) -> Any:
        shard = int(self._shards[piece])
        start, stop = int(self._starts[piece]), int(self._stops[piece])
        check_blocks(self._checks[shard], start, stop)
        return self._records[shard][start:stop]

    def _find(self, document: Any, offset: Any, tokens: Any, mask: Any) -> int:
        first = np.searchsorted(self._sorted_ids, document, "left")
        last = np.searchsorted(self._sorted_ids, document, "right")
        of_document = self._order[first:last]
        at = int(np.searchsorted(self._offsets[of_document], offset))
        where = f"tokens {int(offset)} to {int(offset) + tokens.size} of document {document:016x}"
        if at == of_document.size or self._offsets[of_document[at]] != offset:
            raise StateError(
                f"the teacher's cache {self.folder} holds no {where}: its text is new or has "
                f"changed; {CURE}"
            )
        piece = int(of_document[at])
        if self._crcs[piece] != crc_of(tokens, mask):
            raise StateError(
                f"the teacher's cache {self.folder} has {where} with other tokens or another loss "
                f"mask; {CURE}"
            )
        return piece


def open_cache(folder: str | Path, *, teacher: str | None = None) -> CachedTeacher:
    """Open a finished cache.

    Args:
        folder: where ``dh distill cache`` wrote it.
        teacher: expected fingerprint of the teacher; None accepts any.

    Raises:
        DataError: there is no finished cache, or it is damaged.
        StateError: it is of another teacher or schema.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"no finished cache of a teacher at {folder}; run `dh distill cache`"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); {CURE}") from None
    if manifest.get("schema") != SCHEMA or manifest.get("kind") != "teacher":
        raise StateError(f"{path} has schema {manifest.get('schema')}, expected {SCHEMA}; {CURE}")
    if manifest.get("blake2b") != manifest_checksum(manifest):
        raise DataError(f"{path} is damaged or was edited; {CURE}")
    if teacher is not None and manifest["teacher"] != teacher:
        raise StateError(
            f"the cache {folder} is of teacher {manifest['teacher']}, this run has {teacher}; "
            f"{CURE}, or leave the teacher out"
        )
    return CachedTeacher(folder, manifest)


def crc_of(tokens: Any, mask: Any) -> int:
    """CRC-32 of a piece's tokens and of which of its targets are learnt."""
    crc = zlib.crc32(np.ascontiguousarray(tokens, np.int32).data)
    return zlib.crc32(np.ascontiguousarray(mask, np.bool_).data, crc)


def pieces_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What of a loader's identity decides its pieces.

    Raises:
        StateError: documents are cut where the order of all others puts the ends of rows.
    """
    packing = identity["packing"]
    if packing["strategy"] == "concat":
        raise StateError(
            "packing.strategy concat cuts documents at other places in every epoch, so no cache "
            "of a teacher fits; take best_fit or first_fit, or a live teacher"
        )
    return {
        "tokenizer": identity["tokenizer"],
        "row_length": identity["row_length"],
        "long_documents": packing["long_documents"],
        "sources": identity["sources"],
    }
