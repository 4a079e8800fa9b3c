"""Shuffle quality from an object store: how many shards a batch draws from.

A bucket (moto's S3 on loopback) holds JSONL shards; a `DocumentSource` reads it with several
pieces in turn, and every batch of B documents is compared with B documents drawn at random from
all. Shards and blocks are scaled down alike (400 KB in blocks of 4 KiB, for 400 MB in blocks of
4 MiB). In memory are a block of every open piece and the packing window.
Run: ``python -m benchmarks.shuffle``.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from typing import Any

import fsspec
import numpy as np
from moto.server import ThreadedMotoServer

from dh_jax.config import FilesSource, SplitConfig
from dh_jax.data.reading import storage
from dh_jax.data.sources import DocumentSource

SHARDS, DOCUMENTS, BYTES = 512, 400, 1000
BLOCK = 4096
BATCH, WINDOW, BATCHES = 256, 1024, 20


def ideal(shards: int, batch: int) -> float:
    """Expected distinct shards among ``batch`` independent draws from all documents."""
    return shards * (1 - (1 - 1 / shards) ** batch)


def expected(interleave: int, batch: int, window: int) -> float:
    """Expected distinct shards in a batch drawn from a shuffled window, `interleave` in turn."""
    return interleave * (1 - (1 - batch / window) ** (window / interleave))


def fill_bucket(fs: Any) -> int:
    """Write the shards, whose documents begin with their shard's number; returns their bytes."""
    fs.mkdir("corpus")
    total = 0
    for k in range(SHARDS):
        lines = [json.dumps({"text": f"{k} {i} " + "x" * BYTES}) for i in range(DOCUMENTS)]
        raw = "".join(f"{line}\n" for line in lines).encode()
        fs.pipe(f"corpus/{k:04}.jsonl", raw)
        total += len(raw)
    return total


def measure(options: dict[str, Any], interleave: int) -> tuple[float, float, float]:
    """Distinct shards a batch in reading order, and after a window's shuffle; seconds."""
    spec = FilesSource(
        paths=["s3://corpus/*.jsonl"], storage_options=options, interleave=interleave
    )
    source = DocumentSource("bucket", spec, split=None, splits=SplitConfig())
    began = time.perf_counter()
    documents = itertools.islice(source, BATCH * BATCHES)
    shards_N = np.array([int(d.text.split(" ", 1)[0]) for d in documents])
    seconds = time.perf_counter() - began
    rng = np.random.default_rng(1)
    shuffled_N = np.concatenate(
        [rng.permutation(shards_N[i : i + WINDOW]) for i in range(0, shards_N.size, WINDOW)]
    )
    in_turn, in_window = (
        float(np.mean([np.unique(batch).size for batch in order.reshape(-1, BATCH)]))
        for order in (shards_N, shuffled_N)
    )
    return in_turn, in_window, seconds


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    storage.REMOTE_BLOCK = storage.REMOTE_LEAST = BLOCK
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
    total = fill_bucket(fsspec.filesystem("s3", **options))
    best = ideal(SHARDS, BATCH)
    print(f"{SHARDS} shards, {total / 2**20:.0f} MiB; batch {BATCH}, window {WINDOW}; "
          f"ideal {best:.1f} shards a batch")  # fmt: skip
    print("| interleave | data in memory | in reading order | in a shuffled window | predicted |")
    print("|---:|---:|---:|---:|---:|")
    for interleave in (1, 8, 64, 192, 320):
        in_turn, in_window, seconds = measure(options, interleave)
        resident = (interleave * BLOCK + WINDOW * BYTES) / total
        print(f"| {interleave} | {resident:.2%} | {in_turn / best:.1%} | "
              f"{in_window / best:.1%} | {expected(interleave, BATCH, WINDOW) / best:.1%} |"
              f" <!-- {seconds:.1f} s -->")  # fmt: skip
    server.stop()


if __name__ == "__main__":
    main()
