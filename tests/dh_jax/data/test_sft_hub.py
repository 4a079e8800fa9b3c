"""The shipped config of conversations, against a hub on loopback with SmolTalk's layout."""

from __future__ import annotations

from pathlib import Path

from dh_jax.config import HubSource, load_data_config
from dh_jax.data.sources import document_id
from dh_jax.data.text.conversations import parse_conversation
from tests.dh_jax.data.reading.test_hub import driver
from tests.hub_datasets import build_smoltalk
from tests.hub_mirror import serve


def test_the_shipped_config_streams_conversations_and_resumes(tmp_path: Path) -> None:
    config = load_data_config("sft")
    source = config.sources["smoltalk"]
    assert isinstance(source, HubSource) and source.text.conversation is not None
    assert config.tokenizer.endswith("-Instruct")  # a base model's tokenizer has no template
    root, home = tmp_path / "hub", tmp_path / "home"
    home.mkdir()
    expected = build_smoltalk(root)
    with serve(root) as mirror, driver(mirror.endpoint, home) as ask:
        answer = ask({"config": "sft", "source": "smoltalk", "shuffle": False, "resume": True})
    assert "error" not in answer, answer
    documents = answer["documents"]
    assert [parse_conversation(text).messages for text, _, _ in documents] == expected
    assert [number for _, number, _ in documents] == [document_id(d[0]) for d in documents]
    assert answer["skipped"] == {}
    assert answer["rests"] == [documents[i:] for i in range(len(documents))]
