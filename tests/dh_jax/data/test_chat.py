"""Masks of conversations: exactly the assistant's tokens, as marked templates have them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dh_jax.config import ConversationConfig
from dh_jax.data.chat import (
    answer_mask,
    encode_conversations,
    learn_frame,
    render_conversation,
)
from dh_jax.data.conversations import (
    Conversation,
    parse_conversation,
    read_conversation,
    write_conversation,
)
from dh_jax.data.records import Fault
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError
from tests import sharegpt
from tests.dh_jax.data.chat_cases import (
    CALL,
    CASES,
    ODD_CHATS,
    TOOL,
    chat,
    load_case,
    marked,
    oracle,
)
from tests.dh_jax.data.tokenizer_cases import any_text

NPM = [name for name, case in CASES.items() if case.package]


class Compared(NamedTuple):
    """What a comparison with the oracle saw."""

    conversations: int
    tokens: int
    trained: int
    mismatches: int
    spelling_control: int  # not compared: transformers takes what a message spells for control
    refused: int  # by the template itself


def compare(
    tokenizer: TokenizerWrapper, case: str, conversations: Iterable[Conversation]
) -> Compared:
    frame = learn_frame(tokenizer, {})
    theirs = oracle(tokenizer, CASES[case].patches)
    seen = tokens = trained = wrong = spelling = refused = 0
    for conversation in conversations:
        if frame.control.search(json.dumps(conversation.messages, ensure_ascii=False)):
            spelling += 1
            continue
        try:
            rendered = render_conversation(tokenizer, frame, write_conversation(conversation))
        except Fault as fault:
            assert fault.reason == "template_refuses"
            refused += 1
            continue
        located = encode_conversations(tokenizer, [rendered.text])[0]
        mask, _ = answer_mask(located, rendered.answers_A2)
        ids, expected = marked(theirs, conversation)
        seen, tokens, trained = seen + 1, tokens + len(ids), trained + sum(expected)
        wrong += located.ids.tolist() != ids or mask.tolist() != expected
        assert rendered.whole
    return Compared(seen, tokens, trained, wrong, spelling, refused)


def real_conversations(limit: int | None) -> Iterable[Conversation]:
    for record in sharegpt.records(limit):
        try:
            yield parse_conversation(read_conversation(record, ConversationConfig("sharegpt")))
        except Fault as fault:
            assert fault.reason in ("empty", "not_a_conversation")


# --- against the oracle ----------------------------------------------------------------------


def test_masks_of_odd_conversations_are_the_oracles(smollm2: TokenizerWrapper) -> None:
    compared = compare(smollm2, "smollm2", ODD_CHATS)
    assert compared[:1] + compared[3:] == (len(ODD_CHATS), 0, 0, 0)


def test_masks_of_real_conversations_are_the_oracles(smollm2: TokenizerWrapper) -> None:
    compared = compare(smollm2, "smollm2", real_conversations(250))
    print(compared)
    assert compared.conversations > 200 and compared.mismatches == 0


@pytest.mark.slow
def test_masks_of_all_real_conversations_are_the_oracles(smollm2: TokenizerWrapper) -> None:
    compared = compare(smollm2, "smollm2", real_conversations(None))
    print(compared)
    assert compared.conversations >= 10_000 and compared.mismatches == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", NPM)
def test_masks_under_other_templates_are_the_oracles(case: str, tmp_path: Path) -> None:
    tokenizer = load_case(case, tmp_path)
    odd = compare(tokenizer, case, ODD_CHATS)
    real = compare(tokenizer, case, real_conversations(600))
    print(case, odd, real)
    assert odd.mismatches == real.mismatches == 0
    assert odd.conversations >= len(ODD_CHATS) - odd.refused and odd.refused <= 1
    assert real.conversations > 200
    bos = tokenizer.bos_id
    rendered = tokenizer.apply_chat_template(chat("Hello", "Hi!").messages)
    ids = tokenizer.encode_rendered(rendered).tolist()
    assert ids.count(bos) == (1 if case != "qwen3" else 0)  # Qwen's has none
