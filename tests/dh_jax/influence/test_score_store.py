"""Scores on disk: what is kept, what a flipped byte does, which inputs are refused; summaries."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dh_jax.batch import Batch
from dh_jax.errors import DataError, StateError
from dh_jax.influence.score_store import Shard, open_scores
from dh_jax.influence.summaries import Ends, Groups
from dh_jax.influence.thin import Thin
from dh_jax.influence.trees import fingerprint, read_tree, write_tree

ROOT = Path(__file__).resolve().parents[3]
IDENTITY = {"model": "abc", "estimator": {"name": "ekfac", "arguments": {"damping": 0.1}}}


class Stranger(NamedTuple):
    x: int


def shard(seed):
    rng = np.random.default_rng(seed)
    return Shard(f"{seed:016x}", rng.random((2, 3), np.float32), {"source": np.arange(3)})


def test_trees_come_back_with_their_classes_types_and_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tree = {
        "thin": Thin(jnp.asarray(rng.random((2, 3, 1)), jnp.float32), jnp.ones((2, 1, 4))),
        "batches": (Batch(*[np.arange(4, dtype=np.int32).reshape(2, 2)] * 5, np.zeros(2, bool)),),
        "empty": (),
        "mixed": [1, 2.5, "x", None, True, np.float64(3), np.zeros((0, 3), np.int64)],
        "narrow": rng.random(5).astype(ml_dtypes.bfloat16),
    }
    write_tree(tmp_path / "a", tree)
    found = read_tree(tmp_path / "a")
    assert type(found["thin"]) is Thin and type(found["batches"][0]) is Batch
    assert found["batches"][0].teacher is None and found["empty"] == ()
    assert found["mixed"][:5] == [1, 2.5, "x", None, True]
    assert found["narrow"].dtype == ml_dtypes.bfloat16
    assert fingerprint(found) == fingerprint(tree)
    assert fingerprint({"a": np.zeros(2)}) != fingerprint({"b": np.zeros(2)})
    assert fingerprint({"a": np.zeros(2)}) != fingerprint({"a": np.zeros((2, 1))})
    for wrong in (Stranger(1), {1, 2}, np.array(["text"])):
        with pytest.raises(TypeError):
            write_tree(tmp_path / "b", wrong)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]  # nothing half-written


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    write_tree(path, shard(1))
    whole = path.read_bytes()
    for at in range(len(whole)):  # the header's too: names, types, shapes, the checksum itself
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(DataError, match="damaged"):
            read_tree(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="damaged"):
        read_tree(path)


def test_a_store_goes_on_where_it_stopped(tmp_path: Path) -> None:
    store = open_scores(tmp_path / "s", IDENTITY)
    assert store.fitted("fitted", lambda: {"a": jnp.ones(3)})["a"].sum() == 3
    for index in (0, 1, 3):
        store.write(index, shard(index))
    (store.folder / "shards" / ".000002.safetensors.aa.partial").write_bytes(b"half")
    again = open_scores(tmp_path / "s", json.loads(json.dumps(IDENTITY)))
    assert again.indices() == [0, 1, 3] and again.scored(2) is None
    assert again.scored(3) == f"{3:016x}"
    assert not list((store.folder / "shards").glob(".*"))
    kept = again.fitted("fitted", lambda: pytest.fail("fitted a second time"))
    np.testing.assert_array_equal(kept["a"], np.ones(3))
    for index, found in zip((0, 1, 3), again.shards(), strict=True):
        np.testing.assert_array_equal(found.scores_KN, shard(index).scores_KN)


def test_a_process_killed_while_it_writes_leaves_whole_shards(tmp_path: Path) -> None:
    index = int(np.random.default_rng().integers(1, 6))
    program = f"""
import os, pathlib, signal, sys
import numpy as np
from dh_jax.influence import trees
from dh_jax.influence.score_store import Shard, open_scores
store = open_scores(pathlib.Path(sys.argv[1]), {IDENTITY!r})
parts = []
bytes_of = trees._bytes
def dying(array):
    parts.append(array)
    if len(parts) == 4 * {index} + 3:  # two are hashed and two written: between those two
        os.kill(os.getpid(), signal.SIGKILL)
    return bytes_of(array)
trees._bytes = dying
for i in range(8):
    store.write(i, Shard(str(i), np.full((2, 3), i, np.float32), {{"source": np.arange(3)}}))
"""
    died = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "s")], cwd=ROOT, check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert list((tmp_path / "s" / "shards").glob(".*.partial"))
    store = open_scores(tmp_path / "s", IDENTITY)
    assert store.indices() == list(range(index))
    for i, found in enumerate(store.shards()):
        assert found.checksum == str(i) and (found.scores_KN == i).all()
    assert not list((tmp_path / "s" / "shards").glob(".*"))


def test_other_inputs_are_refused_by_name(tmp_path: Path) -> None:
    open_scores(tmp_path / "s", IDENTITY)
    for changed, said in (
        ({"model": "abd"}, r'model \(was "abc", now "abd"\)'),
        (
            {"estimator": {"name": "ekfac", "arguments": {"damping": 0.2}}},
            r"estimator.arguments.damping \(was 0.1, now 0.2\)",
        ),
        ({"more": 1}, r"more \(was null, now 1\)"),
    ):
        with pytest.raises(StateError, match=f"scores of other inputs: {said}"):
            open_scores(tmp_path / "s", IDENTITY | changed)


def test_a_damaged_manifest_or_shard_is_named(tmp_path: Path) -> None:
    store = open_scores(tmp_path / "s", IDENTITY)
    store.write(0, shard(0))
    path = store.path(0)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"000000\.safetensors is damaged"):
        store.scored(0)
    manifest = store.folder / "store.json"
    manifest.write_text(manifest.read_text().replace("abc", "abd"))
    with pytest.raises(DataError, match=r"store\.json is damaged"):
        open_scores(tmp_path / "s", IDENTITY)
    manifest.unlink()
    with pytest.raises(DataError, match="missing beside shards"):
        open_scores(tmp_path / "s", IDENTITY)


def test_ends_equal_a_stable_sort_of_everything() -> None:
    rng = np.random.default_rng(3)
    scores = rng.integers(-9, 9, (3, 101)).astype(np.float32)  # many equal ones
    ends = Ends(3, 12)
    for part in np.split(scores, [1, 7, 60], axis=1):
        ends.add(part)
    np.testing.assert_array_equal(ends.helpful_Kt, np.argsort(scores, 1, kind="stable")[:, :12])
    np.testing.assert_array_equal(ends.harmful_Kt, np.argsort(-scores, 1, kind="stable")[:, :12])
    few = Ends(3, 200)
    few.add(scores)
    assert few.helpful_Kt.shape == (3, 101)


def test_groups_equal_numpy_also_far_from_zero() -> None:
    rng = np.random.default_rng(4)
    scores = 1e4 + rng.random((2, 90))
    group = rng.integers(0, 3, 90)
    group[:5] = 4
    groups = Groups(2, 6)
    for part, its in zip(np.split(scores, [2, 40], 1), np.split(group, [2, 40]), strict=True):
        groups.add(part, its)
    found = groups.result()
    for m in range(6):
        own = scores[:, group == m]
        assert found.count_M[m] == own.shape[1]
        np.testing.assert_allclose(found.sum_KM[:, m], own.sum(1), rtol=1e-12)
        if own.shape[1]:
            np.testing.assert_allclose(found.mean_KM[:, m], own.mean(1), rtol=1e-12)
            np.testing.assert_allclose(found.deviation_KM[:, m], own.std(1, ddof=1), rtol=1e-8)
            error = own.std(1, ddof=1) / np.sqrt(own.shape[1])
            np.testing.assert_allclose(found.standard_error_KM[:, m], error, rtol=1e-8)
        else:
            assert np.isnan(found.mean_KM[:, m]).all()
