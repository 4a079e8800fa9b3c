"""What the trackers leave on disk, read back without them; and the cure where one is missing."""

from __future__ import annotations

import struct
import sys
import tomllib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from dh_jax import trackers
from dh_jax.errors import ConfigError
from dh_jax.runlog import Listener

ROOT = Path(__file__).resolve().parents[2]
RECORDS: list[dict[str, Any]] = [
    {"kind": "train", "step": 1, "loss": 2.5, "weights": {"code": 0.75, "mail": 0.25}},
    {"kind": "eval", "step": 1, "domains": {"code": {"loss": 2.25, "bits_per_byte": 1.5}}},
    {"kind": "train", "step": 2, "loss": 2.0, "weights": {"code": 0.5, "mail": 0.5}},
]
TRAIN = ("train/loss", "train/weights/code", "train/weights/mail")
EVAL = ("eval/domains/code/loss", "eval/domains/code/bits_per_byte")
SCALARS = [
    *zip([1] * 3, TRAIN, (2.5, 0.75, 0.25), strict=True),
    *zip([1] * 2, EVAL, (2.25, 1.5), strict=True),
    *zip([2] * 3, TRAIN, (2.0, 0.5, 0.5), strict=True),
]


def events(folder: Path) -> Iterator[Any]:
    """Every event of the files in a folder: TFRecord frames of length, CRC, message, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[12 + length + 4 :]


def test_tensorboard_holds_every_number_once_the_run_is_over(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with trackers.tensorboard(tmp_path) as listen:
        for record in RECORDS:
            listen(record)
    found = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert sorted(found) == sorted(SCALARS)


def test_tensorboard_hides_what_a_killed_run_logged_behind_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import SessionLog

    with trackers.tensorboard(tmp_path, resumed_at=7):
        pass
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [8]


def framed(content: bytes) -> Iterator[bytes]:
    """Messages of a .wandb file, a LevelDB log after 7 bytes of header: frames of CRC, length and
    kind (1 whole, 2 first, 3 middle, 4 last) that cross no block of 32 KiB."""
    at, message = 7, b""
    while at < len(content):
        left = 2**15 - at % 2**15
        if left < 7:  # no room for a frame's head
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield message
            message = b""


def test_wandb_keeps_every_number_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    with trackers.wandb(tmp_path, {"training": {"steps": 2}}) as listen:
        for record in RECORDS:
            listen(record)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found = []
    for message in framed(path.read_bytes()):
        history = Record.FromString(message).history
        items = {"/".join(i.nested_key) or i.key: float(i.value_json) for i in history.item}
        found += [(history.step.num, k, v) for k, v in items.items() if not k.startswith("_")]
    assert sorted(found) == sorted(SCALARS)


@pytest.mark.parametrize(
    ("key", "package", "tracker"),
    [
        ("tensorboard", "tensorboardX", lambda folder: trackers.tensorboard(folder)),
        ("wandb", "wandb", lambda folder: trackers.wandb(folder, {})),
    ],
)
def test_a_missing_tracker_comes_with_the_line_that_installs_it(
    key: str, package: str, tracker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what an absent package looks like
    context: AbstractContextManager[Listener] = tracker(tmp_path)
    cure = rf"training.{key} needs {package}; pip install .*\[track\]'"
    with pytest.raises(ConfigError, match=cure), context:
        pass
    assert list(tmp_path.iterdir()) == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(line.startswith(package) for line in extras["optional-dependencies"]["track"])
