"""Scores on disk: written shard by shard, resumed after a kill, refused for other inputs.

A folder::

    store.json                 what is scored: schema, identity, a checksum of both
    fitted.safetensors         what `fit` gave (see `dh_jax.influence.trees`)
    queries.safetensors        prepared queries
    shards/000000.safetensors  documents of one batch: scores_KN and columns of length N

Every file appears whole or not at all, and checks itself when it is read. What is there is what
was done: a shard that is missing is scored again, a damaged one is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from dh_jax.data.stores.shards import write_json
from dh_jax.errors import DataError, StateError
from dh_jax.influence.trees import read_tree, write_tree

SCHEMA = 1
MANIFEST = "store.json"


class Shard(NamedTuple):
    """The documents of one batch."""

    checksum: str  # of the batch
    scores_KN: np.ndarray
    columns: dict[str, np.ndarray]  # by name, each of length N


class ScoreStore(NamedTuple):
    """A folder of scores; made by `open_scores`."""

    folder: Path
    identity: dict[str, Any]

    def fitted(self, name: str, make: Callable[[], Any]) -> Any:
        """What is kept under a name, or what ``make`` gives, which is then kept.

        Raises:
            DataError: the file is damaged; or as ``make``.
        """
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            return read_tree(path)
        made = make()
        write_tree(path, made)
        return made

    def path(self, index: int) -> Path:
        """The file of a batch's shard, whether it is there or not."""
        return self.folder / "shards" / f"{index:06d}.safetensors"

    def indices(self) -> list[int]:
        """Numbers of the batches that are scored, ascending."""
        return sorted(int(p.stem) for p in (self.folder / "shards").glob("[0-9]*.safetensors"))

    def scored(self, index: int) -> str | None:
        """The checksum of a batch that is scored, else None.

        Raises:
            DataError: its shard is damaged.
        """
        return self.read(index).checksum if self.path(index).exists() else None

    def write(self, index: int, shard: Shard) -> None:
        """Keep the scores of a batch; the file appears whole or not at all."""
        write_tree(self.path(index), shard)

    def read(self, index: int) -> Shard:
        """One shard.

        Raises:
            DataError: it is missing or damaged.
        """
        shard = read_tree(self.path(index))
        if not isinstance(shard, Shard):
            raise DataError(f"{self.path(index)} holds no scores; delete it")
        return shard

    def shards(self) -> Iterator[Shard]:
        """All shards, in the order of batches."""
        return (self.read(index) for index in self.indices())


def open_scores(folder: Path, identity: Mapping[str, Any]) -> ScoreStore:
    """Begin a store, or go on with one that was begun for the same inputs.

    Args:
        folder: of the store; made if missing.
        identity: JSON-able; what decides the scores: fingerprints of the model, the data and the
            queries, the estimator and its arguments.

    Raises:
        StateError: the folder was begun for other inputs; names what changed.
        DataError: its manifest is damaged.
    """
    wanted = json.loads(json.dumps(identity))
    path = folder / MANIFEST
    if not path.exists():
        if any(folder.glob("shards/*.safetensors")):
            raise DataError(f"{path} is missing beside shards of scores; take another folder")
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, "identity": wanted}
        write_json(path, content | {"self": _digest(content)})
        return ScoreStore(folder, wanted)
    found = read_identity(folder)
    if changed := list(_differences("", found, wanted)):
        raise StateError(
            f"{folder} holds scores of other inputs: {'; '.join(changed[:4])}; go on with the "
            "same, or score into another folder"
        )
    for partial in (*folder.glob(".*.partial"), *folder.glob("shards/.*.partial")):
        partial.unlink()  # of a process that was killed while it wrote
    return ScoreStore(folder, found)


def read_identity(folder: Path) -> dict[str, Any]:
    """What a store was begun for.

    Raises:
        DataError: there is no manifest, or it is damaged or of another schema.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        intact = found["self"] == _digest({k: v for k, v in found.items() if k != "self"})
        if intact and found["schema"] == SCHEMA:
            return dict(found["identity"])
    except FileNotFoundError:
        raise DataError(f"{path}: missing; a store of scores holds it") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # told below
    raise DataError(f"{path} is damaged or of another schema; score into another folder")


def _differences(prefix: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old | new):
            yield from _differences(f"{prefix}.{key}".lstrip("."), old.get(key), new.get(key))
    elif old != new:
        yield f"{prefix} (was {_short(old)}, now {_short(new)})"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
