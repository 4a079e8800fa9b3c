"""Wheel, sdist, editable install and workspace member: each works in an empty environment.

Every environment here starts with nothing in it; data-handler alone is installed into it, and
the third-party packages are then lent from the environment that runs the tests. A .pth file
lends them: it adds a folder to the path without running the .pth files inside that folder, so
the editable data-handler of the running environment is not lent with them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PURELIB = Path(sysconfig.get_paths()["purelib"])
OFFLINE = {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "UV_PYTHON_DOWNLOADS": "never"}
MIXED_PRETRAIN = {  # the older library's mixture
    "dclm": 0.25,
    "fineweb_edu": 0.35,
    "github_code": 0.10,
    "finemath": 0.15,
    "slimpajama": 0.15,
}


class Environment(NamedTuple):
    """An environment into which data-handler was installed in one of the possible ways."""

    folder: Path
    checkout: bool  # whether the installation points at the checkout

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def configs(self) -> Path:
        """Where this installation's configs must lie."""
        return ROOT / "configs" if self.checkout else purelib(self.folder) / "dh_jax" / "configs"


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    """Run a command away from the checkout; its output, or its errors as a test failure."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean, **OFFLINE, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def purelib(folder: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return folder / "lib" / version / "site-packages"


def environment(folder: Path) -> None:
    """Make an environment without data-handler, third-party packages lent."""
    venv.create(folder, with_pip=False, symlinks=True)
    (purelib(folder) / "lent.pth").write_text(f"{PURELIB}\n")
    missing = "import importlib.util as u; print(u.find_spec('dh_jax'), u.find_spec('jax').origin)"
    found, lent = run([folder / "bin" / "python", "-c", missing], cwd=folder).split()
    assert found == "None"  # else what follows would prove nothing
    assert Path(lent).is_relative_to(PURELIB)


def install(folder: Path, *what: str | Path) -> None:
    """Install into a fresh environment; pip ignores the data-handler that is lent metadata only."""
    environment(folder)
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            folder / "bin" / "python",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--ignore-installed",
            *what,
        ],
        cwd=folder,
    )


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], cwd=folder)
    return folder


@pytest.fixture(scope="module", params=["wheel", "sdist", "editable"])
def installed(
    request: pytest.FixtureRequest, distributions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """data-handler in an otherwise empty environment."""
    folder = tmp_path_factory.mktemp(request.param) / "env"
    if request.param == "editable":
        install(folder, "-e", ROOT)
    else:
        pattern = {"wheel": "*.whl", "sdist": "*.tar.gz"}[request.param]
        (archive,) = distributions.glob(pattern)
        install(folder, archive)
    return Environment(folder, checkout=request.param == "editable")


def test_dh_lists_the_configs_of_its_own_installation(
    installed: Environment, tmp_path: Path
) -> None:
    folder, *lines = run([installed.bin / "dh", "configs"], cwd=tmp_path).splitlines()
    assert Path(folder) == installed.configs
    assert "mixed_pretrain" in [line.split()[0] for line in lines if line]


def test_every_shipped_config_is_in_the_installation(installed: Environment) -> None:
    def names(folder: Path) -> list[str]:
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.yaml"))

    assert names(installed.configs) == names(ROOT / "configs")


def test_hydra_finds_the_search_path_plugin(installed: Environment, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from hydra import compose, initialize_config_dir\n"
        f"with initialize_config_dir({str(tmp_path)!r}, version_base=None):\n"
        "    print(*compose(overrides=['+data=mixed_pretrain']).data.sources)\n"
        "print('jax' in sys.modules)"
    )
    sources, jax_imported = run(
        [installed.bin / "python", "-c", program], cwd=tmp_path
    ).splitlines()
    assert sources.split() == list(MIXED_PRETRAIN)
    assert jax_imported == "False"


def test_the_version_is_that_of_the_project(installed: Environment, tmp_path: Path) -> None:
    found = run(
        [installed.bin / "python", "-c", "import dh_jax; print(dh_jax.__version__)"], cwd=tmp_path
    )
    assert found.strip() == project()["version"]


def test_the_sdist_holds_what_a_checkout_needs(distributions: Path, tmp_path: Path) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    for name in (
        "Makefile",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "tests/test_packaging.py",
        "hydra_plugins/data_handler_search_path.py",
        ".ci/run",
    ):
        assert (unpacked / name).is_file(), name


# --- a neighbour in a workspace --------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with this repository as a member beside ``consumer``, synchronised by uv.

    Third-party packages are excluded from resolution, so no index is asked for them, and lent
    as above; the workspace dependency itself is resolved, locked, built and installed as ever.
    """
    folder = tmp_path_factory.mktemp("neighbour") / "workspace"
    shutil.copytree(ROOT / "tests" / "workspace", folder)
    (folder / "packages" / "data-handler").symlink_to(ROOT, target_is_directory=True)
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    names = sorted({Requirement(line).name for group in groups for line in group})
    with (folder / "pyproject.toml").open("a") as file:
        file.write(f"\n[tool.uv]\nexclude-dependencies = {json.dumps(names)}\n")
    environment(folder / ".venv")
    run(
        [sys.executable, "-m", "uv", "sync", "--all-packages", "--no-build-isolation"],
        cwd=folder,
        UV_CACHE_DIR=str(folder / "cache"),
    )
    return folder


def test_a_workspace_member_composes_our_data_and_imports_from_both_packages(
    workspace: Path, tmp_path: Path
) -> None:
    lock = tomllib.loads((workspace / "uv.lock").read_text())
    (ours,) = [p for p in lock["package"] if p["name"] == "data-handler"]
    assert ours["source"] == {"editable": "packages/data-handler"}

    application = workspace / ".venv" / "bin" / "consumer"
    output = run(
        [application, "data=mixed_pretrain", "data.max_length=512"],
        cwd=tmp_path,
        JAX_PLATFORMS="cpu",
    )
    seen = json.loads(output.splitlines()[-1])
    assert seen["by_name"] == MIXED_PRETRAIN
    assert seen["composed"] == MIXED_PRETRAIN
    assert seen["max_length"] == 512
    assert Path(seen["configs"]).resolve() == ROOT / "configs"
    assert seen["exported"] == {
        "dh_jax": [
            "dh_jax.data.loader.get_loader",
            "dh_jax.influence.optimizer.InfluenceAwareOptimizer",
        ],
        "dh_torch_bridge": [
            "dh_torch_bridge.data.get_loader",
            "dh_torch_bridge.optimizer.InfluenceAwareOptimizer",
        ],
    }
