"""Conversations: records of the common shapes -> messages, in one canonical JSON text.

That text is the document: its hash is the id, so duplicates and splits work as for any other
text, whatever shape a conversation came in. The encoder parses it back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from dh_jax.config import ConversationConfig
from dh_jax.data.reading.records import Fault, conversation_columns, missing_column

Message = dict[str, Any]

# What ShareGPT and its kin call the roles; messages may use these names too.
ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("developer",), "developer"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bard", "bing"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
# What chat templates read of a message. Anything else in a record (times, ratings) is left out,
# so that it does not make two equal conversations differ.
FIELDS = ("name", "tool_calls", "tool_call_id")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; the first is kept


class Conversation(NamedTuple):
    """Messages in order, and the tools that the assistant may call."""

    messages: list[Message]  # role, content (null only beside tool_calls), some of FIELDS
    tools: list[Any] | None = None  # JSON schemas


def read_conversation(record: Any, config: ConversationConfig) -> str:
    """The canonical JSON of a record's conversation; `parse_conversation` reads it.

    Args:
        record: the columns of a record.
        config: which shape, in which columns.

    Raises:
        Fault: a column is missing, a turn is not text, a role is unknown, or nobody answers
            (a conversation whose answers are all blank is an empty document).
    """
    if not isinstance(record, Mapping):
        raise Fault("not_a_conversation", "a file of plain text holds no conversations")
    parts = {}
    for key, column in conversation_columns(config).items():
        if column not in record:
            raise missing_column(column, record)
        parts[key] = record[column]
    messages = _messages(parts, config.shape)
    if parts.get("system"):
        messages.insert(0, {"role": "system", "content": _content(parts["system"])})
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise Fault("not_a_conversation", f"no assistant among its {len(messages)} turns")
    if not any((m["content"] or "").strip() or "tool_calls" in m for m in answers):
        raise Fault("empty")
    return write_conversation(Conversation(messages, _tools(parts.get("tools"))))


def write_conversation(conversation: Conversation) -> str:
    """The canonical JSON of a conversation."""
    content: dict[str, Any] = {"messages": conversation.messages}
    if conversation.tools:
        content["tools"] = conversation.tools
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def parse_conversation(text: str) -> Conversation:
    """The conversation that `write_conversation` wrote."""
    return Conversation(**json.loads(text))


def _messages(parts: Mapping[str, Any], shape: str) -> list[Message]:
    if shape == "messages":
        return _turns(parts["messages"], "role", "content")
    if shape == "sharegpt":
        return _turns(parts["conversations"], "from", "value")
    if shape == "instruction":
        asked = [_content(parts["instruction"]), _content(parts.get("input"))]
        question, answer = "\n\n".join(part for part in asked if part), parts["output"]
    else:
        question, answer = parts["prompt"], parts["completion"]
    return _as_turns(question, "user") + _as_turns(answer, "assistant")


def _as_turns(value: Any, role: str) -> list[Message]:
    """A prompt or completion: one turn of text, or already a list of messages."""
    if isinstance(value, list):
        return _turns(value, "role", "content")
    return [{"role": role, "content": _content(value)}]


def _turns(value: Any, role_key: str, content_key: str) -> list[Message]:
    if isinstance(value, str):  # some data sets keep messages as JSON in a column of strings
        value = _from_json(value, "messages")
    if not isinstance(value, list) or not value:
        raise Fault("not_a_conversation", f"expected a list of turns, got {str(value)[:40]!r}")
    return [_turn(turn, role_key, content_key) for turn in value]


def _turn(turn: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, Mapping):
        raise Fault("not_a_conversation", f"a turn is {str(turn)[:40]!r}, not role and content")
    # A few ShareGPT files say role and content, a few files of messages from and value. In Arrow
    # every turn has all keys that any has, null where it has none.
    name = _first(turn, role_key, "from", "role")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise Fault(
            "not_a_conversation",
            f"a turn has {role_key} {name!r}; known: {', '.join(ROLES)}",
        )
    kept = {key: _without_nulls(turn[key]) for key in FIELDS if turn.get(key)}
    reasoning = next((turn[key] for key in REASONING if turn.get(key)), None)
    if reasoning:
        kept[REASONING[0]] = _content(reasoning)
    content = _first(turn, content_key, "value", "content")
    if content is None and "tool_calls" in kept:
        return {"role": role, "content": None, **kept}
    return {"role": role, "content": _content(content), **kept}


def _first(turn: Mapping[str, Any], *keys: str) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _content(value: Any) -> str:
    """Text, also from a list of text parts; nothing is the empty text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        words = [text for text in texts if isinstance(text, str)]
        if len(words) == len(texts):
            return "".join(words)
    raise Fault("not_text", f"a turn holds {type(value).__name__} {str(value)[:40]!r}, not text")


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        value = _from_json(value, "tools")
    if not value:
        return None
    if not isinstance(value, list):
        raise Fault("not_a_conversation", f"tools are {str(value)[:40]!r}, not a list")
    return [_without_nulls(tool) for tool in value]


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Fault("not_a_conversation", f"{what} are text but not JSON ({error})") from error


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct of a column all keys that any of them has, null where absent."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value
