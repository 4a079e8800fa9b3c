"""Execute notebooks and keep what they show: ``python notebooks/execute.py [NUMBER ...]``.

The ``.py`` files are the source (jupytext's percent format); each ``.ipynb`` is made by running
one from beginning to end in a fresh kernel. Nothing that differs between two runs of the same
code is kept beside the outputs themselves.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
TIMEOUT = 900  # seconds a cell, on a machine that is busy with other work


def notebooks() -> list[Path]:
    """The sources, in the order of their numbers."""
    return sorted(HERE.glob("[0-9]_*.py"))


def execute(source: Path) -> nbformat.NotebookNode:
    """A notebook run from its source.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; shows the cell and the trace.
    """
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3", "language": "python", "name": "python3"
    }  # fmt: skip
    NotebookClient(
        notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(HERE)}}, record_timing=False
    ).execute()
    notebook.metadata.pop("language_info", None)  # names the interpreter's patch release
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem}-{number}"  # jupytext draws them at random
    return notebook


def processor_seconds() -> float:
    """What the kernels that have ended took, over all cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(numbers: list[str]) -> None:
    # Progress bars are quiet here; that their widgets are not installed is no news.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    for source in notebooks():
        if numbers and source.name.partition("_")[0] not in numbers:
            continue
        start, spent = time.perf_counter(), processor_seconds()
        notebook = execute(source)
        target = source.with_suffix(".ipynb")
        nbformat.write(notebook, target)
        size = target.stat().st_size / 1000
        print(
            f"{target.name}: {time.perf_counter() - start:.0f} s, "
            f"{processor_seconds() - spent:.0f} s of processor, {size:.0f} kB",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
