"""Documents of a source: ids, splits, shards, exact resume."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dh_jax.config import SplitConfig, TextConfig
from dh_jax.data.sources import Document, DocumentSource, document_id, split_of
from dh_jax.errors import ConfigError, DataError, StateError
from tests.document_files import (
    BAD_LINES,
    GOOD,
    TEXTS,
    lines,
    source,
    texts_of,
    write_every_format,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_every_format(tmp_path)
    return tmp_path


# --- ids and splits --------------------------------------------------------------------------


def test_an_id_is_the_first_8_bytes_of_blake2b_in_utf8() -> None:
    # RFC 7693, appendix A: BLAKE2b-512("abc") = BA 80 A5 3F 98 1C 4D 0D ...
    assert document_id("abc") == 0x0D4D1C983FA580BA
    reference = hashlib.new("blake2b512", "naïve – 日本語".encode()).digest()  # OpenSSL's
    assert document_id("naïve – 日本語") == int.from_bytes(reference[:8], "little")


@given(st.integers(0, 2**64 - 1), st.floats(0, 0.49), st.floats(0, 0.49))
def test_every_document_has_exactly_one_split_and_its_place_decides(
    number: int, probe: float, held: float
) -> None:
    place = (number // 2**11) / 2**53
    expected = "probe" if place < probe else "eval" if place >= 1 - held else "train"
    assert split_of(number, SplitConfig(probe, held)) == expected
    assert split_of(number, SplitConfig(probe, held), "eval") == "eval"


def test_split_fractions_hold_on_real_ids() -> None:
    counts = Counter(split_of(document_id(f"{i}"), SplitConfig(0.1, 0.2)) for i in range(20_000))
    share = np.array([counts["probe"], counts["eval"], counts["train"]]) / 20_000
    np.testing.assert_allclose(share, [0.1, 0.2, 0.7], atol=0.012)  # 4 standard deviations


def test_changing_one_fraction_moves_no_document_of_the_other() -> None:
    ids = [document_id(f"{i}") for i in range(2000)]
    before = {i for i in ids if split_of(i, SplitConfig(0.1, 0.1)) == "eval"}
    assert before == {i for i in ids if split_of(i, SplitConfig(0.4, 0.1)) == "eval"}


def test_the_three_splits_are_disjoint_and_together_complete(folder: Path) -> None:
    parts = [texts_of(source(folder, split=s)) for s in ("train", "probe", "eval")]
    assert all(parts)
    assert sorted(chain.from_iterable(parts)) == sorted(TEXTS)


def test_a_copy_in_another_file_and_format_lands_in_the_same_split(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "b.parquet")
    for split in ("train", "probe", "eval"):
        first, second = (set(source(tmp_path / f, split=split)) for f in ("a.jsonl", "b.parquet"))
        assert {(d.text, d.id) for d in first} == {(d.text, d.id) for d in second}


def test_the_order_of_files_is_a_permutation_by_seed_and_epoch(folder: Path) -> None:
    orders = {
        (seed, epoch): tuple(texts_of(source(folder, seed=seed, epoch=epoch)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert all(sorted(order) == sorted(TEXTS) for order in orders.values())
    assert len(set(orders.values())) == 9
    assert orders[1, 2] == tuple(texts_of(source(folder, seed=1, epoch=2)))


def test_a_source_with_a_role_gives_all_of_it_to_that_split(folder: Path) -> None:
    assert sorted(texts_of(source(folder, split="probe", role="probe"))) == sorted(TEXTS)


def test_max_documents_ends_the_pass(folder: Path) -> None:
    assert texts_of(source(folder, shuffle=False, max_documents=13)) == TEXTS[:13]
    parts = [
        texts_of(source(folder, shuffle=False, max_documents=13, split=s))
        for s in ("train", "probe", "eval")
    ]
    assert sorted(chain.from_iterable(parts)) == sorted(TEXTS[:13])


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_every_pass_under_a_limit_has_the_same_documents(
    folder: Path, shard: tuple[int, int]
) -> None:
    """Passes of another seed have others, so it is not the limit that leaves no choice."""
    of = {
        (seed, epoch): frozenset(
            texts_of(source(folder, seed=seed, epoch=epoch, shard=shard, max_documents=13))
        )
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(of.values())) == len({of[seed, 0] for seed in range(4)}) > 1


def test_a_shard_without_a_share_of_the_limit_is_told_so(folder: Path) -> None:
    assert len(texts_of(source(folder, shard=(0, 3), max_documents=2))) == 1
    with pytest.raises(DataError, match=r"max_documents 2 leaves no record to shard 2 of 3; raise"):
        list(source(folder, shard=(2, 3), max_documents=2))


def test_a_pass_without_a_document_is_an_error_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:3]))
    tiny = SplitConfig(probe=1e-12, eval=0.0)
    with pytest.raises(DataError, match=r"no probe document among 3 records.*raise splits.probe"):
        list(source(tmp_path, split="probe", splits=tiny))
    with pytest.raises(ConfigError, match=r"splits\.eval is 0"):
        source(tmp_path, split="eval", splits=tiny)
    with pytest.raises(ConfigError, match="is all train"):
        source(tmp_path, split="probe", role="train")
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match=r"no usable document among 2 records \(skipped: .*paths"):
        list(source(tmp_path))


# --- shards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shards_are_disjoint_and_complete_even_with_fewer_files(folder: Path, count: int) -> None:
    for paths in ([folder], [folder / "d.parquet"], [folder / "b.jsonl.gz"], [folder / "a.jsonl"]):
        whole = texts_of(source(*paths, seed=4))
        shards = [texts_of(source(*paths, seed=4, shard=(i, count))) for i in range(count)]
        assert all(shards)
        assert sorted(chain.from_iterable(shards)) == sorted(whole)


def test_shards_count_their_own_skips_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes((GOOD + b"{\n") * 6)
    shards = [iter(source(tmp_path, shard=(i, 3), on_error="skip")) for i in range(3)]
    assert [len(list(shard)) for shard in shards] == [2, 2, 2]
    assert [shard.skipped for shard in shards] == [{"corrupt_json": 2}] * 3
    with pytest.raises(ConfigError, match="shard"):
        source(tmp_path, shard=(3, 3))


# --- resume ----------------------------------------------------------------------------------


def resume_everywhere(dataset: DocumentSource) -> list[Document]:
    """Every document, having checked that a resume before each of them changes nothing."""
    documents, states = [], []
    iterator: Any = iter(dataset)
    while True:
        states.append(json.loads(json.dumps(iterator.get_state())))
        document = next(iterator, None)
        if document is None:
            break
        documents.append(document)
    final = iterator.skipped
    for i, state in enumerate(states):
        again: Any = iter(dataset)
        again.set_state(state)
        assert again.get_state() == state
        assert list(again) == documents[i:]
        assert again.skipped == final
    return documents


@pytest.mark.parametrize("split", [None, "train", "probe"])
@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_resume_at_every_position_equals_no_resume(
    folder: Path, split: str | None, shard: tuple[int, int]
) -> None:
    (folder / "f.jsonl").write_bytes(GOOD + b"{\n" + GOOD + b"\n")
    (folder / "g.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS))[:-60])
    (folder / "h.parquet").write_bytes(b"PAR1")
    resume_everywhere(source(folder, split=split, shard=shard, seed=3, on_error="skip"))


def test_grain_finds_resume_exact(folder: Path) -> None:
    check = grain.experimental.assert_equal_output_after_checkpoint
    check(source(folder, split="train"))
    check(source(folder, shard=(1, 2), max_documents=20))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(
            st.one_of(
                st.text(alphabet="aé\u2028\x1c 日\r", max_size=6).map(
                    lambda t: json.dumps({"text": t}, ensure_ascii=False).encode()
                ),
                st.sampled_from([line.strip(b"\n") for line in BAD_LINES.values()]),
                st.just(b""),
            ),
            min_size=1,
            max_size=6,
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 9),
)
def test_resume_is_exact_and_nothing_is_lost_on_any_lines(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[bytes]], seed: int
) -> None:
    root = tmp_path_factory.mktemp("lines")
    kept = []
    for k, rows in enumerate(files):
        raw = b"\n".join(rows) + b"\n" * (k % 2)
        pack, ending = [(bytes, ""), (gzip.compress, ".gz"), (zstandard.compress, ".zst")][k % 3]
        (root / f"{k}.jsonl{ending}").write_bytes(pack(raw))
        for row in rows:
            if row.startswith(b'{"text": "') and row.endswith(b'"}') and b"\xff" not in row:
                kept.append(json.loads(row)["text"])
    kept = [text for text in kept if text.strip()]
    dataset = source(root, seed=seed, on_error="skip")
    if kept:
        assert sorted(d.text for d in resume_everywhere(dataset)) == sorted(kept)
    else:
        with pytest.raises(DataError, match="no usable document"):
            list(dataset)


def test_resume_does_not_open_earlier_files_again(folder: Path) -> None:
    dataset = source(folder, shuffle=False, include="*.jsonl*")
    iterator: Any = iter(dataset)
    for _ in range(13):  # into the second of the two files
        next(iterator)
    state = iterator.get_state()
    size = (folder / "a.jsonl").stat().st_size
    (folder / "a.jsonl").write_bytes(b"x" * size)  # would be a fault if it were read
    again: Any = iter(dataset)
    again.set_state(state)
    assert [d.text for d in again] == TEXTS[13:20]


def test_resume_of_plain_lines_seeks_and_of_parquet_skips_row_groups(folder: Path) -> None:
    for name, spoil in (("a.jsonl", b"Text 1: "), ("d.parquet", b"Text 31: ")):
        path = folder / name
        if name == "d.parquet":
            options = {"compression": "NONE", "use_dictionary": False, "write_page_checksum": True}
            pq.write_table(pa.table({"text": TEXTS[30:40]}), path, row_group_size=3, **options)
        dataset = source(path)
        iterator: Any = iter(dataset)
        expected = [d.text for d in dataset][7:]
        for _ in range(7):
            next(iterator)
        state = iterator.get_state()
        raw = path.read_bytes()
        path.write_bytes(raw.replace(spoil, b"\xff" * len(spoil), 1))
        with pytest.raises(DataError):  # read from the beginning, the damage shows
            list(dataset)
        again: Any = iter(dataset)
        again.set_state(state)
        assert [d.text for d in again] == expected


def test_a_state_of_another_source_order_or_file_list_is_refused(folder: Path) -> None:
    state = iter(source(folder)).get_state()
    for other, key in (
        (source(folder, seed=1), "seed"),
        (source(folder, epoch=1), "epoch"),
        (source(folder, split="train"), "split"),
        (source(folder, shard=(0, 2)), "shard"),
        (source(folder, shuffle=False), "shuffle"),
        (source(folder, text=TextConfig(column="id")), "spec"),
        (source(folder, include="*.json*"), "files"),
    ):
        with pytest.raises(StateError, match=f"saved state has {key} "):
            iter(other).set_state(state)
    with (folder / "a.jsonl").open("ab") as file:
        file.write(GOOD)
    with pytest.raises(StateError, match="saved state has files "):
        iter(source(folder)).set_state(state)


def test_a_state_goes_on_with_faults_skipped_and_in_a_moved_folder(folder: Path) -> None:
    path = folder / "a.jsonl"
    path.write_bytes(GOOD + b"{\n" + lines(["after"]))
    documents: Any = iter(source(path))
    next(documents)
    state = documents.get_state()
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        next(documents)
    moved = folder / "elsewhere"
    moved.mkdir()
    path.rename(moved / "a.jsonl")
    assert str(folder) not in json.dumps(state)
    lenient: Any = iter(source(moved / "a.jsonl", on_error="skip"))
    lenient.set_state(state)
    assert [d.text for d in lenient] == ["after"]
    assert lenient.skipped == {"corrupt_json": 1}


def test_closing_releases_the_file(folder: Path) -> None:
    documents: Any = iter(source(folder / "a.jsonl"))
    next(documents)
    documents.close()
    with pytest.raises(ValueError, match="closed"):
        next(documents)


def test_sources_import_with_jax_blocked_and_without_datasets_or_torch() -> None:
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "import dh_jax.data.sources\n"
        "assert 'datasets' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
