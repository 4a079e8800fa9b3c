"""Word n-grams as 64-bit hashes: what near-duplicates and contamination are judged by."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import xxhash

Hashes = npt.NDArray[np.uint64]

# Scripts that put no space between words: each of their characters is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplying by it loses nothing


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and white space."""
    return _WORD.findall(text.lower())


def hash_words(words: list[str]) -> Hashes:
    """[w] XXH3 hashes; the same on every machine, unlike Python's own."""
    digests = (xxhash.xxh3_64_intdigest(word.encode()) for word in words)
    return np.fromiter(digests, np.uint64, len(words))


def hash_ngrams(hashes: Hashes, n: int) -> Hashes:
    """[w - n + 1] polynomial hashes, modulo 2**64, of every ``n`` words in a row."""
    count = max(0, hashes.size - n + 1)
    grams = np.zeros(count, np.uint64)
    for i in range(n if count else 0):
        grams = grams * BASE + hashes[i : i + count]
    return grams
