"""Train, probe and eval are disjoint also where documents stream and sets overlap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dh_jax.data.loader import Loader, get_loader
from dh_jax.data.sources import document_id, split_of
from dh_jax.errors import DataError


def texts(name: str, count: int) -> list[str]:
    return [f"{name} {i}: the quick brown fox" for i in range(count)]


def files(path: Path, *parts: list[str], **options: Any) -> dict[str, Any]:
    """A source of one file for each part."""
    path.mkdir()
    for i, part in enumerate(parts):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (path / f"{i}.jsonl").write_text(lines)
    return {"kind": "files", "paths": [str(path)], **options}


def ids(part: list[str]) -> set[int]:
    return {document_id(text) for text in part}


def delivered(loader: Loader) -> set[int]:
    with loader:
        return {
            int(i)
            for _ in loader
            for i in loader.origins.document_ids_BS[np.nonzero(loader.origins.lengths_BS)]
        }


def test_a_source_that_is_all_training_gives_way_to_one_split_by_content(
    make_config: Any, tmp_path: Path
) -> None:
    shared, own = texts("shared", 200), texts("own", 200)
    train = files(tmp_path / "a", shared + own, split="train")
    sources = {"a": train, "b": files(tmp_path / "b", shared)}
    config = make_config(sources=sources, splits={"probe": 0.2, "eval": 0.2})
    with get_loader(config, batch_size=2, repeat=False, sources=["a"]) as loader:
        trained = {int(i) for _ in loader for i in loader.origins.document_ids_BS.ravel()} - {0}
        skipped = loader.stats()["sources"]["a"]["skipped"]
    assert trained == {i for i in ids(shared + own) if split_of(i, config.splits) == "train"}
    assert skipped == {"held_out_by_hash": 400 - len(trained)}
    for split in ("probe", "eval"):
        held = delivered(get_loader(config, batch_size=2, split=split, sources=["b"]))
        assert held and not held & trained
    alone = make_config(sources={"a": train}, splits={"probe": 0.2, "eval": 0.2})
    assert delivered(get_loader(alone, batch_size=2, repeat=False)) == ids(shared + own)


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shard": (0, 2)}, {"shard": (1, 2)}])
def test_a_limited_set_is_held_out_whichever_of_its_documents_are_read(
    make_config: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    parts = [texts(f"probe{i}", 20) for i in range(4)]
    probe = files(tmp_path / "p", *parts, split="probe", max_documents=20)
    config = make_config(
        sources={"t": files(tmp_path / "t", texts("train", 100), *parts)},
        probes={"p": probe},
        splits={"probe": 0.0, "eval": 0.0},
        on_error="skip",
    )
    trained = delivered(get_loader(config, batch_size=2, repeat=False))
    assert trained == ids(texts("train", 100))
    read = delivered(get_loader(config, batch_size=2, split="probe", **options))
    assert read and not read & trained


@pytest.mark.parametrize(("whole", "other"), [("probe", "eval"), ("eval", "probe")])
def test_held_out_sets_are_disjoint_from_one_another(
    make_config: Any, tmp_path: Path, whole: str, other: str
) -> None:
    """A set held out whole keeps what a source split by content would give to the other split;
    of two such sets the first keeps it. A store agrees."""
    shared = texts("shared", 120)
    sources = {
        "first": files(tmp_path / "first", shared[:60], split=whole),
        "second": files(tmp_path / "second", shared[30:80], split=other),
        "t": files(tmp_path / "t", shared),
    }
    splits = {"probe": 0.3, "eval": 0.3}
    config = make_config(sources=sources, splits=splits, on_error="skip")
    found = {
        (split, name): delivered(get_loader(config, batch_size=2, split=split, sources=[name]))
        for split, name in [(whole, "first"), (other, "second"), (whole, "t"), (other, "t")]
    }
    assert found[whole, "first"] == ids(shared[:60])
    assert found[other, "second"] == ids(shared[60:80])
    rest = {i: split_of(i, config.splits) for i in ids(shared[80:])}
    assert found[other, "t"] == {i for i in ids(shared[60:80]) | set(rest) if (
        split_of(i, config.splits) == other)}  # fmt: skip
    assert not (found[whole, "first"] | found[whole, "t"]) & (
        found[other, "second"] | found[other, "t"]
    )
    refusing = make_config(sources=sources, splits=splits)
    with (
        get_loader(refusing, batch_size=2, split=other, sources=["t"]) as loader,
        pytest.raises(DataError, match="also in a probe or eval set"),
    ):
        list(loader)
