"""Local files as records: JSONL (plain, .gz, .zst), Parquet, and trees of text files."""

from __future__ import annotations

import glob
import hashlib
import os
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dh_jax.config import FilesSource
from dh_jax.data.records import (
    Fault,
    Record,
    decode,
    fail,
    missing_column,
    needed_columns,
    parse_json,
)
from dh_jax.errors import ConfigError

ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
BLOCK = 1 << 18  # bytes of a compressed file read at once
ROWS = 512  # Parquet rows turned into Python objects at once


class Found(NamedTuple):
    """A file of a source."""

    path: str
    name: str  # relative to its pattern's folder, so the same on every machine
    size: int  # bytes


class Step(NamedTuple):
    """A record and where to go on after it; ``offset`` is None at the end of the file."""

    record: Record
    offset: int | None
    row: int


Steps = Generator[Step, None, None]


class FileRecords:
    """The records of some files, one file after another; see `RecordStream`.

    Args:
        name: of the source, for errors.
        spec: which files, of which format.
        order: from the number of files to the order in which to read them.
    """

    def __init__(self, name: str, spec: FilesSource, order: Callable[[int], Sequence[int]]) -> None:
        self._files = find_files(name, spec.paths, spec.include)
        self._order = order(len(self._files))
        self._format = spec.format
        self._columns = needed_columns(spec.text)
        self._at = (0, 0, 0)  # place in the order, offset, row
        self._steps: Steps | None = None

    def __next__(self) -> Record:
        while self._at[0] < len(self._order):
            place, offset, row = self._at
            if self._steps is None:
                path = self._files[self._order[place]].path
                self._steps = read_file(path, self._format, self._columns, offset, row)
            step = next(self._steps, None)
            if step is not None and step.offset is not None:
                self._at = (place, step.offset, step.row)
                return step.record
            self._at = (place + 1, 0, 0)
            self.close()
            if step is not None:
                return step.record
        raise StopIteration

    def identity(self) -> dict[str, str]:
        listing = "\n".join(f"{file.name}\t{file.size}" for file in self._files)
        return {"files": hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()}

    def cursor(self) -> dict[str, Any]:
        place, offset, row = self._at
        return {"file": place, "offset": offset, "row": row}

    def seek(self, cursor: Mapping[str, Any]) -> None:
        self.close()
        self._at = (int(cursor["file"]), int(cursor["offset"]), int(cursor["row"]))

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None


def find_files(name: str, patterns: Sequence[str], include: str) -> list[Found]:
    """The files that ``patterns`` name, each once: in the patterns' order, then by name.

    A pattern is a file, a folder (its files that match ``include``) or a glob; ``~`` and
    environment variables are expanded. Names that begin with a dot match only if written out.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    found: dict[str, Found] = {}
    for pattern in patterns:
        path = os.path.expandvars(os.path.expanduser(pattern))
        if os.path.isfile(path):
            root, names = os.path.split(path)[0], [os.path.basename(path)]
        elif os.path.isdir(path):
            root, names = path, glob.glob(include, root_dir=path, recursive=True)
        else:
            root = os.path.dirname(path[: _magic(path)])
            names = [os.path.relpath(p, root or ".") for p in glob.glob(path, recursive=True)]
        names = [n for n in sorted(names) if os.path.isfile(os.path.join(root, n))]
        if not names:
            inside = f" (include: {include!r})" if os.path.isdir(path) else ""
            raise ConfigError(
                f"source {name!r}: no file matches {pattern!r}{inside}, sought as "
                f"{os.path.abspath(path)!r}; correct paths"
            )
        for each in names:
            full = os.path.join(root, each)
            file = Found(full, each.replace(os.sep, "/"), os.path.getsize(full))
            found.setdefault(os.path.realpath(full), file)
    return list(found.values())


def _magic(path: str) -> int:
    """Where the first wildcard of a glob is; its length if there is none."""
    return min((path.index(c) for c in "*?[" if c in path), default=len(path))


def read_file(path: str, format: str, columns: Sequence[str], offset: int, row: int) -> Steps:
    """The records of one file, from byte ``offset`` (of the decompressed text) and ``row`` on."""
    stem, ending = os.path.splitext(path)
    if ending in (".gz", ".zst"):
        ending = os.path.splitext(stem)[1]
    kind = ENDINGS.get(ending.lower(), "text") if format == "auto" else format
    if kind == "parquet":
        return _read_parquet(path, columns, row)
    if kind == "jsonl":
        return _read_jsonl(path, offset, row)
    return _read_tree(path)


def _read_jsonl(path: str, offset: int, row: int) -> Steps:
    try:
        for line in _lines(path, offset):
            row += 1
            offset += len(line)
            yield Step(Record(partial(parse_json, line), f"{path}:{row}"), offset, row)
    except (EOFError, OSError, zlib.error, _zstd_error()) as error:
        yield Step(Record(partial(fail, _file_fault(error, row)), f"{path}:{row + 1}"), None, row)


def _read_tree(path: str) -> Steps:
    yield Step(Record(partial(_read_text, path), path), None, 0)


def _read_text(path: str) -> str:
    try:
        return decode(b"".join(_lines(path, 0)))
    except (EOFError, OSError, zlib.error, _zstd_error()) as error:
        raise _file_fault(error, 0) from error


def _file_fault(error: Exception, row: int) -> Fault:
    after = f" after {row} whole lines" if row else ""
    if isinstance(error, EOFError):
        return Fault("truncated_file", f"the file ends early{after}")
    if isinstance(error, OSError):
        return Fault("unreadable_file", f"cannot be read{after} ({error})")
    return Fault("corrupt_file", f"cannot be decompressed{after} ({error})")


def _lines(path: str, offset: int) -> Iterator[bytes]:
    """Lines with their ends, from byte ``offset`` of the decompressed text on."""
    ending = os.path.splitext(path)[1].lower()
    with open(path, "rb", buffering=BLOCK) as file:
        if ending not in (".gz", ".zst"):
            file.seek(offset)
            yield from file
            return
        make = _zstd if ending == ".zst" else partial(zlib.decompressobj, wbits=31)
        rest = b""
        for block in _inflate(iter(partial(file.read, BLOCK), b""), make):
            if offset >= len(block):  # already read before the resume
                offset -= len(block)
                continue
            *lines, rest = (rest + block[offset:]).split(b"\n")
            offset = 0
            yield from (line + b"\n" for line in lines)
        if rest:
            yield rest


def _inflate(blocks: Iterator[bytes], make: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress a file of one or more gzip members or Zstandard frames.

    The standard readers differ on a truncated file: Zstandard's ends without an error.

    Raises:
        EOFError: the last member is not whole.
    """
    inflater = make()
    inside = False
    for block in blocks:
        while block:
            yield inflater.decompress(block)
            inside = not inflater.eof
            block = b""
            if not inside:
                block, inflater = inflater.unused_data, make()
    if inside:
        raise EOFError


def _zstd() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(".zst files need the package zstandard; pip install zstandard") from error
    return zstandard.ZstdDecompressor().decompressobj()


def _zstd_error() -> type[Exception]:
    try:
        from zstandard import ZstdError
    except ImportError:
        return zlib.error
    return ZstdError


def _read_parquet(path: str, columns: Sequence[str], row: int) -> Steps:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:  # the index is at the end, so nothing is readable
        reason = "unreadable_file" if isinstance(error, OSError) else "truncated_file"
        fault = Fault(reason, f"not a whole Parquet file ({_first_line(error)})")
        yield Step(Record(partial(fail, fault), path), None, 0)
        return
    with file:
        try:
            for load in _parquet_rows(file, columns, row):
                yield Step(Record(load, f"{path}:row {row}"), 0, row + 1)
                row += 1
        except (pa.ArrowException, OSError) as error:
            fault = Fault("corrupt_file", f"Parquet damaged here ({_first_line(error)})")
            yield Step(Record(partial(fail, fault), f"{path}:row {row}"), None, row)


def _parquet_rows(
    file: pq.ParquetFile, columns: Sequence[str], start: int
) -> Iterator[Callable[[], Any]]:
    """One ``load`` for each row from ``start`` on; row groups before it are not read."""
    there = file.schema_arrow.names
    for name in columns:
        if name not in there:
            load = partial(fail, missing_column(name, there))
            yield from (load for _ in range(start, file.metadata.num_rows))
            return
    for group in range(file.num_row_groups):
        length = file.metadata.row_group(group).num_rows
        if start >= length:
            start -= length
            continue
        for batch in file.iter_batches(ROWS, row_groups=[group], columns=list(columns)):
            if start < batch.num_rows:
                yield from _batch_rows(batch.slice(start))
            start = max(0, start - batch.num_rows)


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Callable[[], Any]]:
    try:
        return (partial(_given, row) for row in batch.to_pylist())
    except UnicodeDecodeError:  # one bad string spoils the batch, so go row by row
        return (partial(_one_row, batch, i) for i in range(batch.num_rows))


def _given(row: dict[str, Any]) -> dict[str, Any]:
    return row


def _one_row(batch: pa.RecordBatch, i: int) -> dict[str, Any]:
    try:
        return dict(batch.slice(i, 1).to_pylist()[0])
    except UnicodeDecodeError as error:
        raise Fault("invalid_utf8", f"invalid UTF-8 at byte {error.start}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
