"""One file, or a part of one, as records: JSONL and text (plain, .gz, .zst), Parquet, Arrow.

Every reader is a generator of `Step` that starts at a byte (of the decompressed text) and a row,
and reads a piece's part of its file where the format can be entered in the middle.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dh_jax.data.reading.pieces import Piece
from dh_jax.data.reading.records import Fault, Record, decode, fail, missing_column, parse_json
from dh_jax.data.reading.retry import NetworkFault
from dh_jax.data.reading.storage import LOCAL_BLOCK, Storage, local_copy, open_blocks, open_random
from dh_jax.errors import ConfigError

ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}
RANGED = ("jsonl", "parquet", "array_record", "array_record_text")  # parts need not be read whole
ROWS = 512  # rows turned into Python objects at once


class Step(NamedTuple):
    """A record and where to go on after it; ``offset`` is None at the end of the file."""

    record: Record
    offset: int | None
    row: int  # records of the file up to here, this one included


Steps = Generator[Step, None, None]


def kind_of(path: str, format: str) -> str:
    """The format of a file, by its ending if ``format`` is auto."""
    if format != "auto":
        return format
    stem, ending = os.path.splitext(path)
    if ending.lower() in (".gz", ".zst"):
        ending = os.path.splitext(stem)[1]
    return ENDINGS.get(ending.lower(), "text")


def read_kind(
    kind: str, piece: Piece, columns: Sequence[str], storage: Storage, offset: int, row: int
) -> Steps:
    """The records of a piece from byte ``offset`` of the decompressed text and ``row`` on."""
    if kind == "jsonl":
        return _read_jsonl(piece, storage, offset, row)
    if kind == "parquet":
        return _read_parquet(piece, columns, storage, row)
    if kind == "arrow":
        return _read_arrow(piece, columns, storage, row)
    if kind == "text":
        return _read_tree(piece, storage)
    return _read_array_record(piece, storage, row, text=kind == "array_record_text")


def _only(reason: str, message: str, where: str, row: int) -> Step:
    """The last step of a file: a record that stands for what is wrong with it."""
    return Step(Record(partial(fail, Fault(reason, message)), where), None, row + 1)


def _share(total: int, piece: Piece) -> tuple[int, int]:
    """Begin and end of a piece's part among ``total`` bytes or rows."""
    return total * piece.part // piece.parts, total * (piece.part + 1) // piece.parts


# --- lines and text --------------------------------------------------------------------------


def _read_jsonl(piece: Piece, storage: Storage, offset: int, row: int) -> Steps:
    first, end = _share(piece.size, piece) if piece.parts > 1 else (0, None)
    try:
        with open_blocks(piece.path, piece.size, storage) as file:
            if first and not offset:  # a line belongs to the part in which it begins
                file.seek(first - 1)
                offset = first - 1 + len(file.readline())
            for line in _lines(file, piece.path, offset):
                if end is not None and offset >= end:
                    return
                where = f"byte {offset}" if piece.parts > 1 else str(row + 1)
                row += 1
                offset += len(line)
                yield Step(Record(partial(parse_json, line), f"{piece.path}:{where}"), offset, row)
    except (EOFError, OSError, zlib.error, _zstd_error()) as error:
        fault = _file_fault(error, row)
        yield Step(Record(partial(fail, fault), f"{piece.path}:{row + 1}"), None, row + 1)


def _read_tree(piece: Piece, storage: Storage) -> Steps:
    yield Step(Record(partial(_read_text, piece, storage), piece.path), None, 1)


def _read_text(piece: Piece, storage: Storage) -> str:
    try:
        with open_blocks(piece.path, piece.size, storage) as file:
            return decode(b"".join(_lines(file, piece.path, 0)))
    except (EOFError, OSError, zlib.error, _zstd_error()) as error:
        raise _file_fault(error, 0) from error


def _file_fault(error: Exception, row: int) -> Fault:
    after = f" after {row} whole lines" if row else ""
    if isinstance(error, EOFError):
        return Fault("truncated_file", f"the file ends early{after}")
    if isinstance(error, OSError):
        return Fault("unreadable_file", f"cannot be read{after} ({error})")
    return Fault("corrupt_file", f"cannot be decompressed{after} ({error})")


def _lines(file: BinaryIO, path: str, offset: int) -> Iterator[bytes]:
    """Lines with their ends, from byte ``offset`` of the decompressed text on."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".gz", ".zst"):
        file.seek(offset)
        yield from file
        return
    make = _zstd if ending == ".zst" else partial(zlib.decompressobj, wbits=31)
    rest = b""
    for block in _inflate(iter(partial(file.read, LOCAL_BLOCK), b""), make):
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


# --- tables ----------------------------------------------------------------------------------


def _read_parquet(piece: Piece, columns: Sequence[str], storage: Storage, row: int) -> Steps:
    path = piece.path
    try:
        opened = open_random(path, piece.size, storage)
        file = pq.ParquetFile(opened, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:  # the index is at the end, so nothing is readable
        if isinstance(error, OSError):
            yield _only("unreadable_file", f"cannot be read ({_first_line(error)})", path, row)
        else:
            said = f"not a whole Parquet file ({_first_line(error)})"
            yield _only("truncated_file", said, path, row)
        return
    with file:
        begin, end = _parquet_range(file, piece)
        row = max(row, begin)
        try:
            for load in _parquet_rows(file, columns, row, end):
                yield Step(Record(load, f"{path}:row {row}"), 0, row + 1)
                row += 1
        except (pa.ArrowException, OSError) as error:
            yield _spoilt(error, "Parquet", path, row)


def _spoilt(error: Exception, format: str, path: str, row: int) -> Step:
    """The last step of a table that cannot be read on from ``row``."""
    where, said = f"{path}:row {row}", _first_line(error)
    if isinstance(error, NetworkFault | FileNotFoundError | PermissionError):
        return _only("unreadable_file", f"cannot be read ({said})", where, row)
    return _only("corrupt_file", f"{format} damaged here ({said})", where, row)


def _parquet_range(file: pq.ParquetFile, piece: Piece) -> tuple[int, int]:
    """First and last row of a part: whole row groups if there are enough, else rows."""
    if file.num_row_groups < piece.parts:
        return _share(file.metadata.num_rows, piece)
    starts = [0]
    for group in range(file.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    first, last = _share(file.num_row_groups, piece)
    return starts[first], starts[last]


def _parquet_rows(
    file: pq.ParquetFile, columns: Sequence[str], start: int, end: int
) -> Iterator[Callable[[], Any]]:
    """One ``load`` for each row from ``start`` to ``end``; row groups outside are not read."""
    there = file.schema_arrow.names
    for name in columns:
        if name not in there:
            load = partial(fail, missing_column(name, there))
            yield from (load for _ in range(start, end))
            return
    at = 0
    for group in range(file.num_row_groups):
        length = file.metadata.row_group(group).num_rows
        if at + length <= start or at >= end:
            at += length
            continue
        for batch in file.iter_batches(ROWS, row_groups=[group], columns=list(columns)):
            begin, stop = max(0, start - at), min(batch.num_rows, end - at)
            if begin < stop:
                yield from _batch_rows(batch.slice(begin, stop - begin))
            at += batch.num_rows


def _read_arrow(piece: Piece, columns: Sequence[str], storage: Storage, start: int) -> Steps:
    """An Arrow stream (what ``datasets`` saves) or file, batch by batch."""
    path, row = piece.path, 0
    try:
        with closing(_open_arrow(piece, storage)) as file:
            for batch in _arrow_batches(file):
                row += batch.num_rows
                if row <= start:
                    continue
                at = max(start, row - batch.num_rows)
                there = batch.schema.names
                lacking = next((name for name in columns if name not in there), None)
                if lacking is not None:
                    absent: Callable[[], Any] = partial(fail, missing_column(lacking, there))
                    loads: Iterator[Callable[[], Any]] = (absent for _ in range(at, row))
                else:
                    chosen = batch.select(list(columns)).slice(at - row + batch.num_rows)
                    loads = (
                        each
                        for begin in range(0, chosen.num_rows, ROWS)
                        for each in _batch_rows(chosen.slice(begin, ROWS))
                    )
                for load in loads:
                    yield Step(Record(load, f"{path}:row {at}"), 0, at + 1)
                    at += 1
    except EOFError:
        yield _only("truncated_file", "the Arrow file ends early", f"{path}:row {row}", row)
    except (pa.ArrowException, OSError) as error:
        yield _spoilt(error, "Arrow", path, row)


def _open_arrow(piece: Piece, storage: Storage) -> Any:
    if isinstance(opened := open_random(piece.path, piece.size, storage), str):
        return pa.memory_map(opened)
    return pa.PythonFile(open_blocks(piece.path, piece.size, storage), mode="r")


def _arrow_batches(file: Any) -> Iterator[pa.RecordBatch]:
    whole = file.read(6) == b"ARROW1"
    file.seek(0)
    if not whole:
        yield from _stream_batches(file)
        return
    reader = pa.ipc.open_file(file)
    yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _stream_batches(file: Any) -> Iterator[pa.RecordBatch]:
    """A stream ends with a mark of eight bytes; without it, the rest is missing."""
    reader = pa.ipc.open_stream(file)
    yield from reader
    file.seek(file.size() - 8)
    if file.read(8) != b"\xff\xff\xff\xff\0\0\0\0":
        raise EOFError


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


# --- ArrayRecord -----------------------------------------------------------------------------


def _read_array_record(piece: Piece, storage: Storage, row: int, text: bool) -> Steps:
    """Records of JSON objects, or of plain text. The reader needs a local file."""
    parse: Callable[[bytes], Any] = decode if text else parse_json
    path = piece.path
    try:
        with (
            local_copy(path, piece.size, storage) as local,
            _array_record(local) as reader,
        ):
            if not reader.ok():  # its index is at the end
                os.stat(local)  # the reader says the same of a file that is not there
                yield _only("truncated_file", "not a whole ArrayRecord file", path, row)
                return
            begin, end = _share(reader.num_records(), piece)
            row = max(row, begin)
            while row < end:
                for raw in _read_records(reader, row, min(row + ROWS, end)):
                    yield Step(Record(partial(parse, raw), f"{path}:row {row}"), 0, row + 1)
                    row += 1
    except (RuntimeError, OSError) as error:
        yield _spoilt(error, "ArrayRecord", path, row)


@contextmanager
def _array_record(path: str) -> Iterator[Any]:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path, "readahead_buffer_size:0")
    try:
        yield reader
    finally:
        with suppress(RuntimeError):  # says once more what a read has said
            reader.close()


def _read_records(reader: Any, begin: int, end: int) -> Iterator[bytes]:
    """A range of records; where one is damaged, those before it come first."""
    try:
        records = reader.read(begin, end)
    except RuntimeError:
        records = (reader.read(i, i + 1)[0] for i in range(begin, end))
    return iter(records)
