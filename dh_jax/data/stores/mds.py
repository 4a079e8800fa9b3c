"""MosaicML's MDS shards as an index of documents: a folder with ``index.json``, one column of
tokens (bytes, or a NumPy array), uncompressed or Zstandard.

A shard is little-endian: the number of samples n (u32), n + 1 offsets (u32, in bytes), JSON, and
the samples. A sample is the sizes (u32) of its columns of varying size and then the columns. An
array begins with its type and its shape, as far as the column's encoding leaves them open.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dh_jax.data.packing import TokenShard
from dh_jax.data.stores.token_index import TOKEN_TYPES, TokenIndex, fingerprint_of, map_bytes
from dh_jax.errors import ConfigError, DataError, UserError

COLUMNS = ("tokens", "input_ids")
ARRAY_TYPES = {8: "uint8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64",
               65: "int64"}  # fmt: skip
Ints = npt.NDArray[np.int64]


def read_mds(
    path: str, column: str | None = None, dtype: str | None = None, cache: str | None = None
) -> TokenIndex:
    """Map the shards of a folder and read their indices.

    With one column, of bytes, only the indices are read. Arrays are entered at every sample,
    since their headers say where the tokens begin.

    Args:
        path: the folder with ``index.json``.
        column: the column of tokens; default ``tokens`` or ``input_ids``, whichever is there.
        dtype: of tokens stored as bytes.
        cache: folder that takes the decompressed shards of a compressed data set.

    Raises:
        ConfigError: column, dtype or cache must be given.
        DataError: a file is missing, damaged or of another format.
    """
    folder = Path(path)
    try:
        raw = (folder / "index.json").read_bytes()
        listed = json.loads(raw)["shards"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder / 'index.json'} is no index of MDS shards ({error}); correct the path"
        ) from error
    shards: list[TokenShard] = []
    numbers, starts, lengths = [], [], []
    for entry in listed:
        try:
            data = map_bytes(_uncompressed(folder, entry, cache))
            begins_D, ends_D, type_ = _spans(data, entry, column, dtype)
        except UserError:
            raise
        except (KeyError, IndexError, ValueError) as error:
            name = entry.get("raw_data", {}).get("basename")
            raise DataError(
                f"MDS shard {folder / str(name)} is damaged ({error}); restore it from its source"
            ) from error
        item = np.dtype(type_).itemsize
        if shards and item != shards[0].tokens.itemsize:
            raise DataError(
                f"MDS shard {folder / entry['raw_data']['basename']} holds tokens of {type_}, the "
                f"shards before it of {shards[0].tokens.dtype}; write all shards with one type"
            )
        # Samples lie at any byte, so there is one view for each offset from whole tokens in use.
        number_D = np.empty(begins_D.size, np.int32)
        for shift in np.unique(begins_D % item).tolist():
            number_D[begins_D % item == shift] = len(shards)
            whole = (data.size - shift) // item * item
            shards.append(TokenShard(data[shift : shift + whole].view(type_)))
        numbers.append(number_D)
        starts.append(begins_D // item)
        lengths.append((ends_D - begins_D) // item)
    if not shards:
        raise DataError(f"{folder / 'index.json'} lists no shard with a sample")
    return TokenIndex(
        tuple(shards),
        np.concatenate(numbers),
        np.concatenate(starts),
        np.concatenate(lengths),
        fingerprint_of(raw),
    )


def _spans(
    data: npt.NDArray[np.uint8], entry: dict[str, Any], column: str | None, dtype: str | None
) -> tuple[Ints, Ints, str]:
    """First and last byte of each sample's tokens, and their type."""
    names, sizes = entry["column_names"], entry["column_sizes"]
    known = [column] if column else COLUMNS
    name = next((n for n in known if n in names), None)
    if entry.get("format") != "mds" or name is None:
        raise ConfigError(
            f"no column {' or '.join(map(repr, known))} in {entry.get('format')} shards with "
            f"{', '.join(names)}; set column"
        )
    count = int(data[:4].view("<u4")[0])
    if count != entry["samples"]:
        raise ValueError(f"{count} samples, its index says {entry['samples']}")
    offsets = data[4 : 4 + 4 * (count + 1)].view("<u4").astype(np.int64)
    if offsets.size != count + 1 or (count and offsets[-1] > data.size):
        raise ValueError(f"it ends at byte {data.size} of {offsets[-1:].tolist()}")
    begins_D, ends_D = offsets[:-1], offsets[1:]
    varying = [n for n, size in zip(names, sizes, strict=True) if not size]
    at_D = begins_D + 4 * len(varying)
    if len(names) > 1:
        for n, size in zip(names, sizes, strict=True):
            place_D = begins_D + 4 * varying.index(n) if n in varying else None
            size_D = _numbers(data, place_D, 4) if place_D is not None else size
            if n == name:
                ends_D = at_D + size_D
                break
            at_D = at_D + size_D
    encoding = entry["column_encodings"][names.index(name)]
    if encoding == "bytes":
        type_ = dtype
    else:
        kind, _, options = encoding.partition(":")
        if kind != "ndarray":
            raise ConfigError(f"column {name!r} holds {encoding}, not bytes or ndarray; set column")
        type_, at_D = _array_headers(data, at_D, options)
    if type_ not in TOKEN_TYPES:
        raise ConfigError(
            f"column {name!r} ({encoding}): dtype {type_!r}; set dtype to one of "
            f"{', '.join(TOKEN_TYPES)}"
        )
    if ((ends_D - at_D) % np.dtype(type_).itemsize).any():
        raise ConfigError(f"column {name!r} does not hold whole tokens of {type_}; correct dtype")
    return at_D, ends_D, type_


def _array_headers(
    data: npt.NDArray[np.uint8], at_D: Ints, options: str
) -> tuple[str | None, Ints]:
    """Type of the arrays, and where their values begin."""
    type_, _, shape = options.partition(":")
    found: str | None = type_
    if not type_:
        codes = np.unique(data[at_D]).tolist()
        if len(codes) > 1:
            raise ValueError(f"arrays of several types, {codes}")
        found = ARRAY_TYPES.get(codes[0]) if codes else None
        at_D = at_D + 1
    if not shape:
        first_D = data[at_D].astype(np.int64)
        at_D = at_D + 1 + (first_D >> 2) * (1 << (first_D & 3))
    return found, at_D


def _numbers(data: npt.NDArray[np.uint8], at_D: Ints, width: int) -> Ints:
    """Little-endian unsigned integers of ``width`` bytes at any places."""
    bytes_DW = data[at_D[:, None] + np.arange(width)].astype(np.int64)
    return bytes_DW @ (1 << (8 * np.arange(width, dtype=np.int64)))


def _uncompressed(folder: Path, entry: dict[str, Any], cache: str | None) -> Path:
    """The shard's file, decompressed into the cache if it is not there as it is."""
    name, zipped = entry["raw_data"]["basename"], entry.get("zip_data")
    if zipped is None or (folder / name).is_file():
        return folder / name
    if not str(entry.get("compression", "")).startswith("zstd"):
        raise ConfigError(
            f"{folder / zipped['basename']} is compressed with {entry.get('compression')}; "
            "decompress it, or write it with zstd"
        )
    if cache is None:
        raise ConfigError(
            f"{folder / zipped['basename']} is compressed; set cache to a folder that may take "
            f"the decompressed shards ({entry['raw_data']['bytes']} bytes for this one)"
        )
    import zstandard

    target = Path(cache) / name
    if not target.is_file() or target.stat().st_size != entry["raw_data"]["bytes"]:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with (folder / zipped["basename"]).open("rb") as source, partial.open("wb") as sink:
                zstandard.ZstdDecompressor().copy_stream(source, sink)
            if partial.stat().st_size != entry["raw_data"]["bytes"]:
                raise ValueError("it ends early")
            os.replace(partial, target)
        except (OSError, zstandard.ZstdError) as error:
            raise ValueError(f"{zipped['basename']}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
    return target
