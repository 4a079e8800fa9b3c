"""The data sets of the shipped hub configs in small: true layouts and columns, real text."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard


def docstrings() -> list[str]:
    """Real text: what the standard library says of itself."""
    import argparse
    import collections
    import logging
    import pathlib
    import statistics
    import textwrap

    texts = []
    for module in (argparse, collections, logging, pathlib, statistics, textwrap):
        for _, member in inspect.getmembers(module):
            text = inspect.getdoc(member) if callable(member) else None
            if text and len(text) > 60:
                texts.append(f"{getattr(member, '__name__', '')}: {text}")
    return list(dict.fromkeys(texts))


TEXTS = docstrings()


def parquet(path: Path, columns: dict[str, list[Any]], row_group_size: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def jsonl_zst(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(zstandard.compress(raw.encode()))


def card(path: Path, lines: list[str]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "README.md").write_text("\n".join(["---", *lines, "---", "", "# Card", ""]))


def configs_card(path: Path, files: dict[str, dict[str, str]], features: list[str]) -> None:
    """A card with ``configs`` (config -> split -> pattern) and one set of features for them."""
    lines = ["configs:"]
    for config, splits in files.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, pattern in splits.items():
            lines += [f"  - split: {split}", f"    path: {pattern}"]
    if features:
        lines += ["dataset_info:"]
        for config in files:
            lines += [f"- config_name: {config}", "  features:", *(f"  {f}" for f in features)]
    card(path, lines)


def build_hub(root: Path) -> dict[str, list[str]]:
    """Write every data set of the shipped configs; returns the texts of each training split."""
    texts = {}

    fineweb = root / "HuggingFaceFW" / "fineweb-edu"
    names = {"default": {"train": "data/*/*"}, "sample-10BT": {"train": "sample/10BT/*"}}
    configs_card(fineweb, names, [])
    for file, chosen in (
        ("data/CC-MAIN-2024-10/train-00000-of-00001.parquet", ["of the whole, not of the sample"]),
        ("sample/10BT/000_00000.parquet", TEXTS[:9]),
        ("sample/10BT/001_00000.parquet", TEXTS[9:20]),
        ("sample/10BT/002_00000.parquet", TEXTS[20:30]),
    ):
        n = len(chosen)
        columns: dict[str, list[Any]] = {"text": chosen, "id": [f"<{i}>" for i in range(n)]}
        columns |= {name: ["x"] * n for name in ("dump", "url", "file_path", "language")}
        columns |= {"language_score": [0.9] * n, "token_count": [9] * n, "score": [3.1] * n}
        parquet(fineweb / file, columns | {"int_score": [3] * n})
    texts["fineweb_edu"] = TEXTS[:30]

    finemath = root / "HuggingFaceTB" / "finemath"
    strings = ["url", "content_mime_type", "warc_filename", "metadata", "crawl", "snapshot_type"]
    kinds = {name: "string" for name in [*strings, "text", "language"]}
    kinds |= {"fetch_time": "int64", "int_score": "int64", "score": "float64"}
    kinds |= {name: "int32" for name in ("warc_record_offset", "warc_record_length")}
    kinds |= {"token_count": "int32", "char_count": "int32", "language_score": "float64"}
    features = [line for n, kind in kinds.items() for line in (f"- name: {n}", f"  dtype: {kind}")]
    subsets = ("finemath-3plus", "finemath-4plus")
    configs_card(finemath, {name: {"train": f"{name}/train-*"} for name in subsets}, features)
    for subset, chosen in zip(subsets, (TEXTS[30:40], ["of the other subset"]), strict=True):
        types = {"string": pa.string(), "int32": pa.int32(), "int64": pa.int64()}
        arrays = {
            name: pa.array(
                chosen if name == "text" else (["x"] if kind == "string" else [1]) * len(chosen),
                types.get(kind, pa.float64()),
            )
            for name, kind in kinds.items()
        }
        parquet(finemath / subset / "train-00000-of-00001.parquet", arrays)
    texts["finemath"] = TEXTS[30:40]

    code = root / "codeparrot" / "github-code"
    card(code, ["task_categories:", "- text-generation"])
    (code / "github-code.py").write_text("raise RuntimeError('a loading script')\n")
    for k, chosen in enumerate((TEXTS[40:46], TEXTS[46:52])):
        n = len(chosen)
        columns = {"repo_name": ["a/b"] * n, "path": ["x.py"] * n, "copies": ["1"] * n}
        columns |= {"size": [str(len(t)) for t in chosen], "content": chosen}
        parquet(code / f"data/train-0000{k}-of-00002.parquet", columns | {"license": ["mit"] * n})
    texts["github_code"] = TEXTS[40:52]

    dclm = root / "mlfoundations" / "dclm-baseline-1.0"
    card(dclm, ["license: cc-by-4.0", "dataset_info:", "  features:", *DCLM_FEATURES])
    for k, chosen in enumerate((TEXTS[52:60], TEXTS[60:66])):
        folder = dclm / f"global-shard_01_of_10/local-shard_{k}_of_10"
        jsonl_zst(folder / "shard_00000000_processed.jsonl.zst", [dclm_row(t) for t in chosen])
    texts["dclm"] = TEXTS[52:66]

    slim = root / "cerebras" / "SlimPajama-627B"
    card(slim, ["task_categories:", "- text-generation"])
    meta = {"redpajama_set_name": "RedPajamaC4"}
    for split, chosen in (("train", TEXTS[66:78]), ("validation", ["v"]), ("test", ["t"])):
        rows = [{"text": text, "meta": meta} for text in chosen]
        jsonl_zst(slim / split / "chunk1" / "example_holdout_0.jsonl.zst", rows)
    texts["slimpajama"] = TEXTS[66:78]

    glue = root / "nyu-mll" / "glue"
    features = ["- name: sentence", "  dtype: string", "- name: label", "  dtype:"]
    features += ["    class_label:", "      names:", "        '0': negative"]
    features += ["        '1': positive", "- name: idx", "  dtype: int32"]
    splits = ("train", "validation", "test")
    configs_card(glue, {"sst2": {s: f"sst2/{s}-*" for s in splits}}, features)
    for split in splits:
        labels = [-1] * 12 if split == "test" else [i % 2 for i in range(12)]
        index = pa.array(range(12), pa.int32())
        columns = {"sentence": TEXTS[80:92], "label": labels, "idx": index}
        parquet(glue / f"sst2/{split}-00000-of-00001.parquet", columns)
    words = ("negative", "positive")
    texts["sst2"] = [f"Review: {t}\nSentiment: {words[i % 2]}" for i, t in enumerate(TEXTS[80:92])]

    (root / "org" / "gated").mkdir(parents=True)
    (root / "org" / "gated" / ".gated").touch()
    return texts


def build_smoltalk(root: Path) -> list[list[dict[str, str]]]:
    """HuggingFaceTB/smoltalk; returns the messages of its configuration ``all``, in order."""
    smoltalk = root / "HuggingFaceTB" / "smoltalk"
    splits = ("train", "test")
    names = {name: {s: f"data/{name}/{s}-*" for s in splits} for name in ("all", "smol-rewrite")}
    features = ["- name: messages", "  list:", "  - name: content", "    dtype: string"]
    features += ["  - name: role", "    dtype: string", "- name: source", "  dtype: string"]
    configs_card(smoltalk, names, features)
    turns = [
        [
            {"content": t, "role": ("user", "assistant")[i % 2]}
            for i, t in enumerate(TEXTS[k : k + 4])
        ]
        for k in range(0, 40, 4)
    ]
    for chosen in turns[::3]:
        chosen.insert(0, {"content": "You are terse.", "role": "system"})
    for k, part in enumerate((turns[:6], turns[6:])):
        rows = {"messages": part, "source": ["smol-magpie-ultra"] * len(part)}
        parquet(smoltalk / f"data/all/train-0000{k}-of-00002.parquet", rows)
    other = {"messages": [turns[0][:2]], "source": ["x"]}
    parquet(smoltalk / "data/all/test-00000-of-00001.parquet", other)
    for split in splits:
        parquet(smoltalk / f"data/smol-rewrite/{split}-00000-of-00001.parquet", other)
    return turns


DCLM_FEATURES = """\
  - name: bff_contained_ngram_count_before_dedupe
    dtype: int64
  - name: language_id_whole_page_fasttext
    struct:
    - name: en
      dtype: float64
  - name: metadata
    struct:
    - name: Content-Length
      dtype: string
    - name: WARC-Date
      dtype: timestamp[s]
    - name: WARC-Truncated
      dtype: string
  - name: previous_word_count
    dtype: int64
  - name: text
    dtype: string
  - name: url
    dtype: string
  - name: warcinfo
    dtype: string
  - name: fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob
    dtype: float64""".splitlines()


def dclm_row(text: str) -> dict[str, Any]:
    return {
        "bff_contained_ngram_count_before_dedupe": 1,
        "language_id_whole_page_fasttext": {"en": 0.9},
        "metadata": {"Content-Length": "10", "WARC-Date": "2022-05-18T00:00:00Z"},
        "previous_word_count": len(text.split()),
        "text": text,
        "url": "https://example.org/",
        "warcinfo": "robots: classic",
        "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.1,
    }
