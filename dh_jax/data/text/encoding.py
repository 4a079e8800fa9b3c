"""Encoding: documents of a source -> tokens, and which of them are learnt.

The one place where text meets the tokenizer; streaming and preparing both go through it, so
they cannot disagree.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dh_jax.config import ConversationConfig, DataConfig, SourceConfig
from dh_jax.data.packing import TokenShard
from dh_jax.data.reading.records import Fault
from dh_jax.data.sources import Document
from dh_jax.data.text.chat import (
    Rendered,
    answer_mask,
    encode_conversations,
    learn_frame,
    render_conversation,
)
from dh_jax.data.text.offsets import Located
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import DataError

CHARACTERS_A_CORE = 2**18  # handed to the tokenizer at once
Encoded = TypeVar("Encoded")


class TokenDocument(NamedTuple):
    """One tokenised document on its way into a store or a window."""

    tokens: npt.NDArray[Any]  # [n] unsigned
    id: int  # unsigned 64-bit content hash
    bytes: int  # UTF-8 bytes of its text
    loss_mask: npt.NDArray[np.bool_] | None = None  # [n]; None: every token is learnt


class Encoder(Protocol):
    """Encodes documents together, which keeps all cores busy."""

    def __call__(
        self, documents: Sequence[Document], skipped: Counter[str]
    ) -> list[TokenDocument | None]:
        """One entry for each document; None for one left out, which ``skipped`` then counts."""


def make_encoder(spec: SourceConfig, config: DataConfig, tokenizer: TokenizerWrapper) -> Encoder:
    """The encoder that a source's records need."""
    if spec.text.conversation is not None:
        return conversation_encoder(spec.text.conversation, config, tokenizer)
    return text_encoder(tokenizer, config.on_error)


def text_encoder(tokenizer: TokenizerWrapper, on_error: str) -> Encoder:
    """Plain text: every token is learnt; BOS and EOS as the tokenizer's policy says.

    ``skipped`` counts ``no_tokens``: texts of which the vocabulary has nothing; and, where
    ``on_error`` is ``skip``, ``control_token``: texts that spell one out (unigram models).
    """

    def encode(documents: Sequence[Document], skipped: Counter[str]) -> list[TokenDocument | None]:
        encoded: list[TokenDocument | None] = []
        for group in _together(documents):
            ids = _one_by_one_if_need_be(tokenizer.encode_batch, [d.text for d in group])
            for document, found in zip(group, ids, strict=True):
                if not isinstance(found, Fault) and found.size:
                    size = len(document.text.encode())
                    encoded.append(TokenDocument(found, document.id, size))
                    continue
                if isinstance(found, Fault) and on_error == "raise":
                    raise DataError(
                        f"{document.where}: {found}, or set on_error: skip to skip and count "
                        "such documents"
                    )
                skipped[found.reason if isinstance(found, Fault) else "no_tokens"] += 1
                encoded.append(None)
        return encoded

    return encode


def _one_by_one_if_need_be(
    encode: Callable[[list[str]], Sequence[Encoded]], texts: list[str]
) -> list[Encoded | Fault]:
    """Texts encoded together, or alone where one of them may not be encoded (it spells a control
    token out, under a unigram model), since the tokenizer does not say which."""
    try:
        return [*encode(texts)]
    except DataError as error:
        if len(texts) == 1:
            return [Fault("control_token", str(error))]
    return [found for text in texts for found in _one_by_one_if_need_be(encode, [text])]


def _together(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents in groups that keep all cores busy and still fit their caches; the tokenizer's
    own account of a token is some hundred bytes."""
    most = CHARACTERS_A_CORE * (os.cpu_count() or 1)
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if characters >= most:
            yield group
            group, characters = [], 0
    if group:
        yield group


def conversation_encoder(
    conversation: ConversationConfig, config: DataConfig, tokenizer: TokenizerWrapper
) -> Encoder:
    """Conversations as the tokenizer's chat template renders them, of which exactly the
    assistant's tokens, with the stop token of every answer, are learnt.

    ``skipped`` also counts ``shortened``: conversations longer than ``config.max_length`` that
    end after the last answer that fits.

    Raises:
        ConfigError: the tokenizer's template cannot be used; see `chat.learn_frame`.
    """
    frame = learn_frame(tokenizer, conversation.variables)
    keep = conversation.dropped_text == "keep"

    def render(document: Document) -> Rendered | Fault:
        try:
            rendered = render_conversation(tokenizer, frame, document.text)
        except Fault as fault:
            return fault
        if rendered.whole or keep:
            return rendered
        return Fault(
            "dropped_text",
            "the chat template leaves out a part of it (reasoning, tool calls, tools or a turn); "
            "take another template, or set text.conversation.dropped_text: keep",
        )

    def finish(
        document: Document, located: Located | Fault, rendered: Rendered, skipped: Counter[str]
    ) -> TokenDocument | Fault:
        if isinstance(located, Fault):
            return located
        mask, ends = answer_mask(located, rendered.answers_A2)
        length = mask.size
        if length > config.max_length:
            fitting = [end for end in ends if end <= config.max_length]
            if conversation.too_long == "drop" or not fitting:
                return Fault("too_long")
            length = fitting[-1]
            skipped["shortened"] += 1
        if not mask[1:length].any():  # the first token of a document is nobody's target
            return Fault("nothing_learnt", "no token of it would be learnt")
        size = len(document.text.encode())
        return TokenDocument(located.ids[:length], document.id, size, mask[:length])

    def encode(documents: Sequence[Document], skipped: Counter[str]) -> list[TokenDocument | None]:
        rendered = [render(document) for document in documents]
        texts = [each.text for each in rendered if isinstance(each, Rendered)]
        located = iter(_one_by_one_if_need_be(partial(encode_conversations, tokenizer), texts))
        encoded: list[TokenDocument | None] = []
        found: TokenDocument | Fault
        for document, each in zip(documents, rendered, strict=True):
            if isinstance(each, Rendered):
                found = finish(document, next(located), each, skipped)
            else:
                found = each
            if not isinstance(found, Fault):
                encoded.append(found)
                continue
            if found.reason != "too_long" and config.on_error == "raise":
                raise DataError(
                    f"{document.where}: {found}; or set on_error: skip to skip and count "
                    "such conversations"
                )
            skipped[found.reason] += 1
            encoded.append(None)
        return encoded

    return encode


def join(documents: Sequence[TokenDocument]) -> TokenShard:
    """Documents end to end; a mask only if one of them has one."""
    tokens = np.concatenate([d.tokens for d in documents])
    if all(d.loss_mask is None for d in documents):
        return TokenShard(tokens)
    masks = [np.ones(d.tokens.size, np.bool_) if d.loss_mask is None else d.loss_mask
             for d in documents]  # fmt: skip
    return TokenShard(tokens, np.concatenate(masks))
