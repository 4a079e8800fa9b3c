"""Decoded rows say exactly what the arrays hold, whatever the text is."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dh_jax.batch import Batch, Origins
from dh_jax.data.loader import get_loader
from dh_jax.data.sources import document_id
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError
from dh_jax.inspection.rows import (
    Span,
    decode_rows,
    document_name,
    excerpt,
    parse_document,
    spans_of,
    to_json,
    visible,
)
from tests.dh_jax.data.tokenizer_cases import ODD_TEXTS, any_text, load_smollm2


@pytest.fixture(scope="module")
def smollm2() -> TokenizerWrapper:
    return load_smollm2()


def test_rows_of_a_loader_decode_to_the_documents_they_came_from(
    make_config: Any, corpora: dict[str, Path]
) -> None:
    """Every piece is looked up in the corpora by the hash of the whole text."""
    texts = {
        document_id(text): (name, text)
        for name, path in corpora.items()
        for text in (json.loads(line)["text"] for line in path.read_text().splitlines())
    }
    with get_loader(make_config(), batch_size=8, prefetch=0) as loader:
        batch = next(loader)
        rows = decode_rows(batch, loader.origins, loader.names, loader.tokenizer)
    assert [row.number for row in rows] == list(range(8))
    for row in rows:
        assert row.padding + sum(len(s.token_ids) for s in row.segments) == 64
        assert sum(s.targets for s in row.segments) == batch.loss_mask_BT[row.number].sum()
        for segment in row.segments:
            source, text = texts[int(segment.document, 16)]
            whole = loader.tokenizer.encode(text)
            piece = whole[segment.offset : segment.offset + len(segment.token_ids)]
            assert source == row.source and segment.token_ids == piece.tolist()
            # Nothing predicts the first token; everything behind it is learnt.
            shown = "".join(span.text for span in segment.spans if span.learnt)
            assert shown == loader.tokenizer.decode(piece[1:])
            goes_on = segment.offset + piece.size < whole.size
            assert segment.targets == piece.size - (not goes_on)


def test_rows_that_only_fill_up_a_batch_are_not_shown(make_config: Any) -> None:
    with get_loader(make_config(), batch_size=4096, split="probe", prefetch=0) as loader:
        batch = next(loader)
        rows = decode_rows(batch, loader.origins, loader.names, loader.tokenizer)
    assert 0 < len(rows) == (batch.source_ids_B >= 0).sum() < 4096


def test_masked_turns_are_told_from_learnt_ones(smollm2: TokenizerWrapper) -> None:
    turns = [
        ("user", "Naïve: 2 + 2? 👩‍👩‍👧🏽"),
        ("assistant", "Four. 🙂"),
        ("user", "Ok"),
        ("assistant", "Bye"),
    ]
    tokens: list[int] = []
    learnt: list[bool] = []
    for role, text in turns:
        head = smollm2.encode_rendered(f"<|im_start|>{role}\n").tolist()
        body = smollm2.encode_rendered(f"{text}<|im_end|>").tolist()
        tokens += [*head, *body]
        learnt += [False] * len(head) + [role == "assistant"] * len(body)
    n = len(tokens)
    mask = np.array([[*learnt[1:], False]])  # of targets: one place to the left
    ones = np.ones((1, n), np.int32)
    batch = Batch(np.array([tokens]), np.zeros_like(ones), mask, ones, ones, np.array([0]))
    origins = Origins(np.array([[7]], np.uint64), np.array([[0]]), np.array([[n]]))
    (row,) = decode_rows(batch, origins, ["chat"], smollm2)
    (segment,) = row.segments
    assert segment.spans == [
        Span("<|im_start|>user\nNaïve: 2 + 2? 👩‍👩‍👧🏽<|im_end|><|im_start|>assistant\n", False),
        Span("Four. 🙂<|im_end|>", True),
        Span("<|im_start|>user\nOk<|im_end|><|im_start|>assistant\n", False),
        Span("Bye<|im_end|>", True),
    ]
    assert segment.targets == sum(learnt)


@given(st.one_of(any_text, st.sampled_from(ODD_TEXTS[:-1])), st.data())
def test_spans_lose_no_character_wherever_the_mask_changes(
    smollm2: TokenizerWrapper, text: str, data: st.DataObject
) -> None:
    tokens = smollm2.encode(text)
    learnt = data.draw(st.lists(st.booleans(), min_size=tokens.size, max_size=tokens.size))
    spans = spans_of(tokens, np.array(learnt, np.bool_), smollm2)
    assert "".join(span.text for span in spans) == smollm2.decode(tokens)
    if text.isascii():  # then every token has characters of its own
        for flag in (True, False):
            kept = [t for t, each in zip(tokens.tolist(), learnt, strict=True) if each is flag]
            shown = "".join(span.text for span in spans if span.learnt is flag)
            assert shown == smollm2.decode(kept)


@given(st.lists(st.tuples(st.text(max_size=30), st.booleans()), max_size=8), st.integers(0, 50))
def test_an_excerpt_is_a_beginning_and_says_how_much_is_left_out(
    pairs: list[tuple[str, bool]], most: int
) -> None:
    spans = [Span(*pair) for pair in pairs]
    kept, left_out = excerpt(spans, most)
    whole = "".join(span.text for span in spans)
    assert "".join(span.text for span in kept) == whole[:most]
    assert left_out == max(0, len(whole) - most)


@given(st.text())
def test_no_control_character_is_left_to_steer_a_terminal(text: str) -> None:
    shown = visible(text)
    assert len(shown) == len(text)
    for old, new in zip(text, shown, strict=True):
        if unicodedata.category(old) == "Cc" and old not in "\t\n":
            assert unicodedata.category(new) == "So"
        else:
            assert new == old


@given(st.integers(0, 2**64 - 1))
def test_ids_come_back_from_their_names(number: int) -> None:
    assert parse_document(document_name(number)) == number
    assert parse_document(f"{number:#018X}".replace("X", "x")) == number  # as a report writes it


@pytest.mark.parametrize("name", ["", "12", "0x", "g" * 16, "1" * 17, "-" + "1" * 15, "١" * 16])
def test_what_is_not_an_id_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not 16 hexadecimal digits"):
        parse_document(name)


class Inner(NamedTuple):
    share: float
    counts: Any


class Outer(NamedTuple):
    name: str
    inner: list[Inner]
    folder: Path
    batch: object


def test_json_for_machines_has_names_null_and_nothing_left_out() -> None:
    value = Outer("é", [Inner(math.nan, np.arange(2)), Inner(0.5, {"a": (1, 2)})], Path("x/y"), 3j)
    assert json.loads(to_json(value, without=["batch"])) == {
        "name": "é",
        "inner": [{"share": None, "counts": [0, 1]}, {"share": 0.5, "counts": {"a": [1, 2]}}],
        "folder": "x/y",
    }
