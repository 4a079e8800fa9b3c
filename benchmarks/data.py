"""Packed batches from prepared tokens: ours against a bare gather and against other loaders.

``python -m benchmarks.data`` prints a table for documents of a few thousand tokens (files) and
of about eighty (paragraphs): million tokens a CPU-second over the process tree, and the ratio to
the limit, a shuffled NumPy gather over the same memory map that writes the same arrays.

LitData and MosaicML Streaming have dependencies of their own; they run if an environment with
both is at ``.bench/peers`` (python -m venv .bench/peers; pip install torch mosaicml-streaming
litdata). They read fixed blocks of tokens, without segments or positions: an easier job.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _corpus, _measure

B, T = 32, _corpus.ROW
PEERS = _corpus.FOLDER / "peers" / "bin" / "python"
LEAST = {"limit": 300e6, "ours": 300e6}  # tokens read; others take long enough with fewer
FEW = 30e6


def gather(kind: str, least: float) -> Callable[[], int]:
    """The limit: documents in shuffled order, end to end, cut every T tokens; pure NumPy."""
    documents = _corpus.documents(kind)
    tokens = documents.shards[0].tokens
    order = np.random.default_rng(0).permutation(documents.lengths_D.size)
    lengths = documents.lengths_D[order]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    places = documents.starts_D[order]

    def work() -> int:
        done = at = 0
        while done < least:
            if at + B * T > ends[-1]:
                at = 0
            first = np.searchsorted(ends, at, "right")
            last = np.searchsorted(starts, at + B * T, "left")
            begin = np.maximum(starts[first:last], at)
            size = np.minimum(ends[first:last], at + B * T) - begin
            before = np.repeat(begin - at, size)
            positions = np.arange(B * T) - before
            where = positions + np.repeat(places[first:last] + begin - starts[first:last], size)
            out = tokens[where].astype(np.int32)
            targets = np.zeros_like(out)
            targets[:-1] = out[1:]
            targets[(begin - at)[1:] - 1] = 0
            segments = np.repeat(np.arange(1, size.size + 1, dtype=np.int32), size)
            batch = out, targets, segments, positions.astype(np.int32)
            done += sum(x.size for x in batch) // 4
            at += B * T
        return done

    return work


def ours(kind: str, least: float, prefetch: int) -> Callable[[], int]:
    from dh_jax.data.loader import get_loader

    _corpus.documents(kind)
    loader = get_loader(_corpus.config(kind), batch_size=B, prefetch=prefetch)
    next(loader)  # compiled code is loaded

    def work() -> int:
        done = 0
        while done < least:
            done += next(loader).tokens_BT.size
        loader.close()
        return done

    return work


def grain_packing(kind: str, least: float, strategy: str) -> Callable[[], int]:
    """Grain's own packing over the same documents, shuffled; no threads, its fastest setting."""
    import grain

    documents = _corpus.documents(kind)
    tokens = documents.shards[0].tokens
    starts, lengths = documents.starts_D, documents.lengths_D

    def read(i: int) -> dict[str, Any]:
        return {"tokens": tokens[starts[i] : starts[i] + lengths[i]].astype(np.int32)}

    def pieces(i: int) -> dict[str, Any]:  # first-fit refuses what is longer than a row
        return {"tokens": read(i)["tokens"][:T]}

    source = grain.MapDataset.range(lengths.size).shuffle(seed=0).repeat()
    options = grain.ReadOptions(num_threads=0)
    if strategy == "concat":
        rows = grain.experimental.ConcatThenSplitIterDataset(
            source.map(read).to_iter_dataset(options), length_struct={"tokens": T}
        )
    else:
        rows = grain.experimental.FirstFitPackIterDataset(
            source.map(pieces).to_iter_dataset(options),
            length_struct={"tokens": T},
            num_packing_bins=64,
        )
    iterator = iter(rows.batch(B))
    next(iterator)

    def work() -> int:
        done = 0
        while done < least:
            next(iterator)
            done += B * T
        return done

    return work


def torch_blocks(kind: str, least: float, workers: int) -> Callable[[], int]:
    import torch
    from torch.utils.data import DataLoader, Dataset

    tokens = _corpus.documents(kind).shards[0].tokens

    class Blocks(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return tokens.size // T

        def __getitem__(self, i: int) -> torch.Tensor:
            return torch.from_numpy(tokens[i * T : (i + 1) * T].astype(np.int64))

    def work() -> int:
        torch.set_num_threads(1)
        done = 0
        while done < least:
            for batch in DataLoader(Blocks(), B, shuffle=True, num_workers=workers):
                done += batch.numel()
                if done >= least and not workers:  # workers end with their pass
                    break
        return done

    return work


def arrow_blocks(kind: str, least: float) -> Callable[[], int]:
    """Hugging Face Arrow: fixed blocks in a saved data set, read by shuffled index."""
    import datasets

    folder = _corpus.FOLDER / f"arrow-{kind}"
    if not folder.exists():
        tokens = _corpus.documents(kind).shards[0].tokens
        blocks = tokens[: tokens.size // T * T].reshape(-1, T).astype(np.int32)
        datasets.disable_progress_bars()
        features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"), length=T)})
        datasets.Dataset.from_dict({"tokens": list(blocks)}, features=features).save_to_disk(folder)
    data = datasets.load_from_disk(str(folder)).with_format("numpy")
    rng = np.random.default_rng(0)

    def work() -> int:
        done = 0
        while done < least:
            batch = data[np.sort(rng.integers(0, len(data), B))]["tokens"]
            done += batch.size
        return done

    return work


CONTENDERS: dict[str, Callable[[str, float], Callable[[], int]]] = {
    "limit": gather,
    "ours": lambda kind, n: ours(kind, n, 0),
    "ours, prefetching": lambda kind, n: ours(kind, n, 2),
    "Grain concat": lambda kind, n: grain_packing(kind, n, "concat"),
    "Grain first fit, 64 bins": lambda kind, n: grain_packing(kind, n, "first_fit"),
    "torch DataLoader, blocks": lambda kind, n: torch_blocks(kind, n, 0),
    "torch DataLoader, blocks, 2 workers": lambda kind, n: torch_blocks(kind, n, 2),
    "HF Arrow, blocks": arrow_blocks,
}
ELSEWHERE = {
    "LitData, blocks": "litdata",
    "LitData, blocks, 2 workers": "litdata2",
    "MosaicML Streaming, blocks": "mosaicml",
    "MosaicML Streaming, blocks, 2 workers": "mosaicml2",
}


def tokens_file(kind: str) -> Path:
    """The store's tokens as one plain file, for environments without this library."""
    path = _corpus.FOLDER / f"{kind}.npy"
    if not path.exists():
        np.save(path, _corpus.documents(kind).shards[0].tokens)
    return path


def measure(name: str, kind: str, repeats: int) -> dict[str, float]:
    script = Path(__file__)
    if name in ELSEWHERE:
        arguments = [ELSEWHERE[name], str(tokens_file(kind)), str(B), str(T)]
        run = script.with_name("_data_peers.py"), arguments, str(PEERS)
    else:
        run = script, ["--one", name, kind], sys.executable
    return _measure.median([_measure.in_a_process(*run) for _ in range(repeats)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "CORPUS"), help="used internally")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.one:
        name, kind = options.one
        work = CONTENDERS[name](kind, LEAST.get(name.split(",")[0], FEW))
        print(json.dumps(_measure.clock(work)))
        return
    names = [*CONTENDERS, *(ELSEWHERE if PEERS.exists() else ())]
    for kind in ("files", "paragraphs"):
        lengths = _corpus.documents(kind).lengths_D
        print(f"\n{kind}: {lengths.size:,} documents, {lengths.mean():,.0f} tokens on average\n")
        print("| | Mtok/CPU-s | of the limit | ours is faster by | peak MiB |")
        print("| --- | ---: | ---: | ---: | ---: |")
        rates: dict[str, float] = {}
        for name in names:
            result = measure(name, kind, options.repeats)
            rates[name] = rate = result["tokens"] / result["cpu"] / 1e6
            share = f"{rate / rates['limit']:.0%}"
            ratio = f"{rates['ours'] / rate:.1f}x" if "ours" in rates else ""
            print(f"| {name} | {rate:,.1f} | {share} | {ratio} | {result['peak_mib']:,.0f} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
