"""Streaming runs that go on with another number of hosts: nothing lost, little seen twice."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dh_jax.data.elastic import reshard_loaders, weights_of_all
from dh_jax.data.loader import Loader, get_loader
from dh_jax.errors import StateError

WINDOW = 32


@pytest.fixture
def hosts(make_config: Any) -> Any:
    """Opens the streaming loaders of all hosts of a run that makes one pass."""
    config = make_config(packing={"window": WINDOW, "max_segments": 16}, max_length=256)

    def open_all(count: int) -> list[Loader]:
        return [
            get_loader(config, batch_size=6, shard=(i, count), repeat=False) for i in range(count)
        ]

    return open_all


def tokens_of(loader: Loader, steps: int | None = None) -> Counter[tuple[int, int]]:
    """(document, place within it) of every token delivered."""
    seen: Counter[tuple[int, int]] = Counter()
    while steps is None or steps > 0:
        if next(loader, None) is None:
            break
        steps = None if steps is None else steps - 1
        origins = loader.origins
        for ids, offsets, lengths in zip(*origins, strict=True):
            for document, offset, length in zip(ids, offsets, lengths, strict=True):
                start = int(offset)
                seen.update((int(document), start + i) for i in range(int(length)))
    return seen


MORE = [(2, 1, 60), (2, 3, 90)]


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [(3, 2, 20), (1, 3, 20), *(pytest.param(*x, marks=pytest.mark.slow) for x in MORE)],
)
def test_nothing_is_lost_and_little_seen_twice(
    hosts: Any, before: int, after: int, steps: int
) -> None:
    with hosts(1)[0] as alone:
        everything = tokens_of(alone)
    old = hosts(before)
    seen: Counter[tuple[int, int]] = Counter()
    for loader in old:
        seen += tokens_of(loader, steps=steps)
    states = [json.loads(json.dumps(loader.get_state())) for loader in old]
    following = [p["source"]["following"] for s in states for p in s["mixture"].values()]
    assert any(following) == (steps > 20)  # windows that hold what others left
    resharded = reshard_loaders(states[::-1], after)
    new = hosts(after)
    for loader, state in zip(new, resharded.states, strict=True):
        loader.set_state(json.loads(json.dumps(state)))
        assert loader.weights == old[0].weights
        seen += tokens_of(loader)
    for loader in [*old, *new]:
        loader.close()
    assert seen.keys() == everything.keys()
    twice = {document for (document, _), n in seen.items() if n > everything[document, _]}
    assert 0 < len(twice) <= resharded.again <= 2 * 3 * before * WINDOW


def test_states_of_another_run_or_step_or_of_a_store_are_refused(
    hosts: Any, make_config: Any, store: Any
) -> None:
    old = hosts(2)
    next(old[0])
    states = [loader.get_state() for loader in old]
    with pytest.raises(StateError, match="one step"):
        reshard_loaders(states, 3)
    with pytest.raises(StateError, match="0 states"):
        reshard_loaders([], 3)
    with get_loader(make_config(store=str(store)), batch_size=2) as stored:
        state = stored.get_state()
    with pytest.raises(StateError, match="as they are"):
        reshard_loaders([state], 3)
    for loader in old:
        loader.close()


@given(
    st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5),
    st.lists(st.sets(st.integers(1, 4), max_size=4), min_size=1, max_size=4),
)
def test_a_source_that_ran_dry_on_some_hosts_alone_keeps_its_share(
    shares: list[float], dry: list[set[int]]
) -> None:
    hosts = []
    for gone in dry:  # source 0 goes on everywhere
        left = [0.0 if m in gone else share for m, share in enumerate(shares)]
        hosts.append({str(m): x / sum(left) for m, x in enumerate(left)})
    found = weights_of_all(hosts)
    alive = [0.0 if all(m in gone for gone in dry) else share for m, share in enumerate(shares)]
    for m, share in enumerate(alive):
        assert found[str(m)] == pytest.approx(share / sum(alive))
    assert sum(weights_of_all([{"a": 0.0, "b": 0.0}]).values()) == 0
