"""Near-duplicates: signatures against true Jaccard similarity, clusters against brute force."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import numpy as np
import pytest

from dh_jax.config import NearDuplicateConfig
from dh_jax.data.preparing.near_duplicates import bands_of, clusters, signatures
from tests.dh_jax.data.tokenizer_cases import STDLIB

pytest.importorskip("rensa")

CONFIG = NearDuplicateConfig(action="drop", permutations=256)


def jaccard(a: str, b: str, n: int) -> float:
    sets = []
    for text in (a, b):
        words = re.findall(r"\w+", text.lower())
        sets.append({tuple(words[i : i + n]) for i in range(len(words) - n + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(text: str, share: float, rng: random.Random) -> str:
    """The text with some of its lines replaced."""
    lines = text.split("\n")
    return "\n".join(f"line {rng.random()}" if rng.random() < share else each for each in lines)


@pytest.fixture(scope="module")
def families() -> list[list[str]]:
    """Twelve real modules, each with some variants, near and far."""
    rng = random.Random(3)
    names = ("ast", "bdb", "cmd", "dis", "enum", "glob", "hmac", "imp", "pdb", "queue", "stat")
    found: Iterator[str] = ((STDLIB / f"{name}.py").read_text() for name in (*names, "tabnanny"))
    return [[text, *(edited(text, share, rng) for share in (0.005, 0.02, 0.3))] for text in found]


def test_signatures_estimate_the_jaccard_similarity(families: list[list[str]]) -> None:
    texts = [text for family in families for text in family]
    marks = signatures(texts, CONFIG)
    for i in range(0, len(texts), 3):
        for j in range(i + 1, len(texts), 5):
            true = jaccard(texts[i], texts[j], CONFIG.ngram)
            # five standard deviations of a mean of 256 coin tosses, and a place to round
            tolerance = 5 * np.sqrt(true * (1 - true) / 256) + 1 / 256
            assert abs((marks[i] == marks[j]).mean() - true) <= tolerance


def test_signatures_do_not_depend_on_the_company(families: list[list[str]]) -> None:
    texts = [family[0] for family in families]
    together = signatures(texts, CONFIG)
    apart = np.concatenate([signatures([text], CONFIG) for text in texts])
    np.testing.assert_array_equal(together, apart)
    assert signatures([], CONFIG).shape == (0, 256)


def test_texts_without_words_are_alike_only_if_equal() -> None:
    marks = signatures(["!!!", "???", "!!!", "one", "one"], CONFIG)
    same = (marks[:, None] == marks[None]).all(-1)
    assert same.tolist() == np.equal.outer(*[np.array([0, 1, 0, 2, 2])] * 2).tolist()


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_clusters_are_the_components_of_similar_pairs(
    families: list[list[str]], threshold: float
) -> None:
    config = NearDuplicateConfig(action="drop", permutations=256, threshold=threshold)
    texts = [text for family in families for text in family]
    marks = signatures(texts, config)
    similar = (marks[:, None] == marks[None]).mean(-1) >= threshold
    reach = np.linalg.matrix_power(similar.astype(float), len(texts)) > 0  # by any path
    found = clusters([marks[:7], marks[7:7], marks[7:]], np.ones(len(texts), np.bool_), config)
    np.testing.assert_array_equal(np.equal.outer(found, found), reach)
    assert reach.sum() > len(texts)


def test_clusters_do_not_depend_on_the_order(families: list[list[str]]) -> None:
    texts = [text for family in families for text in family]
    marks = signatures(texts, CONFIG)
    keep = np.ones(len(texts), np.bool_)
    order = np.random.default_rng(0).permutation(len(texts))
    straight, shuffled = clusters([marks], keep, CONFIG), clusters([marks[order]], keep, CONFIG)
    np.testing.assert_array_equal(
        np.equal.outer(straight, straight)[np.ix_(order, order)],
        np.equal.outer(shuffled, shuffled),
    )


def test_documents_left_out_join_nothing(families: list[list[str]]) -> None:
    marks = signatures(families[0][:2] * 2, CONFIG)
    found = clusters([marks], np.array([True, False, True, False]), CONFIG)
    assert found[0] == found[2] and len({*found.tolist()}) == 3


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_find_nineteen_of_twenty_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = bands_of(NearDuplicateConfig(threshold=threshold))
    assert bands * rows <= 128
    draws = np.random.default_rng(1).random((2000, bands, rows)) < threshold
    assert draws.all(-1).any(-1).mean() > 0.94
