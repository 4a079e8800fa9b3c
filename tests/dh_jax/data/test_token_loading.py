"""Token stores of other trainers through the loader: every token once, exact resume, any host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dh_jax.data.loader import get_loader
from dh_jax.errors import ConfigError, StateError
from tests.dh_jax.data.stores.test_token_sources import some_documents, write_mds, write_megatron


def config_of(make_config: Any, **sources: dict[str, Any]) -> Any:
    return make_config(sources=sources, splits={"probe": 0.0, "eval": 0.0}, store=None)


def documents_of(loader: Any) -> list[list[int]]:
    """Documents put together again from their pieces, sorted."""
    found: dict[int, dict[int, list[int]]] = {}
    for batch in loader:
        origins = loader.origins
        for b, s in zip(*np.nonzero(origins.lengths_BS), strict=True):
            tokens = batch.tokens_BT[b][batch.segment_ids_BT[b] == s + 1].tolist()
            identity, offset = int(origins.document_ids_BS[b, s]), int(origins.offsets_BS[b, s])
            found.setdefault(identity, {})[offset] = tokens
    return sorted([t for o in sorted(p) for t in p[o]] for p in found.values())


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_every_token_of_a_megatron_store_comes_once(
    make_config: Any, tmp_path: Path, dtype: str
) -> None:
    documents = some_documents()
    write_megatron(tmp_path / "a", documents, dtype)
    config = config_of(make_config, a={"kind": "megatron", "path": str(tmp_path / "a")})
    with get_loader(config, batch_size=4, repeat=False) as loader:
        assert documents_of(loader) == sorted(documents)


@pytest.mark.parametrize("kind", ["megatron", "mds"])
def test_a_state_of_other_token_files_is_refused(
    make_config: Any, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "a"
    config = config_of(
        make_config,
        a={"kind": kind, "path": str(path)} | ({"dtype": "uint16"} if kind == "mds" else {}),
    )

    def state_of(documents: list[list[int]], state: Any = None) -> Any:
        if kind == "megatron":
            write_megatron(path, documents, "uint16")
        else:
            samples = [{"tokens": np.array(d, "uint16").tobytes()} for d in documents]
            write_mds(path, samples, {"tokens": "bytes"})
        with get_loader(config, batch_size=2) as loader:
            if state is not None:
                loader.set_state(state)
            next(loader)
            return loader.get_state()

    state = state_of(some_documents())
    state_of(some_documents(), state)
    with pytest.raises(StateError, match="a store of source 'a'"):
        state_of(some_documents(70), state)


def test_mixed_with_a_stream_on_one_host_and_refused_on_two(
    make_config: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    write_megatron(tmp_path / "a", some_documents(), "uint16")
    config = config_of(
        make_config,
        a={"kind": "megatron", "path": str(tmp_path / "a")},
        mail={"kind": "files", "paths": [str(corpora["mail"])]},
    )
    with get_loader(config, batch_size=4) as loader, get_loader(config, batch_size=4) as other:
        for _ in range(6):
            batch = next(loader)
        assert set(batch.source_ids_B.tolist()) == {0, 1}
        other.set_state(loader.get_state())
        np.testing.assert_array_equal(next(other).tokens_BT, next(loader).tokens_BT)
    with pytest.raises(ConfigError, match="dh prepare"):
        get_loader(config, batch_size=4, shard=(0, 2))


def test_hosts_share_out_the_batches_of_an_mds_store(make_config: Any, tmp_path: Path) -> None:
    documents = some_documents()
    samples = [{"tokens": np.array(d, "uint16").tobytes()} for d in documents]
    write_mds(tmp_path / "m", samples, {"tokens": "bytes"})
    spec = {"kind": "mds", "path": str(tmp_path / "m"), "dtype": "uint16"}
    config = config_of(make_config, m=spec)
    with get_loader(config, batch_size=4, repeat=False) as loader:
        assert documents_of(loader) == sorted(documents)
    parts = [get_loader(config, batch_size=4, shard=(i, 2)) for i in range(2)]
    with get_loader(config, batch_size=4) as whole:
        for _ in range(5):
            rows = np.concatenate([next(part).tokens_BT for part in parts])
            np.testing.assert_array_equal(rows, next(whole).tokens_BT)
    for part in parts:
        part.close()
