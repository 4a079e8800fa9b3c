"""A pass over a source goes on with another number of hosts: none lost, none twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dh_jax.data.reading.pieces import START
from dh_jax.errors import StateError

NOT_SHARED = ("shard", "epoch")


class Resharded(NamedTuple):
    """States for the hosts of the new run, and what they will see again."""

    states: list[dict[str, Any]]  # one for each host, in order
    again: int  # documents of the next pass that hosts ahead of the others had already seen


def reshard(states: Sequence[Mapping[str, Any]], count: int) -> Resharded:
    """States for ``count`` hosts that go on where the hosts of a run stood.

    What the old hosts had left of their pieces is dealt to the new ones. If some hosts are in
    the next pass already, the new run finishes the earlier one and then begins the next anew.

    Args:
        states: of a `sources.DocumentIterator`, one from each host of the run, in any order.
        count: hosts of the new run.

    Raises:
        StateError: the states are not those of one run, or one is missing.
    """
    if not states or count < 1:
        raise StateError(f"{len(states)} states for {count} hosts; give one of every old host")
    by_index: dict[int, Mapping[str, Any]] = {}
    for state in states:
        index, of = map(int, state["identity"]["shard"].split(" of "))
        if of != len(states) or index in by_index:
            raise StateError(
                f"{len(states)} states, one of them of shard {index} of {of}; give exactly one "
                "state of every host of one run"
            )
        by_index[index] = state
    ordered = [by_index[i] for i in range(len(states))]
    shared = [{k: v for k, v in s["identity"].items() if k not in NOT_SHARED} for s in ordered]
    for key, value in shared[0].items():
        if other := [s[key] for s in shared if s[key] != value]:
            raise StateError(f"the states have {key} {value!r} and {other[0]!r}; of which run?")
    epoch = min(s["identity"]["epoch"] for s in ordered)
    behind = [s for s in ordered if s["identity"]["epoch"] == epoch]
    if len({s["history"] for s in behind}) > 1:
        raise StateError("the states come from runs with different pasts; give those of one run")
    cursors = [s["cursor"] if s["identity"]["epoch"] == epoch else None for s in ordered]
    history = [*json.loads(behind[0]["history"]), [len(states), cursors]]
    left = -1 if behind[0]["left"] < 0 else sum(s["left"] for s in behind)
    totals = {key: sum(s[key] for s in behind) for key in ("seen", "yielded")}
    skipped = [sum(column) for column in zip(*(s["skipped"] for s in behind), strict=True)]
    new = [
        {
            "identity": {**behind[0]["identity"], "shard": f"{i} of {count}"},
            "cursor": START,
            "history": json.dumps(history, separators=(",", ":")),
            **(totals if i == 0 else dict.fromkeys(totals, 0)),  # counted once, by the first host
            "left": left if left < 0 else (left - i + count - 1) // count,
            "skipped": skipped if i == 0 else [0] * len(skipped),
        }
        for i in range(count)
    ]
    return Resharded(new, sum(s["yielded"] for s in ordered if s["identity"]["epoch"] > epoch))


def reshard_loaders(states: Sequence[Mapping[str, Any]], count: int) -> Resharded:
    """Loader states for ``count`` hosts of a run whose sources stream.

    (States of prepared stores need none of this: each fits any number of hosts.) Each old host
    was inside a window of documents of which some rows were delivered, perhaps with documents that
    the window before had left over: the new hosts read those windows again from their beginning,
    so no document is lost, and at most two windows a source and old host are seen twice.

    Args:
        states: of `Loader.get_state`, one from each host of the run, in any order.
        count: hosts of the new run; `Loader.set_state` takes the states that are returned.

    Returns:
        The states, and how many documents may be seen again, at most.

    Raises:
        StateError: the states are not those of one run, or are of prepared stores.
    """
    first = states[0] if states else {}
    if not states or any(
        s["identity"] != first["identity"] or s["batches"] != first["batches"] for s in states
    ):
        raise StateError(
            f"{len(states)} states of different runs or steps; give one of every host, of one step"
        )
    if first["identity"]["stored"]:
        raise StateError("states of prepared stores fit any number of hosts as they are")
    weights = weights_of_all(
        [{name: part["weight"] for name, part in s["mixture"].items()} for s in states]
    )
    mixtures: list[dict[str, Any]] = [{} for _ in range(count)]
    again = 0
    for name in first["mixture"]:
        parts = [state["mixture"][name] for state in states]
        windows = [part["source"]["window"] for part in parts]
        documents = reshard([window["documents"] for window in windows], count)
        begun = sum(part["source"]["following"] + (part["source"]["row"] > 0) for part in parts)
        again += documents.again + begun * first["identity"]["packing"]["window"]
        shared = {
            "epoch": min(window["epoch"] for window in windows),
            "window": max(window["window"] for window in windows),  # so that no seed comes twice
            "kept": True,  # of this pass, by some host
        }
        for i, mixture in enumerate(mixtures):
            totals = {
                key: sum(part[key] for part in parts) if i == 0 else 0
                for key in ("rows", "tokens", "truncated")
            }
            mixture[name] = {
                "weight": weights[name],
                "deficit": sum(part["deficit"] for part in parts) / count,
                **totals,
                "source": {
                    "window": {
                        **shared,
                        "documents": documents.states[i],
                        "skipped": _summed(windows) if i == 0 else {},
                    },
                    "following": False,
                    "left": "",
                    "row": 0,
                    "skipped": _summed([part["source"] for part in parts]) if i == 0 else {},
                },
            }
    filled = _filled(states, count)
    return Resharded([{**first, **filled, "mixture": mixture} for mixture in mixtures], again)


def weights_of_all(hosts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mixture of hosts of which each has set to 0 what ran dry there, and scaled up the rest:
    ratios hold wherever two sources go on, so those of one host are filled from another's.

    Args:
        hosts: weights by source, of every host.
    """
    first, *others = sorted(hosts, key=lambda own: -sum(x > 0 for x in own.values()))
    found = dict(first)
    for own in others:
        common = [name for name in found if found[name] > 0 and own[name] > 0]
        scale = 1.0
        if common:
            scale = sum(found[name] for name in common) / sum(own[name] for name in common)
        found = {name: x if x > 0 else own[name] * scale for name, x in found.items()}
    total = sum(found.values())
    return {name: x / total if total else 0.0 for name, x in found.items()}


def loader_states(states: Sequence[Mapping[str, Any]], count: int) -> Resharded:
    """Loader states for ``count`` hosts of a run that had ``len(states)``, stored or streamed.

    Args:
        states: of `Loader.get_state`, one from each host of the run, in their order.
        count: hosts of the new run.

    Returns:
        The states, and how many documents may be seen again, at most: 0 unless the run streams
        and the number of hosts has changed.

    Raises:
        StateError: see `reshard_loaders`.
    """
    if len(states) == count:
        return Resharded([dict(state) for state in states], 0)
    if states and states[0]["identity"]["stored"]:  # every host draws the rows of all
        return Resharded([{**states[0], **_filled(states, count)}] * count, 0)
    return reshard_loaders(states, count)


def _filled(states: Sequence[Mapping[str, Any]], count: int) -> dict[str, int]:
    """An equal share for each of ``count`` hosts of what all hosts delivered."""
    return {key: sum(state[key] for state in states) // count for key in ("fill", "capacity")}


def _summed(parts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part["skipped"])
    return dict(total)
