"""Packed rows as people read them: decoded documents, and which of their tokens are learnt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dh_jax.batch import Batch, Origins
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError

# C0 and C1 control characters but for tab and line feed: a document must not steer a terminal.
_CONTROL = {i: 0x2400 + i for i in range(0x20) if chr(i) not in "\t\n"}
_CONTROL |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


class Span(NamedTuple):
    """Text whose tokens are alike: learnt, or only read as context."""

    text: str
    learnt: bool


class Segment(NamedTuple):
    """One document of a packed row, or a piece of it."""

    document: str  # its id, 16 hexadecimal digits
    offset: int  # first token within its document
    token_ids: list[int]
    targets: int  # targets that are learnt; the last may be the first token of the next piece
    spans: list[Span]


class DecodedRow(NamedTuple):
    """One packed row of one source."""

    number: int  # within its batch
    source: str
    segments: list[Segment]
    padding: int  # tokens


def decode_rows(
    batch: Batch,
    origins: Origins,
    names: Sequence[str],
    tokenizer: TokenizerWrapper,
    numbers: Iterable[int] | None = None,
) -> list[DecodedRow]:
    """Decode rows of a batch, document by document.

    A token is shown as learnt if it is a target within the row, so a document's first token
    never is: nothing predicts it.

    Args:
        batch: NumPy arrays, as a loader delivers them.
        origins: of the same batch.
        names: of the sources, in the order of ``source_ids_B``.
        tokenizer: that encoded them.
        numbers: which rows; default: all but those that fill up a last batch.
    """
    if numbers is None:
        numbers = np.flatnonzero(np.asarray(batch.source_ids_B) >= 0).tolist()
    return [_row(b, batch, origins, names, tokenizer) for b in numbers]


def _row(
    b: int, batch: Batch, origins: Origins, names: Sequence[str], tokenizer: TokenizerWrapper
) -> DecodedRow:
    segments = []
    for s in np.flatnonzero(origins.lengths_BS[b]).tolist():
        inside = batch.segment_ids_BT[b] == s + 1
        tokens, mask = batch.tokens_BT[b][inside], batch.loss_mask_BT[b][inside]
        segments.append(
            Segment(
                document_name(int(origins.document_ids_BS[b, s])),
                int(origins.offsets_BS[b, s]),
                tokens.tolist(),
                int(mask.sum()),
                spans_of(tokens, np.concatenate([[False], mask[:-1]]), tokenizer),
            )
        )
    padding = int((batch.segment_ids_BT[b] == 0).sum())
    return DecodedRow(b, names[int(batch.source_ids_B[b])], segments, padding)


def spans_of(
    tokens_n: npt.NDArray[Any], learnt_n: npt.NDArray[np.bool_], tokenizer: TokenizerWrapper
) -> list[Span]:
    """The text of some tokens, cut where learning begins or ends.

    The text is decoded whole and then cut, since a character may be spread over several tokens;
    one that a border splits goes to the tokens behind the border.
    """
    text, spans, at = tokenizer.decode(tokens_n), [], 0
    borders = (np.flatnonzero(np.diff(learnt_n)) + 1).tolist()
    for begin, end in pairwise([0, *borders, tokens_n.size]):
        if end == tokens_n.size:
            stop = len(text)
        else:
            before = tokenizer.decode(tokens_n[:end])
            stop = max(at, _agree(text, before))
        if stop > at:
            spans.append(Span(text[at:stop], bool(learnt_n[begin])))
        at = stop
    return spans


def _agree(text: str, other: str) -> int:
    """How many characters two texts share at their beginnings."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def excerpt(spans: Sequence[Span], most: int) -> tuple[list[Span], int]:
    """The first ``most`` characters of some spans, and how many are left out."""
    kept: list[Span] = []
    room = most
    for span in spans:
        if room > 0:
            kept.append(Span(span.text[:room], span.learnt))
        room -= len(span.text)
    return kept, max(0, -room)


def visible(text: str) -> str:
    """Text with control characters as pictures: they must not steer whoever looks at it.

    >>> visible("red: \\x1b[31m")
    'red: ␛[31m'
    """
    return text.translate(_CONTROL)


# --- names of documents, and what machines read ----------------------------------------------


def document_name(document_id: int) -> str:
    """An id as it is shown everywhere: 16 hexadecimal digits.

    >>> document_name(0xC0FFEE)
    '0000000000c0ffee'
    >>> parse_document("0x0000000000c0ffee") == 0xC0FFEE
    True
    """
    return f"{document_id:016x}"


def parse_document(name: str) -> int:
    """The id that `document_name` (or a report, with ``0x``) wrote.

    Raises:
        ConfigError: it is not 16 hexadecimal digits.
    """
    digits = name.lower().removeprefix("0x")
    if len(digits) != 16 or not set(digits) <= set("0123456789abcdef"):
        raise ConfigError(
            f"document id {name!r} is not 16 hexadecimal digits; copy one from `dh inspect`, "
            "`dh replay` or a report, for example 00c0ffee00c0ffee"
        )
    return int(digits, 16)


def to_json(value: Any, *, without: Sequence[str] = ()) -> str:
    """A NamedTuple as JSON: nested ones as objects, numbers that are not finite as null.

    Args:
        value: of plain values, arrays, paths and NamedTuples.
        without: fields of the outermost one that are left out.
    """
    content = {name: _plain(part) for name, part in value._asdict().items() if name not in without}
    return json.dumps(content, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
