"""Shard files: safetensors whose every byte is guarded by a checksum that reading can afford.

A flipped byte must be noticed when it is read, not only when somebody asks for `verify`. The
tokens (and their mask) are cut into blocks of 32,768 tokens, each with its CRC-32 in the shard
itself; everything before the tokens, tables included, has one CRC-32 in the manifest. A CRC-32
finds every burst of up to 32 flipped bits (Peterson and Brown 1961), so a changed byte always.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from dh_jax.errors import DataError

SCHEMA = 2
BLOCK_TOKENS = 32_768  # guarded together: 64 KiB of 16-bit tokens, about what a page fault reads
GUARDED = ("tokens", "loss_mask", "records")  # stand last in the file; all before them is the index

_NAMES = {"U8": "|u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I64": "<i8", "BOOL": "|b1"}
_CODES = {np.dtype(name): code for code, name in _NAMES.items()}


class ShardChecks(NamedTuple):
    """What `check_blocks` needs to guard the N blocks of one shard."""

    path: Path
    arrays: tuple[npt.NDArray[Any], ...]  # tokens and, if there is one, the mask; memory maps
    tables: tuple[npt.NDArray[np.uint32], ...]  # [N] each
    checked_N: npt.NDArray[np.bool_]  # written by check_blocks; threads may share it
    rows: int = BLOCK_TOKENS  # guarded together
    cure: str = "prepare the store again"


def check_blocks(checks: ShardChecks, start: int, stop: int) -> None:
    """Check tokens ``start:stop`` of a shard against their checksums, each block only once.

    To be called before the tokens are used. The first call on a block reads it whole; later
    calls cost one look at a bitmap.

    Raises:
        DataError: a block's bytes are not those that were written.
    """
    for block in range(start // checks.rows, -(-stop // checks.rows)):
        if not checks.checked_N[block]:
            _check_block(checks, block)


def _check_block(checks: ShardChecks, block: int) -> None:
    begin, end = block * checks.rows, (block + 1) * checks.rows
    for array, table in zip(checks.arrays, checks.tables, strict=True):
        if zlib.crc32(array[begin:end].data) != table[block]:
            raise DataError(
                f"shard {checks.path} is damaged: tokens {begin} to {min(end, len(array))} are not "
                f"those that were written; {checks.cure}"
            )
    checks.checked_N[block] = True


class BlockGuard:
    """Checks the blocks under many documents at once; one that was checked costs nothing more."""

    def __init__(self, checks: Sequence[ShardChecks]):
        self._checks = checks
        sizes = [shard.checked_N.size for shard in checks]
        self._firsts_S = np.cumsum([0, *sizes[:-1]])  # number of each shard's first block
        self._checked = np.zeros(sum(sizes), np.bool_)

    def check(self, shards_D: Any, starts_D: Any, lengths_D: Any) -> None:
        """Check every block that holds a token of these documents.

        Raises:
            DataError: a block's bytes are not those that were written.
        """
        if self._checked.all():
            return
        firsts_D = self._firsts_S[shards_D]
        for block in _unchecked(self._checked, firsts_D, starts_D, lengths_D, BLOCK_TOKENS):
            shard = int(np.searchsorted(self._firsts_S, block, "right")) - 1
            begin = int(block - self._firsts_S[shard]) * BLOCK_TOKENS
            check_blocks(self._checks[shard], begin, begin + 1)
            self._checked[block] = True


@numba.njit(cache=True, nogil=True)
def _unchecked(checked, firsts_D, starts_D, lengths_D, size):  # type: ignore[no-untyped-def]
    """Numbers of unchecked blocks under the documents, each once, in rising order."""
    found = np.empty(16, np.int64)
    count = 0
    for d in range(starts_D.size):
        last = starts_D[d] + max(lengths_D[d] - 1, 0)
        for block in range(firsts_D[d] + starts_D[d] // size, firsts_D[d] + last // size + 1):
            if block < checked.size and not checked[block]:
                if count == found.size:
                    found = np.concatenate((found, found))
                found[count] = block
                count += 1
    return np.unique(found[:count])


# --- writing ---------------------------------------------------------------------------------


def write_shard(
    path: Path,
    documents: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    tokens: npt.NDArray[Any],
    loss_mask: npt.NDArray[np.bool_] | None = None,
    *,
    minhash: npt.NDArray[np.uint32] | None = None,
) -> dict[str, Any]:
    """Write D documents of n tokens atomically; the same arguments give the same bytes.

    Args:
        path: of the file; its folder is made.
        documents: [D] ids.
        lengths: [D] tokens of each.
        sizes: [D] UTF-8 bytes of each text.
        tokens: [n] uint16 or uint32, end to end.
        loss_mask: [n], or None if every token is learnt.
        minhash: [D, P] signatures, in intermediate shards only.

    Returns:
        What a manifest keeps of it: counts, ``blake2b`` of the file, ``crc32`` of its index.

    Raises:
        DataError: the disk is full.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "ids": documents,
        "bytes": sizes,
    }
    if minhash is not None:
        arrays["minhash"] = minhash
    guarded = {"tokens": tokens} | ({} if loss_mask is None else {"loss_mask": loss_mask})
    checksums = write_arrays(path, arrays, guarded)
    counts = {"documents": documents.size, "tokens": tokens.size, "bytes": sizes.sum()}
    return {name: int(count) for name, count in counts.items()} | checksums


def write_arrays(
    path: Path,
    arrays: dict[str, npt.NDArray[Any]],
    guarded: Mapping[str, npt.NDArray[Any]],
    rows: int = BLOCK_TOKENS,
) -> dict[str, Any]:
    """Write a safetensors file atomically; the same arguments give the same bytes.

    Args:
        path: of the file; its folder is made.
        arrays: the index, wide types first.
        guarded: what is read at random, names of `GUARDED`; each gets a CRC-32 for every
            ``rows`` rows, as ``{name}_crc32`` in the index.
        rows: guarded together.

    Returns:
        ``blake2b`` of the file, ``crc32`` of all before what is guarded.

    Raises:
        DataError: the disk is full.
    """
    for name, array in guarded.items():
        blocks = range(0, len(array), rows)
        crcs = [zlib.crc32(np.ascontiguousarray(array[at : at + rows]).data) for at in blocks]
        arrays = arrays | {f"{name}_crc32": np.array(crcs, np.uint32)}
    header = _header({**arrays, **guarded})
    checksum = hashlib.blake2b(header, digest_size=16)
    crc = zlib.crc32(header)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(header)
        for name, array in {**arrays, **guarded}.items():
            data = np.ascontiguousarray(array).data.cast("B") if array.size else b""
            file.write(data)
            checksum.update(data)
            crc = crc if name in guarded else zlib.crc32(data, crc)
        file.flush()
        os.fsync(file.fileno())
    return {"blake2b": checksum.hexdigest(), "crc32": crc}


def _header(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The header of a safetensors file with these arrays in this order. Wide types come first,
    so every array is aligned."""
    tensors: dict[str, Any] = {"__metadata__": {"schema": str(SCHEMA)}}
    at = 0
    for name, array in arrays.items():
        offsets = [at, at := at + array.nbytes]
        tensors[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, moved into its place on success and removed on failure.

    Raises:
        DataError: see `explained_disk`.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with explained_disk(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def explained_disk(path: Path) -> Iterator[None]:
    """Say in one line what a full disk means for whoever writes ``path``.

    Raises:
        DataError: the disk is full, over quota, or the file over a limit.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(
            f"cannot write {path}: {error.strerror}; free some space or choose another folder "
            "(data.store=...), then run the same command again: finished pieces are kept"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a temporary name and, once it is on the disk, move it into place."""
    with replacing(path) as partial, partial.open("w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def file_checksum(path: Path) -> str:
    """128-bit BLAKE2b of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# --- reading ---------------------------------------------------------------------------------


def map_shard(
    path: Path, crc32: int | None = None, cure: str = "prepare the store again"
) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a shard as read-only memory maps.

    Args:
        path: of the file.
        crc32: of its index, which is read and compared; None: it is not.
        cure: what an error tells the user to do.

    Raises:
        DataError: the file is missing, cut short, damaged, or not safetensors.
    """
    try:
        data = np.memmap(path, mode="r", dtype=np.uint8)
        (header_size,) = struct.unpack("<Q", data[:8].tobytes())
        tensors = json.loads(data[8 : 8 + header_size].tobytes())
        arrays = {}
        index_end = data.size
        for name, tensor in tensors.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + header_size + at for at in tensor["data_offsets"])
            if end > data.size:
                raise ValueError(f"tensor {name!r} ends at byte {end} of {data.size}")
            if name in GUARDED:
                index_end = min(index_end, begin)
            array = np.frombuffer(data[begin:end], dtype=_NAMES[tensor["dtype"]])
            arrays[name] = array.reshape(tensor["shape"])
        if crc32 is not None and zlib.crc32(data[:index_end].data) != crc32:
            raise ValueError("its index is not the one that was written")
        return arrays
    except FileNotFoundError:
        raise DataError(f"shard {path} is missing; {cure}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise DataError(f"shard {path} is damaged ({error}); {cure}") from error


def checks_of(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> ShardChecks:
    """What guards a shard that `map_shard` opened.

    Raises:
        DataError: its tables do not fit its tokens.
    """
    names = [name for name in GUARDED if name in arrays]
    blocks = -(-arrays["tokens"].size // BLOCK_TOKENS)
    tables = tuple(arrays.get(f"{name}_crc32", np.zeros(0, np.uint32)) for name in names)
    if any(table.size != blocks for table in tables):
        raise DataError(
            f"shard {path} has no checksums for its {blocks} blocks; prepare the store again"
        )
    return ShardChecks(
        path, tuple(arrays[name] for name in names), tables, np.zeros(blocks, np.bool_)
    )
