"""How full rows are: best fit, windows of at most 1,024 documents, no document that fits is cut.

``python -m benchmarks.packing``: the standard library's files and paragraphs (SmolLM2's
tokenizer), and the demo's corpora with its own (``make demo`` gathers them first).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from benchmarks import _corpus
from dh_jax.config import PackingConfig
from dh_jax.data.packing import PackedDataset, TokenShard, leaves
from dh_jax.data.store import StoredDocuments
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.data.windows import StoreWindows

DEMO = Path(".demo")
LENGTHS = (2048, 8192)
TOKENS = 20_000_000  # packed for each figure


def demo_documents(path: Path, tokenizer: TokenizerWrapper) -> StoredDocuments:
    """Lengths of a demo corpus's documents; its tokens are not needed."""
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    lengths = np.array([ids.size for ids in tokenizer.encode_batch(texts)], np.int64)
    shard = TokenShard(np.zeros(int(lengths.sum()) + 1, np.uint16))
    zeros, ids = np.zeros(lengths.size, np.int32), np.arange(lengths.size, dtype=np.uint64)
    return StoredDocuments((shard,), zeros, np.cumsum(lengths) - lengths, lengths, ids)


def fill(documents: StoredDocuments, row_length: int, packing: PackingConfig) -> float:
    """Share of the places of rows that hold a token, over a few passes."""
    size = packing.window - leaves(packing)
    windows = StoreWindows(documents, size, seed=0, shuffle=True, epochs=None)
    rows = PackedDataset(windows, row_length, packing)
    count = TOKENS // row_length
    return sum(row.tokens for row in itertools.islice(rows, count)) / (count * row_length)


def main() -> None:
    corpora = {kind: _corpus.documents(kind) for kind in ("files", "paragraphs")}
    if (DEMO / "tokenizer").exists():
        tokenizer = TokenizerWrapper.load(DEMO / "tokenizer", add_bos=False, add_eos=True)
        for path in sorted((DEMO / "corpora").glob("*.jsonl")):
            corpora[path.stem] = demo_documents(path, tokenizer)
    print("| corpus | tokens a document | " + " | ".join(f"T = {n:,}" for n in LENGTHS) + " |")
    print("| --- | ---: | ---: | ---: |")
    for name, documents in corpora.items():
        packing = PackingConfig()
        shares = [f"{fill(documents, n, packing):.2%}" for n in LENGTHS]
        mean = documents.lengths_D.mean()
        print(f"| {name} | {mean:,.0f} | " + " | ".join(shares) + " |")


if __name__ == "__main__":
    main()
