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
from dh_torch_bridge.data import COLUMNS, as_torch

ROUNDS, ROWS, TOKENS = 15, 8, 2048


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
        cases = {
            "streamed": (streamed, COLUMNS, 20),
            "stored": (stored, COLUMNS, 100),
            "stored, shift_labels": (stored, tuple(x for x in COLUMNS if x != "labels"), 100),
        }
        for label, (config, columns, times) in cases.items():
            below, above = [], []
            with get_loader(config, batch_size=ROWS, prefetch=0) as loader:
                batch = next(loader)
                for _ in range(ROUNDS):
                    below.append(seconds(lambda: next(loader), times))
                    above.append(seconds(partial(as_torch, batch, columns), times))
            # Means, since tokenising comes once a window of documents.
            ms, ours = 1e3 * statistics.mean(below), 1e3 * statistics.median(above)
            print(
                f"{label}: {ms:.3f} ms a batch of {ROWS} x {TOKENS}, the bridge {ours:.3f} ms "
                f"({ours / ms:.1%})"
            )


if __name__ == "__main__":
    main()
