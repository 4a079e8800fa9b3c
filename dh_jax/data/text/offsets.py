"""Which characters of a text each token stands for.

`tokenizers` can track this while it encodes, at 14 % more time, and hands it over as Python
tuples. Where the vocabulary spells out exactly what a token stands for (every byte-level BPE,
and sentencepiece vocabularies that put no space of their own before a text), adding up the
tokens' lengths gives the same numbers; what does not add up is encoded again with tracking.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tokenizers import Tokenizer

from dh_jax.data.text.vocabulary import token_bytes

Ints = NDArray[np.int64]

# Parts of a tokenizer that make a text no longer: bytes that are missing anywhere then show in
# the sum. (NFC may lengthen a text, so only texts that it leaves alone are added up.)
_NEVER_LONGER = ("Sequence", "ByteLevel", "Split", "Digits", "NFC", "Replace", "BPE")

_SPELT_OTHERWISE = ("add_prefix_space", "continuing_subword_prefix", "end_of_word_suffix")


class Located(NamedTuple):
    """n tokens of a text and where they are in it; a character that several tokens share
    belongs to each of them."""

    ids: NDArray[Any]  # [n]
    starts_n: Ints  # first character
    ends_n: Ints  # one past the last


def locate(
    backend: Tokenizer, texts: list[str], spelt_bytes_V: Ints | None, dtype: DTypeLike
) -> list[Located]:
    """Encode texts, on all cores, and say where each token is.

    Args:
        backend: a tokenizer without a post-processor.
        texts: what to encode.
        spelt_bytes_V: what `spelt_bytes` says of it.
        dtype: of the ids.
    """
    if spelt_bytes_V is None:
        return _tracked(backend, texts, dtype)
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    found: list[Located | None] = []
    for text, encoding in zip(texts, encodings, strict=True):
        ids = np.array(encoding.ids, dtype)
        found.append(_added_up(text, ids, spelt_bytes_V))
    missing = [i for i, each in enumerate(found) if each is None]
    again = dict(zip(missing, _tracked(backend, [texts[i] for i in missing], dtype), strict=True))
    return [again[i] if each is None else each for i, each in enumerate(found)]


def _tracked(backend: Tokenizer, texts: list[str], dtype: DTypeLike) -> list[Located]:
    located = []
    for encoding in backend.encode_batch(texts, add_special_tokens=False) if texts else ():
        offsets_n2 = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        located.append(Located(np.array(encoding.ids, dtype), offsets_n2[:, 0], offsets_n2[:, 1]))
    return located


def _added_up(text: str, ids: NDArray[Any], spelt_bytes_V: Ints) -> Located | None:
    lengths = spelt_bytes_V[ids]
    ends = np.cumsum(lengths)
    if text.isascii():
        if ids.size and ends[-1] != len(text):
            return None
        return Located(ids, ends - lengths, ends)
    raw = np.frombuffer(text.encode(), np.uint8)
    if not ids.size or ends[-1] != raw.size or not unicodedata.is_normalized("NFC", text):
        return None
    # The character of each byte: continuation bytes are 10xxxxxx.
    characters = np.cumsum((raw & 0xC0) != 0x80)
    return Located(ids, characters[ends - lengths] - 1, characters[ends - 1])


def spelt_bytes(tokenizer: Tokenizer, vocab_size: int) -> Ints | None:
    """UTF-8 bytes that each id stands for, control tokens by their spelling.

    Returns:
        ``[V]``; None where a sum of them may fit a text by chance, so that tokens must be tracked.
    """
    state = json.loads(tokenizer.to_str())
    for part in _parts([state["normalizer"], state["pre_tokenizer"], state["model"]]):
        if part["type"] not in _NEVER_LONGER or any(part.get(key) for key in _SPELT_OTHERWISE):
            return None
        # Sentencepiece's spaces, which the vocabulary spells the same way, are the one exception.
        if part["type"] == "Replace" and (part["pattern"], part["content"]) != (
            {"String": " "}, "▁",
        ):  # fmt: skip
            return None
    lengths_V = token_bytes(tokenizer, vocab_size).astype(np.int64)
    for i, added in tokenizer.get_added_tokens_decoder().items():
        lengths_V[i] = len(added.content.encode())
    unknown = tokenizer.token_to_id(state["model"]["unk_token"] or "")
    if unknown is not None:
        lengths_V[unknown] = -(1 << 40)  # stands for anything: no sum with it fits a text
    lengths_V.flags.writeable = False
    return lengths_V


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every part of a tokenizer's description that says its type."""
    if isinstance(value, dict):
        if isinstance(value.get("type"), str):
            yield value
        for key, inside in value.items():
            if key not in ("vocab", "merges"):
                yield from _parts(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from _parts(inside)
