"""Encoding: documents of a source -> tokens, and which of them are learnt.

The one place where text meets the tokenizer; streaming and preparing both go through it, so
they cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dh_jax.config import DataConfig, SourceConfig
from dh_jax.data.packing import TokenShard
from dh_jax.data.sources import Document
from dh_jax.data.tokenization import TokenizerWrapper


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
    del spec, config  # plain text needs neither
    return text_encoder(tokenizer)


def text_encoder(tokenizer: TokenizerWrapper) -> Encoder:
    """Plain text: every token is learnt; BOS and EOS as the tokenizer's policy says."""

    def encode(documents: Sequence[Document], skipped: Counter[str]) -> list[TokenDocument | None]:
        del skipped
        encoded = tokenizer.encode_batch([document.text for document in documents])
        return [
            TokenDocument(tokens, document.id, len(document.text.encode()))
            for document, tokens in zip(documents, encoded, strict=True)
        ]

    return encode


def join(documents: Sequence[TokenDocument]) -> TokenShard:
    """Documents end to end; a mask only if one of them has one."""
    tokens = np.concatenate([d.tokens for d in documents])
    if all(d.loss_mask is None for d in documents):
        return TokenShard(tokens)
    masks = [np.ones(d.tokens.size, np.bool_) if d.loss_mask is None else d.loss_mask
             for d in documents]  # fmt: skip
    return TokenShard(tokens, np.concatenate(masks))
