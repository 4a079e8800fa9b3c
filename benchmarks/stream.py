"""Streaming text into packed batches: ours against the bare tokenizer and Hugging Face streaming.

``python -m benchmarks.stream`` prints million tokens a CPU-second over the process tree (imports,
and tokenizer excluded) for one pass over Python's standard library in JSONL, with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for everybody

import numpy as np

from benchmarks import _corpus, _measure
from dh_jax.data.loader import get_loader
from dh_jax.data.tokenization import TokenizerWrapper


def bare(kind: str) -> Callable[[], int]:
    """The limit: `encode_batch_fast` over the same text, already in memory."""
    backend = TokenizerWrapper.load(_corpus.TOKENIZER)._backend
    lines = _corpus.corpus_file(kind).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    together = 16 if kind == "files" else 512

    def work() -> int:
        done = 0
        for i in range(0, len(texts), together):
            encoded = backend.encode_batch_fast(texts[i : i + together], add_special_tokens=False)
            done += sum(len(each.ids) for each in encoded)
        return done

    return work


def ours(kind: str) -> Callable[[], int]:
    config = _corpus.config(kind, store=None)
    loader = get_loader(config, batch_size=32, prefetch=0, shuffle=False, repeat=False)

    def work() -> int:
        done = sum(int(loader.origins.lengths_BS.sum()) for _ in loader)
        loader.close()
        return done

    return work


def hugging_face(kind: str) -> Callable[[], int]:
    """A streamed data set, tokenised by `map` in batches, and grouped into rows end to end."""
    import datasets
    import transformers

    wrapper = TokenizerWrapper.load(_corpus.TOKENIZER)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=wrapper._backend)
    path = str(_corpus.corpus_file(kind))
    rows = datasets.load_dataset("json", data_files=path, split="train", streaming=True)

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = np.concatenate([np.asarray(ids, np.int32) for ids in batch["ids"]])
        whole = joined[: joined.size // _corpus.ROW * _corpus.ROW]
        return {"ids": whole.reshape(-1, _corpus.ROW).tolist()}

    rows = rows.map(tokenise, batched=True, remove_columns=["text"]).map(group, batched=True)

    def work() -> int:
        return sum(len(row["ids"]) for row in rows)

    return work


CONTENDERS = {
    "bare encode_batch_fast": bare,
    "ours, streaming": ours,
    "HF streaming, map and group": hugging_face,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "CORPUS"), help="used internally")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_measure.clock(CONTENDERS[options.one[0]](options.one[1]))))
        return
    for kind in ("files", "paragraphs"):
        print(
            f"\n{kind}\n\n| | Mtok/CPU-s | of the limit | peak MiB |\n| --- | ---: | ---: | ---: |"
        )
        limit = 0.0
        for name in CONTENDERS:
            script = Path(__file__), ["--one", name, kind], sys.executable
            runs = [_measure.in_a_process(*script) for _ in range(options.repeats)]
            result = _measure.median(runs)
            rate = result["tokens"] / result["cpu"] / 1e6
            limit = limit or rate
            print(f"| {name} | {rate:.2f} | {rate / limit:.0%} | {result['peak_mib']:,.0f} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
