"""CPU seconds of the torch loader over those of the JAX loader below it, for the same rows.

    python -m benchmarks.torch_loader

Text is tokenised on the way or read from a prepared store; no prefetching, so that one thread
does all the work.
"""

from __future__ import annotations

import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dh_jax.config import load_data_config
from dh_jax.data.loader import get_loader
from dh_jax.data.prepare import prepare
from dh_jax.data.tokenization import train_bpe
from dh_torch_bridge import data as bridge
from dh_torch_bridge.data import COLUMNS

ROUNDS, TOKENS = 15, 2048


def corpus(folder: Path) -> Path:
    """Source files of the standard library as documents, about 10 MB."""
    files = sorted(Path(inspect.__file__).parent.glob("*.py"))
    path = folder / "text.jsonl"
    texts = [x.read_text(errors="replace") for x in files]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def seconds(work: Callable[[], Any], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = corpus(folder)
        texts = [json.loads(line)["text"] for line in text.read_text().splitlines()[:40]]
        tokenizer = train_bpe(texts, 4096, folder / "bpe")
        tokenizer.save(folder / "tokenizer")
        base: dict[str, Any] = {
            "tokenizer": str(folder / "tokenizer"),
            "max_length": TOKENS,
            "sources": {"code": {"kind": "files", "paths": [str(text)]}},
        }
        streamed = load_data_config(base)
        stored = load_data_config(base | {"store": str(folder / "store")})
        prepare(stored)
        one = tuple(x for x in COLUMNS if x != "labels")
        none = tuple(x for x in one if x != "shift_labels")
        cases = {
            "streamed": (streamed, COLUMNS, 8, 20),
            "stored": (stored, COLUMNS, 8, 100),
            "stored, one of both labels": (stored, one, 8, 100),
            "stored, large": (stored, COLUMNS, 64, 50),
            "stored, large, one of both labels": (stored, one, 64, 50),
            "stored, large, no labels": (stored, none, 64, 50),
        }
        for label, (config, columns, rows, times) in cases.items():
            with (
                get_loader(config, batch_size=rows, prefetch=0) as below,
                bridge.get_loader(config, batch_size=rows, prefetch=0, columns=columns) as above,
            ):
                both: list[list[float]] = [[], []]
                for _ in range(ROUNDS):  # in turn, both over the same rows
                    for loader, found in zip((below, above), both, strict=True):
                        found.append(seconds(partial(next, loader), times))
            # Means, since tokenising comes once a window of documents.
            ms, more = (1e3 * statistics.mean(found[1:]) for found in both)
            print(
                f"{label}: {ms:.3f} ms a batch of {rows} x {TOKENS}, {more:.3f} by the bridge "
                f"({more / ms - 1:+.1%})"
            )


if __name__ == "__main__":
    main()
