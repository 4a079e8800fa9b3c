"""The README's config and every command of it, run as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dh_jax.config import load_data_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = ROOT / ".demo"


def own_config(folder: Path) -> Path:
    """The page's ``mine.yaml``, as its reader saves it."""
    found = re.search(r"<!-- file: mine.yaml -->\n```yaml\n(.*?)```", README, re.DOTALL)
    assert found is not None
    path = folder / "mine.yaml"
    path.write_text(found[1], encoding="utf-8")
    return path


def commands() -> list[str]:
    """Every line of every shell block but the first, which makes the environment."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[1:]:
        lines = block.replace("\\\n", " ").splitlines()
        found += [line for line in lines if line.strip() and not line.startswith("#")]
    return found


def test_the_config_of_ones_own_data_is_one(tmp_path: Path) -> None:
    config = load_data_config(own_config(tmp_path))
    assert set(config.sources) == {"maths", "prose"}


def test_commands_name_no_place_that_is_to_be_filled_in() -> None:
    assert len(commands()) > 30
    said = [line.partition(" #")[0] for line in commands()]
    assert [line for line in said if re.search(r"\b[A-Z]{4,}\b", line)] == []


@pytest.mark.slow
def test_every_command_and_snippet_runs_as_printed(tmp_path: Path) -> None:
    if not (DEMO / "report.html").exists():
        pytest.fail("run `make demo` first, as the page says")
    own_config(tmp_path)
    (tmp_path / ".demo").symlink_to(DEMO)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    snippets = re.findall(r"<!-- run: \w+ -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 3
    for k, code in enumerate(snippets):
        (tmp_path / f"snippet_{k}.py").write_text(code, encoding="utf-8")
    for line in (*(f"python snippet_{k}.py" for k in range(len(snippets))), *commands()):
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=os.environ | {"PATH": path},
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
