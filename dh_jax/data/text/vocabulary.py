"""What a vocabulary's ids stand for, in bytes of text: what makes bits per byte exact."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # byte fallback of sentencepiece vocabularies


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> NDArray[np.int32]:
    """Bytes of UTF-8 text that each id stands for; 0 for control tokens and unused ids.

    Exact for byte-level BPE, where every character of a token's spelling is one byte. For
    sentencepiece spellings it also counts the space that such models put before a document.

    Returns:
        Counts ``[V]``, read-only.
    """
    byte_level = is_byte_level(tokenizer)
    alphabet = frozenset(byte_characters())
    lengths_V = np.zeros(vocab_size, np.int32)
    for token, i in tokenizer.get_vocab(with_added_tokens=False).items():
        if byte_level and alphabet.issuperset(token):
            lengths_V[i] = len(token)
        elif _BYTE_TOKEN.fullmatch(token):
            lengths_V[i] = 1
        else:
            lengths_V[i] = len(token.replace("▁", " ").encode())
    for i, added in tokenizer.get_added_tokens_decoder().items():
        lengths_V[i] = 0 if added.special else len(added.content.encode())
    lengths_V.flags.writeable = False
    return lengths_V


def missing_bytes(tokenizer: Tokenizer) -> bytes:
    """Bytes that a byte-level vocabulary cannot express, so that encoding drops them."""
    if not is_byte_level(tokenizer):
        return b""
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    return bytes(b for b, character in enumerate(byte_characters()) if character not in vocab)


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether tokens are spelt in the byte alphabet of GPT-2."""
    state = json.loads(tokenizer.to_str())
    return '"type": "ByteLevel"' in json.dumps([state["pre_tokenizer"], state["decoder"]])


def byte_characters() -> list[str]:
    """The character that spells each of the 256 bytes in a byte-level vocabulary.

    Printable bytes of Latin-1 spell themselves; the others take U+0100 onwards, in order
    (Radford et al., 2019, GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


class RoundTrip(NamedTuple):
    """How many texts were encoded and decoded, and how many came back changed."""

    texts: int
    changed: int
    first: str | None  # the first changed one: which, where, and what became of it


def round_trip(texts: Sequence[str], decoded: Sequence[str]) -> RoundTrip:
    """Compare texts with what decoding made of their ids."""
    changed = [i for i, text in enumerate(texts) if text != decoded[i]]
    if not changed:
        return RoundTrip(len(texts), 0, None)
    text, result = texts[changed[0]], decoded[changed[0]]
    pairs = zip(text, result, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(result)))
    first = (
        f"text {changed[0]} differs from character {at} on: {text[at : at + 20]!r} came back "
        f"as {result[at : at + 20]!r}"
    )
    return RoundTrip(len(texts), len(changed), first)
