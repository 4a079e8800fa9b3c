"""Where files lie: a local disk, or anything fsspec reaches (object stores, hubs, web servers).

Local files are opened directly. Remote ones are read by ranges, each a request of its own, so
that a broken connection costs one block and reading goes on at the byte it had reached.
"""

from __future__ import annotations

import copy
import glob
import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO, NamedTuple, cast

from dh_jax.config import FilesSource, RetryConfig
from dh_jax.data.reading.retry import NetworkFault, patiently
from dh_jax.errors import ConfigError, DataError
from dh_jax.extras import install_command

LOCAL_BLOCK = 1 << 18  # bytes of a local file read at once
REMOTE_BLOCK = 1 << 22  # and of a remote one, at most: a request's latency should not show
REMOTE_LEAST = 1 << 18
AHEAD = 1 << 26  # bytes read ahead in all the pieces of a source that are open at once
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}


class Found(NamedTuple):
    """A file of a source."""

    path: str
    name: str  # relative to its pattern's folder, so the same on every machine
    size: int  # bytes


class Storage(NamedTuple):
    """How remote files are reached."""

    options: Mapping[str, Any]  # may hold secrets: never shown
    retry: RetryConfig
    block: int  # bytes of a remote file read at once

    @classmethod
    def of(cls, spec: FilesSource) -> Storage:
        block = min(REMOTE_BLOCK, max(REMOTE_LEAST, AHEAD // spec.interleave))
        return cls(spec.storage_options, spec.retry, block)


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


# --- finding ---------------------------------------------------------------------------------


def find_files(name: str, spec: FilesSource) -> list[Found]:
    """The files of a source, each once: in the order of its ``paths``, then by name.

    A path is a file, a folder (its files that match ``include``) or a glob; ``~`` and
    environment variables are expanded. Names that begin with a dot match only if written out.

    Raises:
        ConfigError: a pattern matches nothing, or a file system's package is missing.
        DataError: a remote file system cannot be listed.
    """
    include = spec.include
    if spec.format == "arrow" and include == "**/*":
        include = "**/*.arrow"  # save_to_disk puts JSON beside its data
    found: dict[str, Found] = {}
    for pattern in spec.paths:
        path = os.path.expandvars(os.path.expanduser(pattern)).removeprefix("file://")
        if is_remote(path):
            files = _list_remote(name, path, include, Storage.of(spec))
            sought = path
        else:
            files = _list_local(path, include)
            sought = os.path.abspath(path)
        if spec.format == "arrow":  # what `map` left behind is no data of the set
            files = [f for f in files if not os.path.basename(f.name).startswith("cache-")]
        if not files:
            raise ConfigError(
                f"source {name!r}: no file matches {pattern!r} (include: {include!r}), "
                f"sought as {sought!r}; correct paths"
            )
        for file in files:
            key = file.path if is_remote(path) else os.path.realpath(file.path)
            found.setdefault(key, file)
    return list(found.values())


def _list_local(path: str, include: str) -> list[Found]:
    if os.path.isfile(path):
        root, names = os.path.split(path)[0], [os.path.basename(path)]
    elif os.path.isdir(path):
        root, names = path, glob.glob(include, root_dir=path, recursive=True)
    else:
        root = os.path.dirname(path[: _magic(path)])
        names = [os.path.relpath(p, root or ".") for p in glob.glob(path, recursive=True)]
    full = {n: os.path.join(root, n) for n in sorted(names)}
    return [
        Found(p, n.replace(os.sep, "/"), os.path.getsize(p))
        for n, p in full.items()
        if os.path.isfile(p)
    ]


def _list_remote(name: str, url: str, include: str, storage: Storage) -> list[Found]:
    try:
        fs, path = _file_system(url, storage)
        root, infos = patiently(partial(_infos, fs, path, include), storage.retry, url)
    except NetworkFault as error:
        raise DataError(f"source {name!r}: {error}") from error
    found = []
    for full, info in sorted(infos.items()):
        short = full.removeprefix(root).lstrip("/")
        if info["type"] != "file" or (full != path and "/." in f"/{short}"):
            continue
        if info.get("size") is None:
            raise DataError(
                f"source {name!r}: {full}: the server gives no size, so the file cannot be read "
                "by ranges; download it, or serve it with Content-Length"
            )
        found.append(Found(fs.unstrip_protocol(full), short, int(info["size"])))
    return found


def _infos(fs: Any, path: str, include: str) -> tuple[str, dict[str, Any]]:
    """The root of a pattern and what lies there, by full path."""
    if _magic(path) < len(path):
        root, infos = path[: _magic(path)].rpartition("/")[0], fs.glob(path, detail=True)
    elif (info := fs.info(path))["type"] == "file":
        root, infos = path.rpartition("/")[0], {path: info}
    else:
        root, infos = path.rstrip("/"), fs.glob(f"{path.rstrip('/')}/{include}", detail=True)
    for full, info in infos.items():
        if info["type"] == "file" and info.get("size") is None:  # a listing that is links
            infos[full] = fs.info(full)
    return root, infos


def _file_system(url: str, storage: Storage) -> tuple[Any, str]:
    """The file system of an address, and the path within it."""
    import fsspec

    options = copy.deepcopy(dict(storage.options))  # some libraries change what they are given
    if url.startswith(("s3://", "s3a://")):  # one layer of patience is enough
        config = options.setdefault("config_kwargs", {})
        config.setdefault("retries", {"total_max_attempts": 1})
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:  # the package or the protocol is unknown
        extra = EXTRAS.get(url.partition("://")[0])
        cure = f"; {install_command(extra)}" if extra else ""
        said = " ".join(str(error).split())
        raise ConfigError(f"{url} cannot be opened: {said}{cure}") from error
    return fs, path


def _magic(path: str) -> int:
    """Where the first wildcard of a glob is; its length if there is none."""
    return min((path.index(c) for c in "*?[" if c in path), default=len(path))


# --- reading ---------------------------------------------------------------------------------


def open_blocks(path: str, size: int, storage: Storage) -> BinaryIO:
    """A file to be read from front to back in large blocks."""
    if not is_remote(path):
        return open(path, "rb", buffering=LOCAL_BLOCK)
    return io.BufferedReader(RemoteFile(path, size, storage), storage.block)


def open_random(path: str, size: int, storage: Storage) -> BinaryIO | str:
    """A file for a reader that seeks: its path if it is local, else one request a read."""
    return cast(BinaryIO, RemoteFile(path, size, storage)) if is_remote(path) else path


@contextmanager
def local_copy(path: str, size: int, storage: Storage) -> Iterator[str]:
    """The path of a local file with the same bytes, for readers that take nothing else."""
    if not is_remote(path):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="dh-") as copied:
        with open_blocks(path, size, storage) as file:
            while block := file.read(storage.block):
                copied.write(block)
        copied.flush()
        yield copied.name


class RemoteFile(io.RawIOBase):
    """A remote file of a known size; every read is one request for exactly these bytes."""

    def __init__(self, url: str, size: int, storage: Storage) -> None:
        super().__init__()
        self._fs, self._path = _file_system(url, storage)
        self._url, self._size, self._retry = url, size, storage.retry
        # The hub's file system reads ahead on its own, five megabytes for every block of ours.
        self._plain = {"cache_type": "none"} if url.startswith("hf://") else {}
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def size(self) -> int:  # pyarrow asks
        return self._size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        what = f"{self._url} from byte {self._at}"
        block = patiently(partial(self._fetch, self._at, end), self._retry, what)
        buffer[: len(block)] = block
        self._at = end
        return len(block)

    def _fetch(self, start: int, end: int) -> bytes:
        block: bytes = self._fs.cat_file(self._path, start=start, end=end, **self._plain)
        if len(block) > end - start:
            raise NetworkFault(
                f"the server ignores byte ranges (asked for {end - start} bytes, got "
                f"{len(block)}); download the file or use a server with ranges",
                passing=False,
            )
        if len(block) < end - start:  # a connection cut short, or the file has shrunk
            raise ConnectionError(f"{len(block)} of {end - start} bytes came")
        return block
