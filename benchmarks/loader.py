"""What the loader costs beyond copying tokens: mixing, state, restoring, starting, memory, scale.

``python -m benchmarks.loader`` (two minutes) prints one line a figure.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import numpy as np

from benchmarks import _corpus, _measure
from dh_jax.config import PackingConfig, load_data_config
from dh_jax.data.loader import get_loader
from dh_jax.data.mixing import MixedDataset
from dh_jax.data.packing import PackedDataset, TokenShard, Window, pack
from dh_jax.data.permutation import permuted
from dh_jax.data.prepare import pipeline_fingerprint
from dh_jax.data.store import StoredDocuments, manifest_checksum
from dh_jax.data.stores.shards import SCHEMA, write_shard
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.data.windows import StoreWindows

T = _corpus.ROW
BIG = _corpus.FOLDER / "big-store"
BIG_SHARDS, BIG_TOKENS = 80, 64 * 2**20  # 10 GiB of 16-bit tokens


def seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """CPU-seconds of one call; the best of some."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def rows_of(seed: int, documents: int = 2000) -> PackedDataset:
    """A source whose every document fills a row."""
    lengths = np.full(documents, T)
    stored = StoredDocuments(
        (TokenShard(np.zeros(documents * T, np.uint16)),),
        np.zeros(documents, np.int32),
        np.arange(documents) * T,
        lengths,
        np.arange(documents, dtype=np.uint64),
    )
    windows = StoreWindows(stored, 1024, seed=seed, shuffle=True, epochs=None)
    return PackedDataset(windows, T, PackingConfig())


def mixing(sources: int = 50, rows: int = 100_000) -> None:
    names = [f"s{i}" for i in range(sources)]
    weights = dict(zip(names, np.random.default_rng(0).dirichlet(np.ones(sources)), strict=True))
    ours = iter(MixedDataset({n: rows_of(i) for i, n in enumerate(names)}, weights, row_length=T))
    ours.draw(1000)
    batch = 32  # rows drawn together, as a loader does
    our_time = seconds(lambda: [len(ours.draw(batch)) for _ in range(rows // batch)], 3)
    our_time *= 1e6 / (rows // batch * batch)
    parts = [grain.MapDataset.range(10**7).to_iter_dataset() for _ in names]
    theirs = iter(grain.IterDataset.mix(parts, list(weights.values())))
    next(theirs)
    few = rows // 10
    their_time = seconds(lambda: [next(theirs) for _ in range(few)], 3) / few * 1e6
    print(f"mixing, {sources} sources: ours {our_time:.2f} µs a row (packed rows with windows "
          f"planned), Grain {their_time:.2f} µs an element")  # fmt: skip


def state_and_restore() -> None:
    _corpus.documents("files")
    loader = get_loader(_corpus.config("files"), batch_size=32, prefetch=0)
    next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    rows_an_epoch = _corpus.documents("files").lengths_D.sum() // T
    position = state["mixture"]["files"]["source"]
    position["window"] |= {"epoch": int(10**9 // rows_an_epoch), "window": 1}
    left = " ".join(["14"] * 60)  # as much as a window leaves: two windows are read again
    position |= {"following": True, "left": left, "row": 700}
    start = time.perf_counter()
    loader.set_state(state)
    next(loader)
    print(f"restore and first batch after a billion rows: {1e3 * (time.perf_counter() - start):.1f}"
          " ms")  # fmt: skip
    loader.close()
    spec = {"kind": "files", "paths": [str(_corpus.corpus_file("paragraphs"))]}
    spec["max_documents"] = 2000
    sources = {f"source_{i}": spec for i in range(100)}
    many = load_data_config(
        {"name": "many", "tokenizer": _corpus.TOKENIZER, "max_length": 256, "sources": sources}
    )
    with get_loader(many, batch_size=1000, prefetch=0) as hundred:
        for _ in range(35):  # every source is in its second window
            next(hundred)
        cost = seconds(hundred.get_state, 5)
        size = len(json.dumps(hundred.get_state()))
    print(f"state of 100 streamed sources: {size / 1024:.1f} KiB, taken in {1e3 * cost:.2f} ms")


def make_big_store(tokenizer: TokenizerWrapper, config: Any) -> None:
    """10 GiB: one shard of random tokens, linked under eighty names."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.9, 1.1, 80_000).astype(np.int64) + 1
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), BIG_TOKENS))]
    ids = rng.integers(0, 2**63, lengths.size, dtype=np.uint64)
    tokens = rng.integers(0, 49_152, int(lengths.sum()), dtype=np.uint16)
    first = BIG / "web" / "train-00000.safetensors"
    facts = write_shard(first, ids, lengths, lengths * 4, tokens)
    shards = []
    for i in range(BIG_SHARDS):
        path = BIG / "web" / f"train-{i:05d}.safetensors"
        if i:
            os.link(first, path)
        shards.append({"file": str(path.relative_to(BIG)), **facts})
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "tokenizer": tokenizer.fingerprint,
        "pipeline": pipeline_fingerprint(config, tokenizer),
        "sources": {"web": {"train": shards}},
        "skipped": {},
    }
    manifest["blake2b"] = manifest_checksum(manifest)
    (BIG / "manifest.json").write_text(json.dumps(manifest))


def big_config() -> Any:
    source = {"kind": "files", "paths": [str(_corpus.corpus_file("files"))]}
    return load_data_config(
        {"name": "big", "tokenizer": _corpus.TOKENIZER, "max_length": T, "store": str(BIG),
         "splits": {"probe": 0.0, "eval": 0.0}, "sources": {"web": source}}
    )  # fmt: skip


def anonymous_mib() -> float:
    """Memory of this process that is no file's, MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def big_store() -> None:
    """Printed as JSON by a process of its own, whose memory is measured."""
    config = big_config()
    tokenizer = TokenizerWrapper.load(config.tokenizer)
    if not (BIG / "manifest.json").exists():
        make_big_store(tokenizer, config)
    _ = tokenizer.fingerprint  # computed once a tokenizer
    before = anonymous_mib()
    start = time.perf_counter()
    loader = get_loader(config, tokenizer=tokenizer, batch_size=32, prefetch=2)
    next(loader)
    first = time.perf_counter() - start
    for _ in range(300):
        next(loader)
    grown = anonymous_mib() - before
    loader.close()
    print(json.dumps({"first": first, "grown": grown, "all": anonymous_mib()}))


def scale() -> None:
    """Ten billion documents, 4,096 hosts: what one host pays, and whether shards are disjoint."""
    count, hosts, window = 10**10, 4096, 1024
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.9, 1.1, window).astype(np.int64) + 1
    zeros = np.zeros(window, np.int32)
    stored = Window(None, zeros, np.cumsum(lengths) - lengths, lengths, zeros.astype(np.uint64), 0)  # type: ignore[arg-type]
    packing = PackingConfig()
    rows = len(pack(stored, T, packing, shuffle=True).tokens_R)
    planning = seconds(lambda: pack(stored, T, packing, shuffle=True), 20)
    ordering = seconds(lambda: permuted(5 * 10**9, 5 * 10**9 + window, count, 1), 20)
    some = np.unique(rng.integers(0, count // window, 3000))
    places = np.concatenate([permuted(k * window, (k + 1) * window, count, 1) for k in some])
    distinct = np.unique(places).size == places.size
    batch = 2 * hosts
    dealt = np.concatenate([np.arange(batch)[i * 2 : (i + 1) * 2] for i in range(hosts)])
    complete = np.array_equal(dealt, np.arange(batch))
    per_row = (planning + ordering) / rows * 1e6
    print(
        f"10^10 documents: a window of {window} is ordered in {ordering * 1e6:.0f} µs and planned "
        f"in {planning * 1e6:.0f} µs, {per_row:.2f} µs a row; the index would hold "
        f"{28 * count / 2**30:,.0f} GiB; documents of {some.size:,} windows distinct: {distinct}"
    )
    print(
        f"4,096 hosts: {batch:,} rows a step are drawn on every host, "
        f"{batch * (per_row + 3) / 1e3:.0f} ms; shares disjoint and complete: {complete}"
    )


def main() -> None:
    if sys.argv[1:] == ["--big"]:
        big_store()
        return
    mixing()
    state_and_restore()
    script = Path(__file__)
    _measure.in_a_process(script, ["--big"])  # writes the store
    result = _measure.in_a_process(script, ["--big"])
    print(
        f"10 GiB store: first batch {result['first']:.2f} s after imports; memory grows by "
        f"{result['grown']:.0f} MiB (not counting the page cache), {result['all']:.0f} MiB in all"
    )
    scale()


if __name__ == "__main__":
    main()
