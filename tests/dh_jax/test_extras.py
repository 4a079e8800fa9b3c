"""The command that brings an extra, by each way of installing; pip itself resolves it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dh_jax import extras

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'data-handler[s3]'"),
        (
            {"url": "https://host/data_handler-1.whl", "archive_info": {}},
            "pip install 'data-handler[s3] @ https://host/data_handler-1.whl'",
        ),
        ({"url": "file:///a%20b", "dir_info": {"editable": True}}, "pip install -e '/a b[s3]'"),
    ],
)
def test_a_command_for_each_way_of_installing(
    origin: dict[str, object] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = None if origin is None else json.dumps(origin)
    monkeypatch.setattr(extras, "distribution", lambda _: SimpleNamespace(read_text=lambda _: told))
    assert extras.install_command("s3") == command


def test_this_clone_names_its_folder_and_its_pins() -> None:
    command = extras.install_command("s3")
    assert command == f"pip install -c '{ROOT / 'constraints.txt'}' -e '{ROOT}[s3]'"
    pip = command.replace("pip", f"{sys.executable} -m pip", 1)
    done = subprocess.run(
        f"{pip} --dry-run --no-deps --no-build-isolation -q", shell=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
