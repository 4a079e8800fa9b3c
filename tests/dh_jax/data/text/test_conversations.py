"""Records of the common shapes become the same canonical conversation, or say what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dh_jax.config import ConversationConfig, load_data_config
from dh_jax.data.reading.records import Fault
from dh_jax.data.text.conversations import (
    Conversation,
    parse_conversation,
    read_conversation,
    write_conversation,
)
from dh_jax.errors import ConfigError

PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Où ?"},
    {"role": "assistant", "content": "Là."},
]


def read(record: Any, shape: str = "messages", **columns: str | None) -> Conversation:
    return parse_conversation(read_conversation(record, ConversationConfig(shape, columns)))


def test_the_same_conversation_in_every_shape_is_the_same_document() -> None:
    def turns(role: str, text: str, *names: str) -> list[dict[str, str]]:
        return [{role: name, text: m["content"]} for name, m in zip(names, PLAIN, strict=True)]

    sharegpt = turns("from", "value", "system", "human", "gpt")
    records = [
        ("messages", {"messages": PLAIN, "id": 7}, {}),
        ("messages", {"messages": json.dumps(PLAIN)}, {}),
        ("messages", {"chat": sharegpt}, {"messages": "chat"}),
        ("sharegpt", {"conversations": sharegpt}, {}),
        ("messages", {"messages": [{"content": None, "role": None, **x} for x in sharegpt]}, {}),
        ("sharegpt", {"conversations": sharegpt[1:], "s": "Be brief."}, {"system": "s"}),
        ("sharegpt", {"conversations": turns("role", "content", "system", "user", "bing")}, {}),
        ("instruction", {"instruction": "Où ?", "input": "", "output": "Là.", "s": "Be brief."},
         {"system": "s"}),
        ("instruction", {"ask": "Où ?", "response": "Là.", "s": "Be brief."},
         {"instruction": "ask", "input": None, "output": "response", "system": "s"}),
        ("prompt_completion", {"prompt": "Où ?", "completion": "Là.", "s": "Be brief."},
         {"system": "s"}),
        ("prompt_completion", {"prompt": PLAIN[:2], "completion": PLAIN[2:]}, {}),
        ("messages", {"messages": [
            {**m, "content": [{"type": "text", "text": m["content"]}], "time": i, "name": None}
            for i, m in enumerate(PLAIN)]}, {}),
    ]  # fmt: skip
    texts = {
        read_conversation(record, ConversationConfig(shape, dict(columns)))
        for shape, record, columns in records
    }
    assert texts == {write_conversation(Conversation(PLAIN))}


def test_instruction_and_input_are_one_turn() -> None:
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert read(record, "instruction").messages[0]["content"] == "Add.\n\n1 2"


def test_tools_and_calls_are_kept_without_the_nulls_that_arrow_adds() -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}, "id": None}
    record = {
        "messages": [
            PLAIN[1],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_calls": None},
            {"role": "assistant", "content": "So 3.", "thinking": "hm"},
        ],
        "functions": json.dumps([{"name": "f", "strict": None}]),
    }
    conversation = read(record, tools="functions")
    assert conversation.tools == [{"name": "f"}]
    assert conversation.messages[1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "So 3.", "reasoning_content": "hm"},
    ]


@pytest.mark.parametrize(
    ("record", "reason", "said"),
    [
        ({"text": "x"}, "missing_column", "no column 'messages'; there are: text"),
        ({"chosen": [], "rejected": []}, "missing_column", "preference pairs"),
        ({"messages": []}, "not_a_conversation", "list of turns"),
        ({"messages": "hello"}, "not_a_conversation", "not JSON"),
        ({"messages": [3]}, "not_a_conversation", "a turn is '3'"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "not_a_conversation", "'narrator'"),
        ({"messages": PLAIN[:2]}, "not_a_conversation", "no assistant among its 2 turns"),
        ({"messages": [PLAIN[1], {"role": "assistant", "content": " \n"}]}, "empty", "empty"),
        ({"messages": [{"role": "user", "content": 3}]}, "not_text", "int '3'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "not_text",
            "list",
        ),
        ("a file of text", "not_a_conversation", "plain text"),
    ],
)
def test_what_is_no_conversation_says_why(record: Any, reason: str, said: str) -> None:
    with pytest.raises(Fault, match=said) as caught:
        read(record)
    assert caught.value.reason == reason


def config(conversation: Any) -> Any:
    source = {"kind": "files", "paths": ["x"], "text": {"conversation": conversation}}
    return load_data_config({"sources": {"s": source}}).sources["s"].text.conversation


def test_a_config_names_the_shape_or_all_of_it() -> None:
    assert config("sharegpt") == ConversationConfig("sharegpt")
    assert config({}) == ConversationConfig("messages")
    full = {"shape": "instruction", "columns": {"input": None, "output": "o"}, "too_long": "drop"}
    assert config(full).columns == {"input": None, "output": "o"}


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        ("shargpt", "did you mean 'sharegpt'"),
        ({"too_long": "cut"}, "allowed: truncate, drop"),
        ({"dropped_text": "ignore"}, "allowed: refuse, keep"),
        ({"columns": {"message": "m"}}, "did you mean 'messages'"),
        ({"columns": {"messages": None}}, "columns.messages is null"),
        ({"shapes": "x"}, "unknown key"),
    ],
)
def test_a_config_that_asks_for_the_impossible_is_refused(conversation: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(conversation)


def test_a_source_is_a_conversation_or_text_not_both() -> None:
    text = {"conversation": "messages", "column": "text"}
    source = {"kind": "files", "paths": ["x"], "text": text}
    with pytest.raises(ConfigError, match="exactly one of column, columns, template, conversation"):
        load_data_config({"sources": {"s": source}})
