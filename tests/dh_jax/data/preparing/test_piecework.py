"""Preparing by many hands, with interruptions: always the same bytes, and nothing half-done."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from omegaconf import OmegaConf

from dh_jax.config import DataConfig, SplitConfig
from dh_jax.data.prepare import Progress, prepare
from dh_jax.data.preparing import piecework, writing
from dh_jax.data.sources import document_id
from dh_jax.data.store import file_checksum, open_store
from dh_jax.errors import ConfigError, DataError, StateError
from tests.dh_jax.data.tokenizer_cases import STDLIB


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): file_checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def small_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many lots of several parts, and many shards, out of little text."""
    monkeypatch.setattr(piecework, "LOT_BYTES", 60_000)
    monkeypatch.setattr(piecework, "PART_TOKENS", 20_000)
    monkeypatch.setattr(writing, "SHARD_TOKENS", 50_000)


@pytest.fixture(scope="session")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Modules cut into functions, a JSONL file each, so that some repeat across files."""
    folder = tmp_path_factory.mktemp("many")
    for path in sorted(STDLIB.glob("[a-c]*.py")):
        parts = path.read_text(encoding="utf-8").split("\ndef ")
        lines = (json.dumps({"text": part}) + "\n" for part in parts if part.strip())
        (folder / f"{path.stem}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def config(make_config: Any, many_files: Path, corpora: dict[str, Path]) -> DataConfig:
    sources = {
        "files": {"kind": "files", "paths": [str(many_files)]},
        "again": {"kind": "files", "paths": [str(corpora["sums"]), f"{many_files}/a*.jsonl"]},
    }
    config: DataConfig = make_config(sources=sources)
    return config


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# --- the same bytes --------------------------------------------------------------------------


def test_how_sources_are_cut_into_parts_does_not_show(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(config, folder=tmp_path / "whole", workers=1)
    monkeypatch.setattr(piecework, "PART_TOKENS", 1000)
    monkeypatch.setattr(piecework, "LOT_BYTES", 10_000)
    cut = prepare(config, folder=tmp_path / "cut", workers=1)
    assert checksums(whole.folder) == checksums(cut.folder)
    assert whole.manifest["skipped"]["again"]["duplicate"] > 50


def test_workers_do_not_show(config: DataConfig, tmp_path: Path, small_lots: None) -> None:
    alone = prepare(config, folder=tmp_path / "alone", workers=1)
    calls: list[Progress] = []
    together = prepare(config, folder=tmp_path / "together", workers=2, progress=calls.append)
    assert checksums(alone.folder) == checksums(together.folder)
    assert len(alone.manifest["sources"]["files"]["train"]) > 2  # several shards
    mapped = [call for call in calls if call.step == "map"]
    assert [call.done for call in mapped] == list(range(1, mapped[0].total + 1))
    assert mapped[0].total > 5
    documents = [call.documents for call in calls]
    assert documents == sorted(documents) and calls[-1].step == "write"
    kept = sum(alone.total(n, s, "documents") for n in ("files", "again")
               for s in ("train", "probe", "eval"))  # fmt: skip
    assert calls[-1].documents + mapped[-1].dropped == kept + calls[-1].dropped
    assert not multiprocessing_children()


def multiprocessing_children() -> list[str]:
    """Worker processes of ours that are still there. The server that forks them stays."""
    server_and_tracker = [c for c in psutil.Process().children() if c.is_running()]
    return [str(child) for c in server_and_tracker for child in c.children()]


def test_near_duplicates_are_dropped_or_kept_together(
    config: DataConfig, tmp_path: Path, small_lots: None
) -> None:
    pytest.importorskip("rensa")
    text = (STDLIB / "heapq.py").read_text()
    variants = [text.replace("heap", word, 3) for word in ("heap", "pile", "mass", "lot", "bulk")]
    other = (STDLIB / "queue.py").read_text()
    more = tmp_path / "variants.jsonl"
    more.write_text("".join(json.dumps({"text": each}) + "\n" for each in [*variants, other]))
    near: dict[str, Any] = {"kind": "files", "paths": [str(more)]}
    stores = {}
    for action in ("ignore", "drop", "together"):
        changed = dataclasses.replace(config, sources={"near": near})
        changed.splits = SplitConfig(probe=0.4, eval=0.2)
        changed.prepare = dataclasses.replace(
            changed.prepare,
            near_duplicates=dataclasses.replace(changed.prepare.near_duplicates, action=action),
        )
        stores[action] = prepare(changed, folder=tmp_path / action, workers=1)
    counts = {
        action: [store.total("near", s, "documents") for s in ("train", "probe", "eval")]
        for action, store in stores.items()
    }
    assert sum(counts["ignore"]) == sum(counts["together"]) == 6 and max(counts["ignore"]) < 5
    assert sum(counts["drop"]) == 2 and max(counts["together"]) >= 5
    assert stores["drop"].manifest["skipped"]["near"] == {"near_duplicate": 4}
    assert stores["together"].manifest["skipped"]["near"] == {}


# --- interruptions ---------------------------------------------------------------------------


def fail_after(count: int) -> Any:
    """A progress callback that raises, as Ctrl-C does."""

    def progress(call: Progress) -> None:
        if call.done == count:
            raise KeyboardInterrupt

    return progress


def lot_times(folder: Path) -> dict[str, int]:
    return {
        path.parent.name: path.stat().st_mtime_ns for path in folder.glob("lots/lot-*/lot.json")
    }


def test_finished_lots_are_kept(config: DataConfig, tmp_path: Path, small_lots: None) -> None:
    straight = prepare(config, folder=tmp_path / "straight", workers=1)
    for count in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            prepare(config, folder=tmp_path / "store", workers=1, progress=fail_after(count))
        assert not (tmp_path / "store").exists()
    workshop = tmp_path / ".store.partial"
    before = lot_times(workshop)
    assert len(before) == 5
    flip(sorted(workshop.rglob("lot-000003/*.safetensors"))[-1])
    kept: dict[str, int] = {}

    def look(call: Progress) -> None:
        if call.step == "map" and call.done == call.total:
            kept.update(lot_times(workshop))

    resumed = prepare(config, folder=tmp_path / "store", workers=1, progress=look)
    assert checksums(straight.folder) == checksums(resumed.folder)
    assert {n for n, t in before.items() if kept[n] != t} == {"lot-000003"}  # damaged: redone
    assert not workshop.exists()


def test_lots_of_other_work_are_not_kept(
    config: DataConfig, many_files: Path, tmp_path: Path, small_lots: None
) -> None:
    extra = tmp_path / "extra.jsonl"
    extra.write_text('{"text": "the first version"}\n')
    more: dict[str, Any] = {"kind": "files", "paths": [str(extra)], "split": "train"}
    changing = dataclasses.replace(config, sources={"extra": more, **config.sources})
    with pytest.raises(KeyboardInterrupt):
        prepare(changing, folder=tmp_path / "store", workers=1, progress=fail_after(3))
    extra.write_text('{"text": "a second version"}\n')
    store = prepare(changing, folder=tmp_path / "store", workers=1)
    found = store.documents("extra", "train").ids_D.tolist()
    assert found == [document_id("a second version")]


def test_one_folder_has_one_preparer(config: DataConfig, tmp_path: Path) -> None:
    workshop = tmp_path / ".store.partial"
    workshop.mkdir()
    with (workshop / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="another process is preparing"):
            prepare(config, folder=tmp_path / "store")
    assert prepare(config, folder=tmp_path / "store").verify()


def test_what_a_kill_while_tidying_up_leaves_is_removed(
    config: DataConfig, tmp_path: Path, small_lots: None
) -> None:
    store = prepare(config, folder=tmp_path / "store", workers=1)
    before = checksums(store.folder)
    (tmp_path / ".store.partial" / "lots" / "lot-000000").mkdir(parents=True)
    prepare(config, folder=tmp_path / "store", workers=1)
    assert checksums(store.folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_folder_of_something_else_is_left_alone(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("three years of work")
    with pytest.raises(DataError, match="not a token store"):
        prepare(config, folder=tmp_path / "store")
    assert (tmp_path / "store" / "thesis.txt").read_text() == "three years of work"


def test_an_empty_lot_is_no_error_but_an_empty_source_is(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piecework, "LOT_BYTES", 1)
    (tmp_path / "a.jsonl").write_text('{"text": "  "}\n')
    paths = [str(tmp_path / "a.jsonl")]
    spec: dict[str, Any] = {"kind": "files", "paths": paths, "split": "train"}
    empty = dataclasses.replace(config, sources={"mostly": spec})
    with pytest.raises(DataError, match=r"'mostly' has no usable document .*'empty': 1"):
        prepare(empty, folder=tmp_path / "store")
    (tmp_path / "b.jsonl").write_text('{"text": "words"}\n')
    paths.append(str(tmp_path / "b.jsonl"))
    store = prepare(empty, folder=tmp_path / "store")
    assert store.totals()["mostly"]["train"]["documents"] == 1
    assert store.totals()["mostly"]["left_out"] == {"empty": 1}


# --- a full disk -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root; RLIMIT_FSIZE is tested elsewhere")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_leaves_no_store(
    config: DataConfig, small_disk: Path, tmp_path: Path, small_lots: None, workers: int
) -> None:
    with pytest.raises(DataError, match="No space left on device; free some space") as caught:
        prepare(config, folder=small_disk / "store", workers=workers)
    assert "\n" not in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == [".store.partial"]
    assert not [path for path in small_disk.rglob("*.partial") if path.name != ".store.partial"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    resumed = prepare(config, folder=small_disk / "store", workers=1)
    straight = prepare(config, folder=tmp_path / "store", workers=1)
    assert checksums(resumed.folder) == checksums(straight.folder)
    assert [path.name for path in small_disk.iterdir()] == ["store"]


# --- killed ----------------------------------------------------------------------------------


def start(config: DataConfig, target: Path, *extra: str) -> subprocess.Popen[bytes]:
    """`dh prepare` in a process group of its own."""
    file = target.with_suffix(".yaml")
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(config)), file)
    arguments = ["prepare", f"data={file}", f"data.store={target}", *extra]
    program = (
        "from dh_jax.data.preparing import piecework, writing\n"
        "piecework.LOT_BYTES, writing.SHARD_TOKENS = 60_000, 50_000\n"
        f"from dh_jax.cli import main; raise SystemExit(main({arguments}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def group(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@pytest.mark.slow
def test_ray_does_not_show(config: DataConfig, tmp_path: Path, small_lots: None) -> None:
    pytest.importorskip("ray")
    local = prepare(config, folder=tmp_path / "local", workers=1)
    process = start(config, tmp_path / "cluster", "--backend", "ray")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert checksums(local.folder) == checksums(tmp_path / "cluster")


@pytest.mark.slow
def test_a_users_error_comes_back_from_ray(config: DataConfig, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    bad: dict[str, Any] = {"kind": "files", "paths": [str(tmp_path / "bad.jsonl")]}
    wrong = dataclasses.replace(config, sources={**config.sources, "bad": bad})
    process = start(wrong, tmp_path / "store", "--backend", "ray")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert re.match(rb"dh prepare: source 'bad': \S+bad\.jsonl:2: not JSON", said.splitlines()[-1])
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
def test_killed_at_random_and_run_again_gives_the_same_bytes(
    config: DataConfig, tmp_path: Path, small_lots: None, whole_group: bool
) -> None:
    """SIGKILL at random moments of the work, of all processes or of the parent alone."""
    straight = prepare(config, folder=tmp_path / "straight", workers=1)
    target, rng, killed = tmp_path / "store", random.Random(int(whole_group)), 0
    workshop = tmp_path / ".store.partial"
    for _ in range(5):
        process = start(config, target, "data.prepare.workers=2")
        while not workshop.exists() and process.poll() is None:
            time.sleep(0.01)
        before = len(lot_times(workshop))
        deadline = time.monotonic() + 60
        # Not before there is something to lose; then any moment of what is left.
        while len(lot_times(workshop)) <= before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.random() * 0.08)
        if process.poll() is None:
            killed += 1
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
        gone = time.monotonic() + 5
        while group(process.pid) and time.monotonic() < gone:
            time.sleep(0.05)
        assert not group(process.pid)  # no orphan
        if target.exists():
            break
        assert not target.exists() or open_store(target).verify()
    assert killed >= 3
    prepare(config, folder=target, workers=1)
    assert checksums(straight.folder) == checksums(target)
    assert not workshop.exists()


@pytest.mark.slow
def test_a_worker_that_dies_is_named_and_nothing_hangs(
    config: DataConfig, tmp_path: Path, small_lots: None
) -> None:
    process = start(config, tmp_path / "store", "data.prepare.workers=2")
    while not lot_times(tmp_path / ".store.partial"):
        assert process.poll() is None
        time.sleep(0.005)
    workers = [p for p in group(process.pid) if p.ppid() != process.pid and p.pid != process.pid]
    workers[0].kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and b"a worker process died" in said
    assert not (tmp_path / "store").exists()


def test_wrong_settings_name_the_limit(make_config: Any) -> None:
    for changes, said in (
        ({"backend": "slurm"}, "allowed: local, ray"),
        ({"workers": 0}, r"prepare\.workers is 0"),
        ({"near_duplicates": {"action": "merge"}}, "allowed: ignore, drop, together"),
        ({"near_duplicates": {"threshold": 1.5}}, "at most 1"),
        ({"decontamination": {"ngram": 5}}, "least is 8"),
        ({"near": 1}, "unknown key"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_config(prepare=changes)
