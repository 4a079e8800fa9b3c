"""Passes that go on with another number of hosts, and pieces read one by one."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dh_jax.config import FilesSource
from dh_jax.data.elastic import reshard
from dh_jax.data.sources import DocumentSource, list_pieces
from dh_jax.errors import DataError, StateError
from tests.document_files import GOOD, TEXTS, THIRDS, lines, source, texts_of, write_every_format


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    write_every_format(root)
    pq.write_table(pa.table({"text": TEXTS}), root / "z.parquet", row_group_size=4)
    (root / "z.jsonl").write_bytes(lines(TEXTS))
    return root


def opened(dataset: DocumentSource, state: dict[str, Any] | None = None) -> Any:
    iterator: Any = iter(dataset)
    if state is not None:
        iterator.set_state(json.loads(json.dumps(state)))
    return iterator


def drain(iterator: Any) -> list[str]:
    try:
        return [document.text for document in iterator]
    except DataError as error:  # a shard may have got no piece with a document in it
        assert "has no" in str(error)
        return []


def take(iterator: Any, count: int) -> list[str]:
    return drain(itertools.islice(iterator, count))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["*", "a.jsonl", "z.jsonl", "z.parquet", "b.jsonl.gz", "[az].*"]),
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.integers(1, 5),
    st.integers(0, 9),
    st.data(),
)
def test_no_document_is_lost_or_seen_twice_over_any_changes_of_hosts(
    folder: Path, pattern: str, runs: list[int], interleave: int, seed: int, data: st.DataObject
) -> None:
    spec = FilesSource(paths=[f"{folder}/{pattern}"], interleave=interleave)

    def shard(i: int, count: int) -> DocumentSource:
        return DocumentSource("s", spec, split=None, splits=THIRDS, seed=seed, shard=(i, count))

    states: list[Any] = [None] * runs[0]
    seen: list[str] = []
    for count, following in itertools.zip_longest(runs, runs[1:]):
        hosts = [opened(shard(i, count), states[i]) for i in range(count)]
        for host in hosts:
            seen += take(host, data.draw(st.integers(0, 25))) if following else drain(host)
        if following:
            states = reshard([host.get_state() for host in hosts], following).states
    assert Counter(seen) == Counter(drain(opened(shard(0, 1))))


def test_totals_and_limits_carry_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes((GOOD + b"{\n") * 40)
    options: dict[str, Any] = {"on_error": "skip", "max_documents": 41}
    hosts = [opened(source(tmp_path, shard=(i, 3), **options)) for i in range(3)]
    for host in hosts:
        take(host, 3)
    states = reshard([host.get_state() for host in hosts[::-1]], 2).states
    hosts = [opened(source(tmp_path, shard=(i, 2), **options), states[i]) for i in range(2)]
    read = 9 + sum(len(drain(host)) for host in hosts)
    skipped = sum(host.skipped["corrupt_json"] for host in hosts)
    assert read + skipped == 41


def test_shards_share_max_documents(folder: Path) -> None:
    path = folder / "z.jsonl"
    whole = texts_of(source(path, max_documents=41))
    parts = [texts_of(source(path, max_documents=41, shard=(i, 4))) for i in range(4)]
    assert [len(part) for part in parts] == [11, 10, 10, 10]
    assert len(whole) == len(set(itertools.chain(*parts))) == 41


def test_hosts_in_the_next_pass_wait_for_the_others_and_say_what_comes_again(folder: Path) -> None:
    path = folder / "z.jsonl"
    ahead = opened(source(path, shard=(0, 2), epoch=1))
    first = drain(opened(source(path, shard=(0, 2))))
    take(ahead, 5)
    behind = opened(source(path, shard=(1, 2)))
    second = take(behind, 10)
    states, again = reshard([ahead.get_state(), behind.get_state()], 3)
    assert again == 5
    rest = [drain(opened(source(path, shard=(i, 3)), states[i])) for i in range(3)]
    assert Counter([*first, *second, *itertools.chain(*rest)]) == Counter(TEXTS)


def test_states_that_are_not_those_of_one_run_are_refused(folder: Path) -> None:
    def state(i: int, count: int, **options: Any) -> dict[str, Any]:
        return opened(source(folder, shard=(i, count), **options)).get_state()

    for states in (
        [],
        [state(0, 2)],
        [state(0, 2), state(0, 2)],
        [state(0, 2), state(1, 2, seed=5)],
        [state(0, 2), reshard([state(0, 1)], 2).states[1]],
    ):
        with pytest.raises(StateError):
            reshard(states, 2)
    with pytest.raises(StateError, match=r"shard '0 of 3'.*elastic\.reshard"):
        opened(source(folder, shard=(0, 2)), state(0, 3))


def test_states_of_a_hundred_sources_are_small(folder: Path) -> None:
    iterator = opened(source(folder, interleave=8))
    take(iterator, 40)
    assert 100 * len(json.dumps(iterator.get_state())) < 64 * 1024
    hosts = [opened(source(folder, shard=(i, 4), interleave=8)) for i in range(4)]
    for host in hosts:
        take(host, 9)
    state = reshard([host.get_state() for host in hosts], 2).states[0]
    assert 100 * len(json.dumps(state)) < 128 * 1024  # until the pass ends


def test_interleaved_pieces_come_in_turn_and_in_the_listing_s_order_without_shuffle(
    tmp_path: Path,
) -> None:
    for k in range(6):
        path = tmp_path / f"{k}.jsonl.gz"
        path.write_bytes(gzip.compress(lines(TEXTS[10 * k : 10 * k + 10])))
    where = [d.where.split("/")[-1][0] for d in source(tmp_path, interleave=3)]
    assert sorted(where[:3]) == sorted(where[3:6]) == sorted(set(where[:30]))
    assert len(set(where[:30])) == 3
    assert texts_of(source(tmp_path, interleave=3, shuffle=False)) == TEXTS


def test_pieces_read_one_by_one_are_the_whole_in_order(folder: Path) -> None:
    spec = FilesSource(paths=[str(folder)])
    options: dict[str, Any] = {"split": None, "splits": THIRDS, "shuffle": False}
    whole = list(DocumentSource("s", spec, **options))
    for count in (1, 40):
        pieces = list_pieces("s", spec, count)
        assert len({(p.file, p.part) for p in pieces}) == len(pieces) >= min(count, 31)
        one_by_one = [
            document.text
            for piece in map(type(pieces[0])._make, json.loads(json.dumps(pieces)))
            for document in DocumentSource("s", spec, pieces=[piece], **options)
        ]
        if count == 1:
            assert one_by_one == [d.text for d in whole]
        assert Counter(one_by_one) == Counter(d.text for d in whole)
