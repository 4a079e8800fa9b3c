"""The documentation keeps to the code: docstrings, examples, made pages, and links."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# A name whose letters say its shape: tokens_BT, scores_KBS, hidden_BTD, losses_n.
SHAPED = re.compile(r"_[A-Za-z]{1,5}$")
ARRAY = re.compile(r"\b(Array|NDArray|ndarray|Tensor)\b")
PLAIN = ("key", "step", "loss", "weight")  # keys and scalars


@pytest.fixture(scope="module", autouse=True)
def generate() -> Iterator[object]:
    sys.path.insert(0, str(DOCS))
    yield importlib.import_module("generate")
    sys.path.remove(str(DOCS))


def public() -> list[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Every public function and class of the modules that the API reference has, and methods."""
    sys.path.insert(0, str(DOCS))
    modules = [m for group in importlib.import_module("generate").API.values() for m in group]
    sys.path.remove(str(DOCS))
    found: list[tuple[str, ast.FunctionDef | ast.ClassDef]] = []
    for module in modules:
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                found.append((f"{module}.{node.name}", node))
                if isinstance(node, ast.ClassDef):
                    found += [
                        (f"{module}.{node.name}.{inner.name}", inner)
                        for inner in node.body
                        if isinstance(inner, ast.FunctionDef) and inner.name[0] != "_"
                    ]
    return found


def raised(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """Errors for users that a function raises itself; of a class, when it is made."""
    if isinstance(node, ast.ClassDef):
        made = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"]
        return raised(made[0]) if made else set()
    calls = (x.exc for x in ast.walk(node) if isinstance(x, ast.Raise))
    names = {c.func.id for c in calls if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
    return names & {"ConfigError", "DataError", "StateError"}


def test_every_public_name_has_a_docstring() -> None:
    names = public()
    assert len(names) > 200
    short = ("state_dict", "close", "names")  # a property or method whose name says it all
    silent = [n for n, node in names if not ast.get_docstring(node)]
    assert [n for n in silent if n.rpartition(".")[2] not in short] == []


def test_every_public_docstring_names_the_errors_that_are_raised() -> None:
    wrong = []
    for name, node in public():
        missing = {e for e in raised(node) if e not in (ast.get_docstring(node) or "")}
        wrong += [f"{name}: {', '.join(sorted(missing))}"] if missing else []
    assert wrong == []


def test_every_array_of_a_public_function_says_its_shape() -> None:
    wrong = []
    for name, node in public():
        if not isinstance(node, ast.FunctionDef):
            continue
        said = ast.get_docstring(node) or ""
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            kind = ast.unparse(argument.annotation) if argument.annotation else ""
            if not ARRAY.search(kind) or re.search("dict|Mapping|Callable", kind):
                continue
            shaped = SHAPED.search(argument.arg) or argument.arg in PLAIN
            if not shaped and argument.arg not in said:
                wrong.append(f"{name}: {argument.arg}")
    assert wrong == []


def test_doctests_pass() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "dh_jax").rglob("*.py"))
        if ">>>" in path.read_text(encoding="utf-8")
    ]
    tried = 0
    for module in modules:
        result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
        assert not result.failed, module
        tried += result.attempted
    assert tried >= 12


def blocks(*kinds: str) -> list[tuple[str, str]]:
    """(page, code) of every block of the documentation that is marked to be run."""
    found = []
    for page in sorted(DOCS.rglob("*.md")):
        if {"generated", "build"} & set(page.relative_to(DOCS).parts):
            continue
        pattern = rf"<!-- run: (?:{'|'.join(kinds)}) -->\n+```python\n(.*?)```"
        for code in re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL):
            found.append((page.relative_to(DOCS).as_posix(), code))
    return found


def test_examples_that_need_no_data_run_as_printed() -> None:
    ran = [page for page, code in blocks("jax") if page.startswith("howto/")]
    for page, code in blocks("jax"):
        if page in ran:
            exec(compile(code, page, "exec"), {"__name__": "example"})
    assert ran == ["howto/model.md", "howto/policy.md"]


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    made = ("generated/api/", "generated/configuration", "generated/commands", "generated/readme")
    for page in sorted(DOCS.rglob("*.md")):
        if {"generated", "build"} & set(page.relative_to(DOCS).parts):
            continue
        for target in re.findall(r"\]\(([^)#:]+?)\)", page.read_text(encoding="utf-8")):
            there = (page.parent / target).resolve()
            inside = there.relative_to(DOCS).as_posix() if there.is_relative_to(DOCS) else ""
            if inside.startswith(made):
                continue
            if inside.startswith("generated/"):  # a notebook, copied there
                there = ROOT / "notebooks" / there.name
            if not there.exists():
                broken.append(f"{page.relative_to(DOCS)}: {target}")
    assert broken == []


def test_the_configuration_reference_has_every_key_with_its_meaning() -> None:
    from dh_jax import schema

    sys.path.insert(0, str(DOCS))
    generate = importlib.import_module("generate")
    sys.path.remove(str(DOCS))
    text = generate.configuration()
    row = "| `interval` | `int` | `20` | steps between two moves; with a budget the least |"
    assert row in text
    for kind in (schema.DataConfig, schema.TrainingConfig, schema.MixingConfig, schema.MeshConfig):
        for name in kind.__dataclass_fields__:
            assert f"| `{name}` |" in text, (kind.__name__, name)
