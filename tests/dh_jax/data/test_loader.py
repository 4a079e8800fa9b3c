"""The loader as a user meets it, streaming and from a store: nothing lost, exact resume."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dh_jax.data.loader import Loader, get_loader
from dh_jax.data.prepare import prepare
from dh_jax.data.sources import document_id
from dh_jax.data.store import open_store
from dh_jax.errors import ConfigError, DataError, StateError

KINDS = pytest.mark.parametrize("stored", [False, True], ids=["stream", "store"])


@pytest.fixture
def open_loader(make_config: Any, store: Path) -> Any:
    def open_one(stored: bool, *, changes: dict[str, Any] | None = None, **options: Any) -> Loader:
        config = make_config(store=str(store) if stored else None, **(changes or {}))
        return get_loader(config, **({"batch_size": 4, "prefetch": 2} | options))

    return open_one


def pieces(loader: Loader) -> list[tuple[int, int, int]]:
    """(document, offset, length) of every segment of the last batch."""
    origins = loader.origins
    return [
        (
            int(origins.document_ids_BS[b, s]),
            int(origins.offsets_BS[b, s]),
            int(origins.lengths_BS[b, s]),
        )
        for b, s in zip(*np.nonzero(origins.lengths_BS), strict=True)
    ]


@KINDS
def test_one_pass_delivers_every_token_of_every_document_of_the_split(
    open_loader: Any, stored: bool, corpora: dict[str, Path], tokenizer: Any
) -> None:
    expected = {}
    for path in corpora.values():
        for line in path.read_text().splitlines():
            text = json.loads(line)["text"]
            expected[document_id(text)] = tokenizer.encode(text)
    for split in ("train", "probe", "eval"):
        found: dict[int, dict[int, np.ndarray]] = {}
        with open_loader(stored, split=split, repeat=False) as loader:
            for batch in loader:
                for b, s in zip(*np.nonzero(loader.origins.lengths_BS), strict=True):
                    tokens = batch.tokens_BT[b][batch.segment_ids_BT[b] == s + 1]
                    identity = int(loader.origins.document_ids_BS[b, s])
                    found.setdefault(identity, {})[int(loader.origins.offsets_BS[b, s])] = tokens
        for identity, parts in found.items():
            whole = np.concatenate([parts[offset] for offset in sorted(parts)])
            np.testing.assert_array_equal(whole, expected.pop(identity))
    assert not expected  # the three splits are disjoint and complete


@KINDS
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 30), st.integers(0, 3))
def test_resume_after_any_batch_equals_no_resume(
    open_loader: Any, stored: bool, taken: int, prefetch: int
) -> None:
    with open_loader(stored, prefetch=prefetch) as loader, open_loader(stored) as other:
        for _ in range(taken):
            next(loader)
        other.set_state(json.loads(json.dumps(loader.get_state())))
        for _ in range(8):
            for ours, theirs in zip(next(loader)[:6], next(other)[:6], strict=True):
                np.testing.assert_array_equal(ours, theirs)
        assert loader.stats() == other.stats()


@KINDS
def test_a_weight_change_holds_from_the_first_batch_not_delivered_and_loses_nothing(
    open_loader: Any, stored: bool
) -> None:
    """Whatever the weights do, each source's own rows come in its own order, without gaps."""
    changes = {5: {"code": 0, "mail": 1, "sums": 0}, 9: {"code": 1, "mail": 0, "sums": 1}}
    seen: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    with open_loader(stored, prefetch=3) as loader:
        for step in range(14):
            if step in changes:
                loader.set_weights(changes[step])
                assert loader.weights["code"] == changes[step]["code"] / sum(changes[step].values())
            batch = next(loader)
            for b, source in enumerate(batch.source_ids_B.tolist()):
                seen[source].append(batch.tokens_BT[b].tolist())
            if 5 <= step < 9:
                assert set(batch.source_ids_B.tolist()) == {1}
            if step >= 9:
                assert 1 not in batch.source_ids_B
    for m, name in enumerate(loader.names):
        with open_loader(stored, sources=[name], batch_size=1) as alone:
            own = [next(alone).tokens_BT[0].tolist() for _ in seen[m]]
        assert own == seen[m]


@KINDS
def test_prefetching_changes_nothing(open_loader: Any, stored: bool) -> None:
    def tokens(prefetch: int) -> list[Any]:
        with open_loader(stored, prefetch=prefetch) as loader:
            return [next(loader).tokens_BT.tolist() for _ in range(10)]

    assert tokens(0) == tokens(1) == tokens(4)


@KINDS
def test_token_shares_follow_the_weights(open_loader: Any, stored: bool) -> None:
    with open_loader(stored) as loader:
        for _ in range(40):
            next(loader)
            for source in loader.stats()["sources"].values():
                total = loader.stats()["tokens"]
                assert abs(source["tokens"] - source["weight"] * total) < loader.row_length


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_of_a_store_share_out_the_one_global_batch(open_loader: Any, hosts: int) -> None:
    with open_loader(True) as whole:
        parts = [open_loader(True, shard=(i, hosts)) for i in range(hosts)]
        for _ in range(6):
            rows = np.concatenate([next(part).tokens_BT for part in parts])
            np.testing.assert_array_equal(rows, next(whole).tokens_BT)
        state = parts[0].get_state()
        assert all(part.get_state()["mixture"] == state["mixture"] for part in parts)
        for part in parts:
            part.close()


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (1, 4), (4, 1)])
def test_a_run_of_some_hosts_goes_on_with_another_number(
    open_loader: Any, before: int, after: int
) -> None:
    """The rows of an uninterrupted run, whatever the number of hosts and the prefetching."""
    with open_loader(True) as whole:
        expected = [next(whole).tokens_BT for _ in range(12)]
    parts = [open_loader(True, shard=(i, before), prefetch=i) for i in range(before)]
    rows = [np.concatenate([next(part).tokens_BT for part in parts]) for _ in range(5)]
    states = [json.loads(json.dumps(part.get_state())) for part in parts]
    others = [open_loader(True, shard=(i, after), prefetch=2) for i in range(after)]
    for i, other in enumerate(others):
        other.set_state(states[i % before])
    rows += [np.concatenate([next(other).tokens_BT for other in others]) for _ in range(7)]
    np.testing.assert_array_equal(rows, expected)
    for loader in parts + others:
        loader.close()


def test_sources_may_be_added_and_removed_between_runs(open_loader: Any) -> None:
    """What stays goes on where it stood; what is new begins at its beginning."""
    with open_loader(True, sources=["code", "mail"]) as first:
        for _ in range(6):
            next(first)
        state = first.get_state()
    with open_loader(True, sources=["mail", "sums"]) as second:
        with pytest.raises(StateError, match="changed_sources=True"):
            second.set_state(state)
        weights = second.weights
        second.set_state(state, changed_sources=True)
        assert second.weights == weights
        ours: dict[int, list[Any]] = {0: [], 1: []}
        for _ in range(8):
            batch = next(second)
            for b, source in enumerate(batch.source_ids_B.tolist()):
                ours[source].append(batch.tokens_BT[b].tolist())
    skip = {"mail": state["mixture"]["mail"]["rows"], "sums": 0}
    for m, name in enumerate(("mail", "sums")):
        with open_loader(True, sources=[name], batch_size=1) as alone:
            rows = [next(alone).tokens_BT[0].tolist() for _ in range(skip[name] + len(ours[m]))]
        assert ours[m] == rows[skip[name] :]


@KINDS
@pytest.mark.parametrize("exhausted", ["renormalise", "stop"])
def test_a_source_ends_after_its_epochs(
    open_loader: Any, make_config: Any, stored: bool, exhausted: str
) -> None:
    sources = {
        name: {"kind": "files", "paths": spec.paths, "weight": spec.weight}
        for name, spec in make_config().sources.items()
    }
    sources["mail"]["max_epochs"] = 1
    changes = {"sources": sources, "exhausted": exhausted}
    weights = {"code": 0.1, "mail": 0.8, "sums": 0.1}
    with open_loader(stored, changes=changes, weights=weights, batch_size=256) as loader:
        for _ in range(40):
            if next(loader, None) is None or not loader.weights["mail"]:
                break
        assert loader.weights["mail"] == 0
        rows = loader.stats()["sources"]["mail"]["rows"]
        more = next(loader, None)
    with open_loader(stored, sources=["mail"], repeat=False, batch_size=1) as alone:
        assert rows == sum(1 for _ in alone)
    if exhausted == "stop":
        assert more is None
    else:
        assert more is not None and set(more.source_ids_B.tolist()) == {0, 2}


def test_hosts_of_a_stream_see_disjoint_documents(open_loader: Any) -> None:
    seen = []
    for index in range(2):
        with open_loader(False, shard=(index, 2), repeat=False) as loader:
            seen.append({piece for _ in loader for piece in pieces(loader)})
    with open_loader(False, repeat=False) as loader:
        whole = Counter(document for _ in loader for document, _, _ in pieces(loader))
    documents = [{document for document, _, _ in part} for part in seen]
    assert documents[0] | documents[1] == set(whole)
    duplicated = {d for d in whole if whole[d] > 1}  # equal texts have equal ids
    assert not (documents[0] & documents[1]) - duplicated


def test_the_last_batch_of_a_pass_is_padded_to_the_same_shape(open_loader: Any) -> None:
    with open_loader(True, split="eval", repeat=False, batch_size=7) as loader:
        batches = list(loader)
    assert {batch.tokens_BT.shape for batch in batches} == {(7, 64)}
    assert batches[-1].source_ids_B[-1] == -1 and not batches[-1].loss_mask_BT[-1].any()


def test_probes_may_be_named_and_are_disjoint_from_training(make_config: Any, store: Path) -> None:
    config = make_config(store=str(store), probes={"mathematics": "sums"})
    with get_loader(config, batch_size=2, split="probe") as probe:
        assert probe.names == ("mathematics",)
        held_out = {d for _ in probe for d, _, _ in pieces(probe)}
    with get_loader(config, batch_size=2, sources=["sums"], repeat=False) as train:
        assert held_out and not held_out & {d for _ in train for d, _, _ in pieces(train)}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_failed_batch_is_not_lost(make_config: Any, tmp_path: Path, prefetch: int) -> None:
    """A corrupt line stops the loader where it stands, amid a window. Once it is mended, that very
    loader goes on from there, and so does another one with its state."""
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(40)]
    corrupt = good[20].replace('"', " ")  # of the same size
    path.write_text("".join([*good[:20], corrupt, *good[21:]]))
    sources = {"a": {"kind": "files", "paths": [str(path)]}}
    config = make_config(sources=sources, packing={"window": 8}, splits={"probe": 0.0, "eval": 0.0})

    def open_one() -> Loader:
        return get_loader(config, batch_size=2, shuffle=False, repeat=False, prefetch=prefetch)

    def rest(loader: Loader) -> list[Any]:
        return [p for _ in loader for p in pieces(loader)]

    with open_one() as loader, open_one() as other:
        taken: list[Any] = []
        for _ in range(2):  # the second time nothing was mended yet
            with pytest.raises(DataError, match=r"a\.jsonl:21"):
                for _ in loader:
                    taken += pieces(loader)
        assert taken and loader.get_state()["batches"] > 0
        path.write_text("".join(good))
        other.set_state(loader.get_state())
        with open_one() as whole:
            everything = rest(whole)
        assert {document for document, _, _ in everything} == {
            document_id(json.loads(line)["text"]) for line in good
        }
        assert taken + rest(loader) == everything
        assert taken + rest(other) == everything


def test_a_state_of_another_row_length_or_tokenizer_is_refused(open_loader: Any) -> None:
    with open_loader(True) as loader:
        state = loader.get_state()
    with (
        open_loader(True, max_length=32) as other,
        pytest.raises(StateError, match="row_length 64"),
    ):
        other.set_state(state)
    state["identity"]["tokenizer"] = "0" * 16
    with open_loader(True) as other, pytest.raises(StateError, match="tokenizer 0000"):
        other.set_state(state)


def test_a_state_of_a_store_of_other_text_is_refused(
    make_config: Any, store: Path, tmp_path: Path
) -> None:
    """The config is the same, a file has changed; a store of the same text fits wherever it is."""
    path = tmp_path / "a.jsonl"

    def prepared(folder: str, text: str) -> Any:
        lines = [json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(60)]
        path.write_text("".join(lines))
        sources = {"a": {"kind": "files", "paths": [str(path)]}}
        config = make_config(sources=sources, store=str(tmp_path / folder))
        prepare(config)
        return config

    first, same, other = prepared("1", "one"), prepared("2", "one"), prepared("3", "two")
    with get_loader(first, batch_size=2) as loader:
        next(loader)
        state = json.loads(json.dumps(loader.get_state()))
    with get_loader(same, batch_size=2) as loader:
        loader.set_state(state)
    with (
        get_loader(other, batch_size=2) as loader,
        pytest.raises(StateError, match=r"a store of source 'a' .* resume with the same"),
    ):
        loader.set_state(state)


def test_a_state_of_an_earlier_version_is_refused(open_loader: Any) -> None:
    with open_loader(True) as loader:
        state = loader.get_state() | {"schema": 2}
        with pytest.raises(StateError, match="schema 2, expected 3; go on with the version"):
            loader.set_state(state)


def test_state_is_small_and_plain(open_loader: Any) -> None:
    with open_loader(False) as loader:
        next(loader)
        text = json.dumps(loader.get_state())
    assert len(text) < 8_000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "test"}, "split is 'test'"),
        ({"batch_size": 5, "shard": (0, 2)}, "batch_size 5"),
        ({"sources": ["nope"]}, "no train source 'nope'"),
        ({"weights": {"code": 1}}, "no weight for source"),
    ],
)
def test_wrong_arguments_are_named(open_loader: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_loader(True, **options)


def test_an_overlapping_probe_is_refused_or_dropped_from_training(
    make_config: Any, corpora: dict[str, Path], tmp_path: Path
) -> None:
    probe = tmp_path / "probe.jsonl"
    lines = corpora["sums"].read_text().splitlines(keepends=True)
    probe.write_text("".join(lines[:30]))
    probes = {"mine": {"kind": "files", "paths": [str(probe)], "split": "probe"}}
    loader = get_loader(make_config(probes=probes), batch_size=2)
    with loader, pytest.raises(DataError, match="also in a probe"):
        for _ in range(60):
            next(loader)
    skipping = make_config(probes=probes, on_error="skip")
    held_out = {document_id(json.loads(line)["text"]) for line in lines[:30]}
    with get_loader(skipping, batch_size=2, repeat=False) as loader:
        seen = {d for _ in loader for d, _, _ in pieces(loader)}
        assert loader.stats()["sources"]["sums"]["skipped"]["held_out"] > 0
    assert seen and not seen & held_out


def test_a_store_of_other_sources_is_refused(make_config: Any, store: Path) -> None:
    config = make_config(store=str(store), splits={"probe": 0.2, "eval": 0.1})
    with pytest.raises(StateError, match="pipeline"):
        get_loader(config, batch_size=2)
    with pytest.raises(DataError, match="no prepared store"):
        get_loader(make_config(store=str(store / "nowhere")), batch_size=2)
    assert open_store(store).verify() > 0
