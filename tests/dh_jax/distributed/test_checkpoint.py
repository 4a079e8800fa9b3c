"""Checkpoints: whole or not there, checked before they are loaded, kept by a policy."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dh_jax.config import MeshConfig
from dh_jax.distributed.checkpoint import UNCHECKED, Checkpoints, read_host
from dh_jax.distributed.integrity import find_damage, write_checksums
from dh_jax.distributed.mesh import make_mesh, place
from dh_jax.distributed.placement import param_shardings
from dh_jax.errors import StateError


@cache
def arrays() -> Any:
    """A few arrays, two of them split over eight devices."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rng = np.random.default_rng(0)
    params = {
        "embed": {"embedding": rng.normal(size=(256, 128)).astype(np.float32)},
        "down": {"kernel": rng.normal(size=(256, 128)).astype(np.float32)},
        "scale": np.ones(128, np.float32),
    }
    return place(params, param_shardings(params, mesh))


def written(folder: Path, *steps: int, **policy: Any) -> Path:
    with Checkpoints(folder, **policy) as checkpoints:
        for step in steps:
            checkpoints.save(step, arrays(), {"step": step})
    return folder


def checked_files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in files if path.relative_to(folder).as_posix() not in UNCHECKED]


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[(bit // 8) % len(content)] ^= 1 << (bit % 8)
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found_and_the_file_is_named(tmp_path: Path) -> None:
    step = written(tmp_path, 1) / "1"
    files = checked_files(step)
    assert len(files) > 8 and not find_damage(step, without=UNCHECKED)

    @given(st.sampled_from(files), st.integers(0, 2**40))
    def found(path: Path, bit: int) -> None:
        good = path.read_bytes()
        if not good:
            return
        flip(path, bit)
        (said,) = find_damage(step, without=UNCHECKED)
        path.write_bytes(good)
        assert said == f"{path.relative_to(step).as_posix()} was changed"

    found()


@given(st.dictionaries(st.sampled_from("abcd"), st.binary(max_size=9), min_size=1), st.data())
def test_missing_and_foreign_files_are_named(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("sums")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    write_checksums(folder)
    assert find_damage(folder) == []
    gone = data.draw(st.sampled_from(sorted(contents)))
    (folder / gone).unlink()
    (folder / "z").write_bytes(b"")
    assert find_damage(folder) == [f"{gone} is missing", "z does not belong there"]
    parts = [find_damage(folder, part=(i, 3)) for i in range(3)]
    assert sorted(itertools.chain(*parts)) == sorted(find_damage(folder))


def test_a_damaged_step_is_refused_by_name_and_says_which_is_intact(tmp_path: Path) -> None:
    written(tmp_path, 3, 6, 9, keep=3)
    data = max((tmp_path / "9/arrays").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(data, 12345)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.raises(StateError, match=rf"{data.name} was changed; intact steps: 3, 6"):
            checkpoints.restore(arrays(), 9)
        with pytest.raises(StateError, match=r"no checkpoint of step 4 .*: 3, 6, 9"):
            checkpoints.restore(arrays(), 4)
        assert checkpoints.restore(arrays(), 6).host == {"step": 6}


def test_a_run_falls_back_to_the_newest_intact_step_and_can_save_that_step_again(
    tmp_path: Path,
) -> None:
    written(tmp_path, 3, 6, 9, keep=3)
    flip(tmp_path / "9/host/metadata", 77)
    (tmp_path / "6/checksums.json").unlink()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.warns(UserWarning) as said:
            restored = checkpoints.restore(arrays())
        assert restored.step == 3 and checkpoints.steps() == [3]
        assert (
            "host/metadata was changed; it is now damaged-9, and the run goes on from step 3"
            in (str(said[0].message))
        )
        assert "checksums.json is missing" in str(said[1].message)
        checkpoints.save(9, arrays(), {"step": 9, "again": True})
    assert (tmp_path / "damaged-9/host/metadata").exists()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.restore(arrays()).host["again"]
    flip(tmp_path / "9/host/metadata", 55)  # the same step once more
    with (
        Checkpoints(tmp_path, keep=3) as checkpoints,
        pytest.warns(UserWarning, match="now damaged-9, and the run goes on from step 3"),
    ):
        assert checkpoints.restore(arrays()).step == 3


def test_when_nothing_is_intact_every_step_and_file_is_named(tmp_path: Path) -> None:
    written(tmp_path, 3, 6)
    for step in (3, 6):
        (tmp_path / f"{step}/checksums.json").write_text("{}")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(StateError, match=r"every .* damaged \(step 6: checksums.json was changed"),
    ):
        checkpoints.restore(arrays())


def test_the_host_part_is_checked_too_when_it_is_read_alone(tmp_path: Path) -> None:
    written(tmp_path, 3, 6)
    found = read_host(tmp_path, before=6)
    assert found is not None and found == (3, {"step": 3})
    assert read_host(tmp_path, before=3) is None
    flip(tmp_path / "6/host/metadata", 99)
    with pytest.raises(StateError, match="host/metadata was changed"):
        read_host(tmp_path, before=9)


def test_the_newest_are_kept_and_every_so_many(tmp_path: Path) -> None:
    folder = written(tmp_path, *range(1, 9), keep=2, keep_every=3)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [3, 6, 7, 8]


def test_arrays_may_be_donated_while_they_are_written(tmp_path: Path) -> None:
    next_step = jax.jit(lambda x: jax.tree.map(lambda a: a * 1.5 + 1, x), donate_argnums=0)
    start = {"a": np.arange(2e6, dtype=np.float32), "b": np.ones(3, np.float32)}
    now = jax.tree.map(lambda x: jnp.array(x, copy=True), start)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, now, {})
        for _ in range(4):
            now = next_step(now)
        jax.block_until_ready(now)
        restored = checkpoints.restore(now, 1)
    for name, array in start.items():
        np.testing.assert_array_equal(restored.arrays[name], array)


def test_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    written(tmp_path, 1)
    other = {**arrays(), "scale": jnp.ones(64)}
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(StateError, match="does not fit this model"),
    ):
        checkpoints.restore(other)


WRITER = """
import sys
import jax.numpy as jnp
from dh_jax.distributed.checkpoint import Checkpoints
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, {"x": jnp.arange(1000.0)}, {})
    checkpoints.wait()
    print("written", flush=True)
    checkpoints.save(2, {"x": jnp.arange(60e6)}, {})
"""


def test_a_kill_while_a_step_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        while not list(tmp_path.glob("2.*/**/d/*")):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "2").exists() and list(tmp_path.glob("2.*"))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        restored = checkpoints.restore({"x": jnp.zeros(1000)})
        np.testing.assert_array_equal(restored.arrays["x"], np.arange(1000.0))
        checkpoints.save(2, {"x": jnp.ones(1000)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]  # no leftovers
