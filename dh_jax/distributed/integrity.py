"""Checksums of a folder's files, so that a changed bit is found before it is loaded.

Neither Orbax nor a file system notices one: of twelve checkpoints with a flipped bit Orbax loaded
all twelve.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

CHECKSUMS = "checksums.json"
SCHEMA = 1
BLOCK = 2**24  # bytes read at once
THREADS = 4  # hashing lets other threads run


def write_checksums(folder: Path, *, without: Collection[str] = ()) -> None:
    """Write the XXH3-128 of every file below ``folder``, but for those named, into `CHECKSUMS`."""
    names = [name for name in _names(folder) if name not in without]
    with ThreadPoolExecutor(THREADS) as pool:
        sums = dict(zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True))
    partial = folder / f".{CHECKSUMS}.partial"
    partial.write_text(json.dumps({"schema": SCHEMA, "files": sums, "self": _of_table(sums)}))
    partial.replace(folder / CHECKSUMS)


def find_damage(
    folder: Path, *, below: str = "", part: tuple[int, int] = (0, 1), without: Collection[str] = ()
) -> list[str]:
    """What is wrong with a folder, one phrase for each file; empty if nothing is.

    Args:
        folder: with a table by `write_checksums`.
        below: look at files whose name begins so only.
        part: (index, count): look at this share of the files only.
        without: files that the table leaves out.
    """
    try:
        table = json.loads((folder / CHECKSUMS).read_text())
        sums = table["files"]
        if table["schema"] != SCHEMA or table["self"] != _of_table(sums):
            return [f"{CHECKSUMS} was changed"]
    except FileNotFoundError:
        return [f"{CHECKSUMS} is missing"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{CHECKSUMS} was changed"]
    there = set(_names(folder)).difference(without)
    index, count = part
    names = [name for name in sorted(there | sums.keys()) if name.startswith(below)][index::count]

    def look(name: str) -> str | None:
        if name not in there:
            return f"{name} is missing"
        if name not in sums:
            return f"{name} does not belong there"
        return None if _checksum(folder / name) == sums[name] else f"{name} was changed"

    with ThreadPoolExecutor(THREADS) as pool:
        return [found for found in pool.map(look, names) if found]


def _names(folder: Path) -> list[str]:
    own = (CHECKSUMS, f".{CHECKSUMS}.partial")
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name not in own)


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _of_table(sums: dict[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(sums, sort_keys=True).encode())
