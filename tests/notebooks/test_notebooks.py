"""Notebooks run from beginning to end; what is committed was made by running, and stays small."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import types
from pathlib import Path
from typing import Any

import pytest

from dh_jax.data.prepare import prepare
from dh_jax.demo import study

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "notebooks").glob("[0-9]_*.py"))
MOST_BYTES = 400_000
DOMAINS = ("code", "docs", "prose", "maths", "puzzles", "cpp")


def cells(source: Path) -> list[str]:
    """The cells of code of a notebook's source."""
    parts = re.split(r"^# %%", source.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [part for part in parts if not part.startswith(" [markdown]")]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_what_is_committed_was_made_from_this_source_and_is_whole(source: Path) -> None:
    kept = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in kept["cells"] if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]).strip() for cell in code] == [c.strip() for c in cells(source)]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and not any(output["output_type"] == "error" for output in outputs)
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert str(ROOT) not in text and "/site-packages/" not in text  # no path of one machine


@pytest.fixture
def small_demo(
    corpora: dict[str, Path],
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A stand-in for the demo's data: six corpora of functions, prepared in a second."""
    folder, lines = tmp_path / ".demo", [p.read_text().splitlines() for p in corpora.values()]
    (folder / "corpora").mkdir(parents=True)
    for number, domain in enumerate(DOMAINS):
        part = lines[number % 3][number // 3 :: 2]
        (folder / "corpora" / f"{domain}.jsonl").write_text("\n".join(part) + "\n")
    (folder / "tokenizer").symlink_to(tokenizer_folder)
    monkeypatch.setenv("DH_DEMO", str(folder))
    monkeypatch.setattr(study, "build_data", lambda folder, console=None: None)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    prepare("demo")
    return folder


def run(name: str) -> dict[str, Any]:
    """Run a notebook in this process; what it has defined."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(ROOT / "notebooks" / name):
        exec(compile(cell, "cell", "exec"), scope)
    return scope


def test_the_notebook_on_mixing_holds_on_other_data(
    small_demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quickest two run here in this process, on text that is not the demo's."""
    scope = run("2_mixing.py")
    assert scope["ours"].max() <= 1.0 + 1e-6 < scope["by_chance"].max()
    assert scope["error"] <= 2.0
    assert "the same batch: True" in capsys.readouterr().out
    assert Path.cwd() == small_demo.parent


def test_the_notebook_on_a_batchs_life_holds_on_other_data(
    small_demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scope = run("1_batch.py")
    same, others = scope["before"] == scope["after"], scope["others"]
    assert same[~others].all() and not same[others & scope["one"].loss_mask_BT].all()
    assert "equal: True" in capsys.readouterr().out


def execution() -> types.ModuleType:
    path = ROOT / "notebooks" / "execute.py"
    spec = importlib.util.spec_from_file_location("execute_notebooks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs(source: Path) -> None:
    """In a kernel of its own, on the demo's text (DH_DEMO, else .demo in the checkout)."""
    pytest.importorskip("nbclient", reason="pip install '.[notebooks]'")
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    notebook = execution().execute(source)
    streams = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    assert streams and not [o for o in streams if o.get("name") == "stderr"]
