"""A record of a source, how it becomes text, and what can be wrong with it."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from dh_jax.config import CONVERSATION_COLUMNS, ConversationConfig, TextConfig
from dh_jax.errors import ConfigError

# Why a record was not used. The list is fixed so that a saved state always has the same keys.
REASONS = (
    "empty",  # no text, or white space only; skipped and counted whatever on_error says
    "corrupt_json",  # a line that is not JSON
    "not_an_object",  # a line of JSON that is not an object of columns
    "invalid_utf8",
    "missing_column",
    "not_text",  # the column holds something other than text
    "bad_choice",  # a label outside the words that text.choices gives
    "not_a_conversation",  # roles or turns that make none, or no answer in it
    "truncated_file",  # the file ends early: what could be read was used
    "corrupt_file",  # the file cannot be decoded from some point on: what came before was used
    "unreadable_file",  # the file cannot be opened or read
)


class Fault(Exception):
    """A record that is not a document: caught where records are counted or refused."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


class Record(NamedTuple):
    """One record, not yet parsed, so that the shards it is not for need not parse it."""

    load: Callable[[], str | Mapping[str, Any]]  # its text or its columns; may raise Fault
    where: str  # to find it again


def missing_column(name: str, there: Iterable[str]) -> Fault:
    """The fault of a record or file without column ``name``."""
    names = list(there)
    said = f"no column {name!r}; there are: {', '.join(names) or 'none'}"
    if {"chosen", "rejected"} <= set(names):
        said += " (preference pairs, chosen and rejected, are not read)"
    return Fault("missing_column", said)


def fail(fault: Fault) -> NoReturn:
    """Raise ``fault``: the ``load`` of a record that stands for a fault."""
    raise fault


def decode(raw: bytes) -> str:
    """Strict UTF-8, without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Fault("invalid_utf8", f"invalid UTF-8 at byte {error.start}") from error


def parse_json(line: bytes) -> dict[str, Any]:
    """The columns on one line of a JSONL file; a blank line is an empty document."""
    if not line.strip():
        raise Fault("empty")
    text = decode(line)
    try:
        columns = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested beyond reason
        raise Fault("corrupt_json", f"not JSON ({error})") from error
    if not isinstance(columns, dict):
        raise Fault("not_an_object", f"expected a JSON object, got {type(columns).__name__}")
    return columns


def needed_columns(text: TextConfig) -> list[str]:
    """The columns ``text`` reads, each once.

    Raises:
        ConfigError: the template is malformed or names no column.
    """
    if text.conversation is not None:
        return list(dict.fromkeys(conversation_columns(text.conversation).values()))
    if text.column is not None:
        return [text.column]
    if text.columns is not None:
        return list(dict.fromkeys(text.columns))
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(text.template or "")]
    except ValueError as error:
        raise ConfigError(
            f"text.template {text.template!r}: {error}; write a literal brace twice"
        ) from error
    names = [field.split(".")[0].split("[")[0] for field in fields if field is not None]
    if not names or not all(name and not name.isdigit() for name in names):
        raise ConfigError(
            f"text.template {text.template!r} must name its columns, "
            "for example '{title}: {body}'"
        )
    return list(dict.fromkeys(names))


def conversation_columns(conversation: ConversationConfig) -> dict[str, str]:
    """What the conversation's shape reads -> the column that holds it."""
    named = {key: key for key in CONVERSATION_COLUMNS[conversation.shape]} | conversation.columns
    return {key: column for key, column in named.items() if column is not None}


def render(columns: Mapping[str, Any], text: TextConfig) -> str:
    """The text of a record, as ``text`` says.

    Raises:
        Fault: a column is missing or holds something that is not text.
    """
    if text.column is not None:
        return _word(columns, text.column, text)
    if text.columns is not None:
        return text.separator.join(_word(columns, name, text) for name in text.columns)
    values = {name: _value(columns, name, text) for name in needed_columns(text)}
    try:
        return (text.template or "").format_map(values)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise Fault("not_text", f"text.template does not fit the record ({error})") from error


def _word(columns: Mapping[str, Any], name: str, text: TextConfig) -> str:
    value = _value(columns, name, text)
    if not isinstance(value, str):
        raise Fault("not_text", f"column {name!r} holds {_kind(value)}, not text")
    return value


def _value(columns: Mapping[str, Any], name: str, text: TextConfig) -> Any:
    if name not in columns:
        raise missing_column(name, columns)
    value = columns[name]
    if name in text.choices:
        words = text.choices[name]
        if not isinstance(value, int) or not 0 <= value < len(words):
            raise Fault("bad_choice", f"column {name!r} is {value!r}, not 0 to {len(words) - 1}")
        return words[value]
    if value is None:
        raise Fault("not_text", f"column {name!r} holds null, not text")
    return value


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
