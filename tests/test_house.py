"""The plan of the house holds: floors, lazy imports, no torch, no backend, small files."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dh_jax"
BRIDGE = ROOT / "dh_torch_bridge"
HOUSE = ("dh_jax", "dh_torch_bridge", "hydra_plugins")

# The floor of every module: that of its longest prefix here. A new room must be entered.
FLOORS = {
    "dh_jax.batch": 1,
    "dh_jax.config": 1,
    "dh_jax.distillation_schema": 1,
    "dh_jax.distributed_schema": 1,
    "dh_jax.errors": 1,
    "dh_jax.extras": 1,
    "dh_jax.rules": 1,
    "dh_jax.schema": 1,
    "dh_jax.data": 2,
    "dh_jax.functions": 2,
    "dh_jax.distributed": 2,
    "dh_jax.unembedding": 2,
    "dh_jax.distributed.checkpoint": 3,
    "dh_jax.models": 3,
    "dh_jax.influence": 3,
    "dh_jax.mixing": 3,
    "dh_jax.distillation": 3,
    "dh_jax.influence.optimizer": 4,
    "dh_jax.attribution": 4,
    "dh_jax.completion": 4,
    "dh_jax.distilling": 4,
    "dh_jax.dryrun": 4,
    "dh_jax.evaluate": 4,
    "dh_jax.export": 4,
    "dh_jax.inspection": 4,
    "dh_jax.metrics": 4,
    "dh_jax.pricing": 4,
    "dh_jax.ranking": 4,
    "dh_jax.report": 4,
    "dh_jax.runconfig": 4,
    "dh_jax.runlog": 4,
    "dh_jax.runstate": 4,
    "dh_jax.sampling": 4,
    "dh_jax.search": 4,
    "dh_jax.signals": 4,
    "dh_jax.steering": 4,
    "dh_jax.step": 4,
    "dh_jax.trackers": 4,
    "dh_jax.train": 4,
    "dh_jax.viz": 4,
    "dh_jax.cli": 5,
    "dh_jax.commands": 5,
    "dh_jax.compose": 5,
    "dh_jax.console": 5,
    "dh_jax.demo": 5,
    "dh_jax.doctor": 5,
    "dh_jax.huge_pages": 5,
    "dh_jax.progress": 5,
    "dh_jax.shell_words": 5,
    "dh_jax": 6,  # the face of the whole; nobody inside looks at it
    "dh_torch_bridge": 7,
    "hydra_plugins": 7,
}
# Rooms of the third floor with doors to the stairs only.
SEPARATE = ("dh_jax.influence", "dh_jax.mixing", "dh_jax.distillation", "dh_jax.models")
MAX_LINES = 400


class Import(NamedTuple):
    """One import statement, wherever in a file it stands."""

    importer: str
    imported: str
    where: str  # file:line


def python_files(*folders: str) -> list[Path]:
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "__pycache__" not in path.parts
    ]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path = ROOT) -> Iterator[Import]:
    """Every import of a file: at the top, in functions, under TYPE_CHECKING alike."""
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, where)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = root.joinpath(*base.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield Import(name, f"{base}.{alias.name}" if is_module else base, where)


def floor(module: str) -> int:
    """The floor of the longest listed prefix; `dh_jax` itself covers no unlisted room."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        prefix = ".".join(parts[:n])
        if prefix in FLOORS and not (prefix == "dh_jax" and n < len(parts)):
            return FLOORS[prefix]
    raise AssertionError(f"{module} is on no floor; enter it in FLOORS of tests/test_house.py")


def top(module: str) -> str:
    return module.partition(".")[0]


def room(module: str) -> str | None:
    """The separate room a module lies in; None on the stairs and on other floors."""
    within = [r for r in SEPARATE if module == r or module.startswith(r + ".")]
    return within[0] if within and floor(module) == 3 else None


def upward(imports: list[Import]) -> list[str]:
    """Arrows that run up, and doors between rooms that should have none. A package's face
    (`__init__`) may name what lies inside it."""
    wrong = []
    for importer, imported, where in imports:
        if top(imported) not in HOUSE or imported.startswith(importer + "."):
            continue
        if floor(imported) > floor(importer):
            wrong.append(f"{where}: {importer} (F{floor(importer)}) imports {imported} above it")
        elif room(importer) and room(imported) and room(importer) != room(imported):
            wrong.append(f"{where}: {importer} opens a door to {imported}")
    return wrong


def all_imports() -> list[Import]:
    return [i for path in python_files(*HOUSE) for i in imports_of(path)]


def run_python(program: str, **environment: str) -> str:
    """Run a program in a fresh interpreter at the root; its output, or its error as failure."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- floors ----------------------------------------------------------------------------------


def test_no_import_runs_up_a_floor_or_between_separate_rooms() -> None:
    imports = all_imports()
    assert len(imports) > 50  # the walk found the house
    assert upward(imports) == []


def test_no_circle_of_imports() -> None:
    graph: dict[str, set[str]] = {}
    for importer, imported, _ in all_imports():
        if top(imported) in HOUSE and imported != importer:
            graph.setdefault(importer, set()).add(imported)
    # The lazy faces name everything below them for type checkers and import nothing.
    for face in ("dh_jax", "dh_torch_bridge"):
        graph.pop(face, None)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming it


@pytest.mark.parametrize(
    ("path", "source", "finding"),
    [
        ("dh_jax/data/a.py", "def f():\n    from dh_jax.train import step", "imports dh_jax.train"),
        (
            "dh_jax/batch.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import dh_jax.data.loader",
            "imports dh_jax.data.loader",
        ),
        ("dh_jax/influence/a.py", "from .optimizer import X", "imports dh_jax.influence.optimizer"),
        ("dh_jax/models/a.py", "from ..mixing import simplex", "opens a door to dh_jax.mixing"),
        ("dh_jax/data/a.py", "from dh_jax import get_loader", "imports dh_jax above"),
        ("dh_jax/train.py", "import dh_torch_bridge", "imports dh_torch_bridge above"),
    ],
)
def test_an_upward_arrow_is_found(path: str, source: str, finding: str, tmp_path: Path) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    (found,) = upward(list(imports_of(file, tmp_path)))
    assert finding in found


def test_a_module_on_no_floor_is_refused() -> None:
    with pytest.raises(AssertionError, match="on no floor"):
        floor("dh_jax.attic.trunk")


# --- what may be imported --------------------------------------------------------------------


def test_dh_jax_imports_no_torch() -> None:
    torch = [
        i.where
        for p in python_files("dh_jax")
        for i in imports_of(p)
        if top(i.imported) in ("torch", "dh_torch_bridge")
    ]
    assert torch == []


def test_dh_jax_data_imports_no_jax() -> None:
    jax = [
        i.where
        for p in python_files("dh_jax/data")
        for i in imports_of(p)
        if top(i.imported) in ("jax", "jaxlib", "flax", "optax", "orbax")
    ]
    assert jax == []


def test_every_data_module_imports_with_jax_blocked() -> None:
    names = [module_name(p, ROOT) for p in python_files("dh_jax/data")]
    output = run_python(
        "import importlib, sys\n"
        "sys.modules.update(dict.fromkeys(('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'torch')))\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "try: import jax\n"
        "except ImportError: print('blocked')\n"
    )
    assert output.strip() == "blocked"


def test_import_dh_jax_brings_in_nothing_heavy() -> None:
    heavy = (
        "jax",
        "numpy",
        "grain",
        "hydra",
        "omegaconf",
        "datasets",
        "transformers",
        "torch",
        "numba",
        "matplotlib",
        "rich",
        "pyarrow",
    )
    output = run_python(
        f"import sys, dh_jax, dh_torch_bridge; print([m for m in {heavy} if m in sys.modules])"
    )
    assert output.strip() == "[]"


def test_every_promised_name_is_there_and_no_import_initialises_a_jax_backend() -> None:
    # With a platform that does not exist, the first touch of a backend raises.
    names = [module_name(p, ROOT) for p in python_files(*HOUSE) if p.stem != "__main__"]
    output = run_python(
        "import importlib, dh_jax, dh_torch_bridge\n"
        "for face in (dh_jax, dh_torch_bridge):\n"
        "    for name in face.__all__:\n"
        "        assert name in dir(face) and getattr(face, name) is not None, name\n"
        "try: dh_jax.no_such_name\n"
        "except AttributeError as error: print(error)\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "import jax\n"
        "try: jax.devices()\n"
        "except RuntimeError: print('the trap works')\n",
        JAX_PLATFORMS="no_such_platform",
    )
    assert "has no attribute 'no_such_name'" in output
    assert output.strip().endswith("the trap works")


# --- files -----------------------------------------------------------------------------------


def committed_files() -> list[Path]:
    """What git tracks or would track; in an unpacked sdist, which has no git, every file but
    those in hidden folders (environments, caches)."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        cwd=ROOT,
        check=False,
    )
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        found = [
            p
            for p in ROOT.rglob("*")
            if not any(part.startswith(".") for part in p.relative_to(ROOT).parts[:-1])
        ]
    return [path for path in found if path.is_file()]


def test_every_python_file_says_what_it_is_for() -> None:
    files = python_files(*HOUSE, "tests", "benchmarks")
    silent = [
        str(p.relative_to(ROOT))
        for p in files
        if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_no_file_is_longer_than_the_house_allows() -> None:
    files = python_files(*HOUSE, "tests", "benchmarks")
    lengths = {
        str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files
    }
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_every_setting_of_jax_that_is_named_is_one_that_jax_reads() -> None:
    """A misspelt environment variable changes nothing and says nothing."""
    import jax

    processes = {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
    for path in python_files(*HOUSE, "tests", "benchmarks"):
        for name in set(re.findall(r'"(JAX_[A-Z_]+)"', path.read_text(encoding="utf-8"))):
            if name not in processes:
                assert name.lower() in jax.config.values, f"{path.relative_to(ROOT)}: {name}"


def test_no_committed_text_holds_the_address_of_a_package_index() -> None:
    address = re.compile(
        rb"--(?:extra-)?index-url|--find-links|index-url\s*=|/simple/|registry\s*=\s*\"http"
        rb"|(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org)"
    )
    holding = [
        str(p.relative_to(ROOT))
        for p in committed_files()
        if p != Path(__file__) and address.search(p.read_bytes())
    ]
    assert holding == []
