"""A data set on a Hugging Face hub as records, streamed through ``datasets``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from dh_jax.config import HubSource
from dh_jax.data.records import Record
from dh_jax.errors import DataError


class HubRecords:
    """The records of a data set, one data file after another; see `RecordStream`.

    Each file is opened as a data set of its own, which makes resume exact: the shuffle buffer of
    ``datasets`` loses records on resume, and an order of files is all the shuffling needed here.

    Args:
        name: of the source, for errors.
        spec: which data set.
        order: from the number of data files to the order in which to read them.
    """

    def __init__(self, name: str, spec: HubSource, order: Callable[[int], Sequence[int]]) -> None:
        self._name, self._spec = name, spec
        self._dataset, self._files = _open(name, spec)
        self._order = order(self._dataset.num_shards)
        self._go(0)

    def _go(self, place: int, row: int = 0, saved: str = "") -> None:
        """To the file at this place in the order, its beginning or a saved state of it."""
        self._place, self._row, self._saved = place, row, saved
        self._rows: Iterator[Mapping[str, Any]] | None = None
        if place < len(self._order):
            count = self._dataset.num_shards
            self._file = self._dataset.shard(num_shards=count, index=self._order[place])
            if saved:
                self._file.load_state_dict(json.loads(saved))

    def __next__(self) -> Record:
        while self._place < len(self._order):
            try:
                if self._rows is None:
                    self._rows = iter(self._file)
                columns = next(self._rows, None)
            except Exception as error:  # httpx, fsspec, pyarrow and datasets raise what they like
                raise _explained(self._name, self._spec, error) from error
            if columns is None:
                self._go(self._place + 1)
                continue
            self._row += 1
            return Record(partial(_given, columns), f"{self._file_name()}:row {self._row - 1}")
        raise StopIteration

    def _file_name(self) -> str:
        """The file being read, as org/name/file."""
        index = self._order[self._place]
        if len(self._files) != len(self._order):  # a builder that deals its files out otherwise
            return f"{self._spec.path}:part {index}"
        return re.sub(r"^hf://datasets/|@[0-9a-f]{40}(?=/)", "", self._files[index])

    def identity(self) -> dict[str, str]:
        """The files' addresses hold the commit, so a data set that changed is noticed."""
        listing = "\n".join(self._files)
        commit = re.search(r"@([0-9a-f]{40})/", listing)
        digest = hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()
        return {"files": digest, "revision": commit.group(1) if commit else ""}

    def cursor(self) -> dict[str, Any]:
        # A data set not yet iterated does not report the state it was given, so that is kept. As
        # text, because the shape of the state changes under way, which Grain advises against.
        fresh = self._rows is None
        state = self._saved if fresh else json.dumps(self._file.state_dict())
        return {"file": self._place, "row": self._row, "datasets": state}

    def seek(self, cursor: Mapping[str, Any]) -> None:
        self._go(int(cursor["file"]), int(cursor["row"]), cursor["datasets"])

    def close(self) -> None:
        self._rows = None


def _given(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    return columns


def _open(name: str, spec: HubSource) -> tuple[Any, list[str]]:
    """The streaming data set and the addresses of its files."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(
            spec.path, spec.name, revision=spec.revision, data_files=spec.data_files
        )
        dataset = builder.as_streaming_dataset(split=spec.hub_split)
    except Exception as error:  # httpx, fsspec, pyarrow and datasets raise what they like
        raise _explained(name, spec, error) from error
    files = (builder.config.data_files or {}).get(spec.hub_split, [])
    return dataset, [str(file) for file in files]


def _explained(name: str, spec: HubSource, error: BaseException) -> DataError:
    """One line that says what the hub refused and what to do about it."""
    import huggingface_hub

    endpoint = huggingface_hub.constants.ENDPOINT
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 20:
        chain.append(cause)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    said = " ".join(str(error).split())
    if "scripts are no longer supported" in said:
        cure = (
            "it is a loading script, which datasets no longer runs; name its files instead, "
            f"for example path: parquet, data_files: hf://datasets/{spec.path}/data/*.parquet"
        )
    elif kinds & {"ConnectError", "ConnectionError", "TimeoutException", "TimeoutError"}:
        cure = "cannot be reached; check the network, or set HF_ENDPOINT to a reachable mirror"
    elif kinds & {"DatasetNotFoundError", "FileNotFoundError"}:
        cure = (
            "not found, or not open to you; check path, name, revision and data_files; for gated "
            "data accept the terms on its page and log in (hf auth login, or set HF_TOKEN)"
        )
    else:
        cure = "cannot be read; check name, hub_split and data_files"
    what = f"{spec.path} ({spec.name})" if spec.name else spec.path
    return DataError(
        f"source {name!r}: data set {what} at HF_ENDPOINT {endpoint}: {cure} [{said[:300]}]"
    )
