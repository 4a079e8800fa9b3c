"""A data set on a Hugging Face hub as records, streamed through ``datasets``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from dh_jax.config import HubSource
from dh_jax.data.reading.pieces import Cursor, Piece, parts_of
from dh_jax.data.reading.records import Fault, Record, fail
from dh_jax.data.reading.retry import chain_of, is_network_fault, is_passing, patiently, status_of
from dh_jax.errors import DataError

FINISHED = -1  # the row of a file that cannot be read any further


class HubShelf:
    """The data files of a data set as pieces; see `pieces.Shelf`.

    Each file is opened as a data set of its own, which makes resume exact: the shuffle buffer of
    ``datasets`` loses records on resume, and an order of files is all the shuffling needed here.
    Parts of a file take its rows in turn, as `datasets` cannot enter one in the middle.

    Args:
        name: of the source, for errors.
        spec: which data set.
        pieces: read these rather than all.
    """

    def __init__(self, name: str, spec: HubSource, pieces: Sequence[Piece] | None = None) -> None:
        self._spec, self._given = spec, pieces
        self._dataset, self._files = _open(name, spec)

    def pieces(self, count: int) -> list[Piece]:
        if self._given is not None:
            return list(self._given)
        files = self._dataset.num_shards
        parts = parts_of(files, count)
        paths = self._files
        if len(paths) != files:  # a builder that deals its files out otherwise
            paths = [f"{self._spec.path}:part {i}" for i in range(files)]
        names = [re.sub(r"^hf://datasets/|@[0-9a-f]{40}(?=/)", "", path) for path in paths]
        return [
            Piece(paths[i], names[i], 0, i, part, parts)
            for i in range(files)
            for part in range(parts)
        ]

    def read(self, piece: Piece, cursor: Cursor | None) -> HubReader:
        file = self._dataset.shard(num_shards=self._dataset.num_shards, index=piece.file)
        return HubReader(self._spec, file, piece, cursor)

    def identity(self) -> dict[str, str]:
        """The files' addresses hold the commit, so a data set that changed is noticed."""
        listing = "\n".join(self._files)
        commit = re.search(r"@([0-9a-f]{40})/", listing)
        digest = hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()
        return {"files": digest, "revision": commit.group(1) if commit else ""}


class HubReader:
    """The records of one piece; see `pieces.PieceReader`. Its cursor is the row and the state of
    the data set that `datasets` goes on from."""

    def __init__(self, spec: HubSource, file: Any, piece: Piece, cursor: Cursor | None) -> None:
        self._spec, self._file, self._piece = spec, file, piece
        self._row: int
        self._saved: str
        self._row, self._saved = cursor or (0, "")
        self._rows: Iterator[Mapping[str, Any]] | None = None

    def __next__(self) -> Record:
        while self._row != FINISHED:
            where = f"{self._piece.name}:row {self._row}"
            try:  # after a network fault, again from the last row's state
                columns = patiently(self._advance, self._spec.retry, self._piece.name)
            except Exception as error:  # httpx, fsspec, pyarrow and datasets raise what they like
                reason = "unreadable_file" if is_network_fault(error) else "corrupt_file"
                self._row = FINISHED
                return Record(partial(fail, Fault(reason, explain(self._spec, error))), where)
            if columns is None:
                break
            self._row += 1
            if (self._row - 1) % self._piece.parts == self._piece.part:
                return Record(partial(_given, columns), where)
        raise StopIteration

    def _advance(self) -> Mapping[str, Any] | None:
        try:
            if self._rows is None:
                if self._saved:
                    self._file.load_state_dict(json.loads(self._saved))
                self._rows = iter(self._file)
            return next(self._rows, None)
        except BaseException:
            self._saved = self._state()
            self._rows = None
            raise

    def _state(self) -> str:
        # A data set not yet iterated does not report the state it was given, so that is kept. As
        # text, because the shape of the state changes under way, which Grain advises against.
        return self._saved if self._rows is None else json.dumps(self._file.state_dict())

    def cursor(self) -> Cursor:
        return [self._row, self._state()]

    def close(self) -> None:
        self._saved, self._rows = self._state(), None


def _given(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    return columns


def _open(name: str, spec: HubSource) -> tuple[Any, list[str]]:
    """The streaming data set and the addresses of its files."""
    import datasets

    # One layer of patience: `patiently`. Left alone, datasets waits a hundred seconds for a
    # server that is gone, and twenty minutes for one that answers 429.
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
    datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0

    def build() -> tuple[Any, Any]:
        builder = datasets.load_dataset_builder(
            spec.path, spec.name, revision=spec.revision, data_files=spec.data_files
        )
        return builder, builder.as_streaming_dataset(split=spec.hub_split)

    try:
        builder, dataset = patiently(build, spec.retry, spec.path)
    except Exception as error:  # httpx, fsspec, pyarrow and datasets raise what they like
        raise DataError(f"source {name!r}: {explain(spec, error)}") from error
    files = (builder.config.data_files or {}).get(spec.hub_split, [])
    return dataset, [str(file) for file in files]


def explain(spec: HubSource, error: BaseException) -> str:
    """One line that says what the hub refused and what to do about it."""
    import huggingface_hub

    endpoint = huggingface_hub.constants.ENDPOINT
    kinds = {kind.__name__ for link in chain_of(error) for kind in type(link).__mro__}
    said = " ".join(str(error).split())
    status = status_of(error)
    if "scripts are no longer supported" in said:
        cure = (
            "it is a loading script, which datasets no longer runs; name its files instead, "
            f"for example path: parquet, data_files: hf://datasets/{spec.path}/data/*.parquet"
        )
    elif is_passing(error) and status is not None:
        cure = (
            f"answered {status} again and again; wait and resume, or raise retry.attempts "
            f"(now {spec.retry.attempts})"
        )
    elif is_passing(error) or "ConnectError" in kinds:
        cure = "cannot be reached; check the network, or set HF_ENDPOINT to a reachable mirror"
    elif kinds & {"DatasetNotFoundError", "FileNotFoundError"} or status in (401, 403, 404):
        cure = (
            "not found, or not open to you; check path, name, revision and data_files; for gated "
            "data accept the terms on its page and log in (hf auth login, or set HF_TOKEN)"
        )
    else:
        cure = "cannot be read; check name, hub_split and data_files"
    what = f"{spec.path} ({spec.name})" if spec.name else spec.path
    return f"data set {what} at HF_ENDPOINT {endpoint}: {cure} [{said[:300]}]"
