"""Ten mistakes that everybody makes: each ends in the one line that the documentation shows.

`docs/troubleshooting.md` has a heading and a message for each, with … for what differs from case
to case. Here every mistake is made, and what is said is held against the page.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from fsspec.registry import _registry
from omegaconf import OmegaConf

from dh_jax import cli, commands
from dh_jax.compose import compose_run
from dh_jax.data.tokenization import train_bpe
from dh_jax.runconfig import save_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
TINY = ("model.width=32", "model.layers=1", "model.heads=2", "model.kv_heads=1", "mesh.data=1")


class Case(NamedTuple):
    """What a mistake is made with."""

    data: Path  # a config of a prepared store
    streamed: Path  # the same without a store
    folder: Path  # empty
    patch: pytest.MonkeyPatch


def documented() -> dict[str, str]:
    """Heading -> the message below it."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^## (.+?)$.*?^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return {heading: " ".join(message.split()) for heading, message in found}


@pytest.fixture
def case(make_config: Any, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    paths = []
    for name, changes in (("data", {"store": str(store)}), ("streamed", {})):
        paths.append(tmp_path / f"{name}.yaml")
        content = dataclasses.asdict(make_config(**changes))
        OmegaConf.save(OmegaConf.create(content), paths[-1])
    return Case(*paths, tmp_path / "out", monkeypatch)


def misspelt_key(case: Case) -> list[str]:
    return ["train", f"data={case.data}", "training.stpes=3"]


def missing_extra(case: Case) -> list[str]:
    case.patch.setitem(sys.modules, "s3fs", None)
    case.patch.delitem(_registry, "s3", raising=False)  # of an earlier test
    case.patch.setattr("dh_jax.doctor.version", lambda n: None if n == "s3fs" else "1")
    return ["inspect", f"data={case.streamed}", "data.sources.code.paths=[s3://bucket/x.jsonl]"]


def wrong_tokenizer(case: Case) -> list[str]:
    train_bpe(["some other words " * 50], 300, case.folder / "tokenizer")
    return ["inspect", f"data={case.data}", f"data.tokenizer={case.folder / 'tokenizer'}"]


def no_space(case: Case) -> list[str]:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/report.html")

    case.patch.setattr(commands, "report", full)
    return ["report", "runs/a"]


def no_such_dataset(case: Case) -> list[str]:
    def absent(*_: Any, **__: Any) -> None:
        from datasets.exceptions import DatasetNotFoundError

        raise DatasetNotFoundError("Dataset 'HuggingFaceFW/fineweb-ed' doesn't exist on the Hub")

    case.patch.setattr("datasets.load_dataset_builder", absent)
    web = {"kind": "hub", "path": "HuggingFaceFW/fineweb-ed", "retry": {"attempts": 1}}
    return ["inspect", f"data={own(case, sources={'web': web})}"]


def own(case: Case, **changes: Any) -> Path:
    """The streamed config with other keys, in a file."""
    content = OmegaConf.to_container(OmegaConf.load(case.streamed))
    assert isinstance(content, dict)
    case.folder.mkdir(exist_ok=True)
    path = case.folder / "own.yaml"
    OmegaConf.save(OmegaConf.create({**content, "probes": {}} | changes), path)
    return path


def probe_overlap(case: Case) -> list[str]:
    content: Any = OmegaConf.to_container(OmegaConf.load(case.streamed))
    sources = {"code": content["sources"]["code"] | {"weight": 1.0, "split": "train"}}
    probes = {"exam": content["sources"]["code"] | {"weight": None, "split": "probe"}}
    path = own(case, sources=sources, probes=probes, store=str(case.folder / "store"))
    return ["prepare", f"data={path}"]


def weights_wrong(case: Case) -> list[str]:
    return ["train", f"data={case.data}", "data.sources.code.weight=0.9"]


def bad_checkpoint(case: Case) -> list[str]:
    case.folder.mkdir()
    return ["export", str(case.folder), str(case.folder / "model")]


def other_config(case: Case) -> list[str]:
    save_config(case.folder, compose_run([f"data={case.data}", *TINY, f"out={case.folder}"]))
    wider = [x.replace("32", "64") for x in TINY]
    return ["train", f"data={case.data}", *wider, f"out={case.folder}", "resume=true"]


def ctrl_c(case: Case) -> list[str]:
    facts = {"status": "interrupted", "step": 40}
    module = types.SimpleNamespace(check=lambda run: run, train=lambda *_, **__: facts)
    plain = commands.module
    case.patch.setattr(commands, "module", lambda n: module if n == "train" else plain(n))
    processes = types.SimpleNamespace(join=lambda _: 0, leave=lambda code, together: code)
    real = commands.module
    case.patch.setattr(
        commands, "module", lambda n: processes if n == "distributed.processes" else real(n)
    )
    return ["train", f"data={case.data}", *TINY]


MISTAKES: dict[str, tuple[Callable[[Case], list[str]], int]] = {
    "A misspelt key": (misspelt_key, 2),
    "A missing extra": (missing_extra, 2),
    "Another tokenizer": (wrong_tokenizer, 2),
    "No space left": (no_space, 2),
    "No such data set": (no_such_dataset, 2),
    "A probe that overlaps with training": (probe_overlap, 2),
    "Weights that are no mixture": (weights_wrong, 2),
    "A folder without a checkpoint": (bad_checkpoint, 2),
    "Resuming with another config": (other_config, 2),
    "Ctrl-C": (ctrl_c, 130),
}


@pytest.mark.parametrize("heading", MISTAKES)
def test_a_mistake_is_told_as_the_page_shows_it(
    heading: str, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    make, code = MISTAKES[heading]
    assert cli.main(make(case)) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    told = " ".join((said.err or said.out).split())
    pattern = ".*?".join(re.escape(part) for part in documented()[heading].split("…"))
    assert re.fullmatch(pattern, told), f"{told}\n\nis not\n\n{documented()[heading]}"


def test_the_page_shows_these_mistakes_and_no_others() -> None:
    assert list(documented()) == list(MISTAKES)


def test_debug_shows_the_trace(case: Case) -> None:
    from dh_jax.errors import ConfigError

    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        cli.main([*misspelt_key(case), "--debug"])


def test_a_fault_of_ours_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        return int(np.asarray([1.0, 2.0]))

    monkeypatch.setattr(commands, "configs", broken)
    with pytest.raises(TypeError):
        cli.main(["configs"])
    assert json.dumps(cli.EXIT_USER_ERROR) == "2"
