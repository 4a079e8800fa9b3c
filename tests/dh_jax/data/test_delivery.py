"""Delivery: what an interruption leaves, and what is said of what was delivered."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dh_jax.data.batching import MixedRow
from dh_jax.data.loader import Loader, get_loader
from dh_jax.data.mixing import MixedIterator


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, whoever started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def taken(loader: Loader) -> list[tuple[Any, ...]]:
    """(document, offset, tokens) of the last batch's pieces, in order."""
    ids, offsets, lengths = loader.origins
    there = np.nonzero(lengths)
    return list(zip(*(x[there].tolist() for x in (ids, offsets, lengths)), strict=True))


@pytest.mark.parametrize("stored", [False, True], ids=["stream", "store"])
@pytest.mark.parametrize("interrupts", [1, 2])
def test_ctrl_c_while_waiting_for_a_batch_loses_and_repeats_nothing(
    make_config: Any,
    store: Path,
    interruptible: None,
    monkeypatch: pytest.MonkeyPatch,
    stored: bool,
    interrupts: int,
) -> None:
    """It comes while another thread draws rows; a second one while the first waits for them."""
    due: list[int] = []
    draw = MixedIterator.draw

    def draw_slowly(mixture: MixedIterator, count: int) -> list[MixedRow]:
        rows = draw(mixture, count // 2)
        for _ in range(due.pop() if due else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return rows + draw(mixture, count - count // 2)

    config = make_config(store=str(store) if stored else None)
    options: dict[str, Any] = {"batch_size": 8, "repeat": False, "sources": ["mail", "sums"]}
    with get_loader(config, **options) as whole:
        expected = [piece for _ in whole for piece in taken(whole)]
    found: list[Any] = []
    monkeypatch.setattr(MixedIterator, "draw", draw_slowly)
    with get_loader(config, **options, prefetch=2) as loader:
        for _ in range(4):
            for _ in range(2):
                next(loader)
                found += taken(loader)
            loader.set_weights(loader.weights)  # nothing is ahead: the next batch is waited for
            due.append(interrupts)
            with pytest.raises(KeyboardInterrupt):
                next(loader)
        for _ in loader:
            found += taken(loader)
    assert found == expected


def with_bad_lines(path: Path, good: int, every: int, more: int) -> dict[str, Any]:
    """A source of ``good`` documents, a bad line before every so manieth and some at the end."""
    lines = []
    for i in range(good):
        lines += ["{bad"] * (i % every == 0) + [json.dumps({"text": f"document {i} " * 9})]
    path.write_text("\n".join(lines + ["{bad"] * more) + "\n")
    return {"kind": "files", "paths": [str(path)]}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_was_left_out_is_that_of_the_windows_delivered_also_after_a_resume(
    make_config: Any, tmp_path: Path, prefetch: int
) -> None:
    """A hundred documents fill windows of ten exactly: the bad lines at the end are behind the last
    window, and count all the same."""
    sources = {"a": with_bad_lines(tmp_path / "a.jsonl", good=100, every=5, more=3)}
    packing = {"window": 10, "max_segments": 16}
    config = make_config(
        sources=sources, packing=packing, splits={"probe": 0.0, "eval": 0.0}, on_error="skip"
    )

    def open_one() -> Loader:
        return get_loader(config, batch_size=1, shuffle=False, repeat=False, prefetch=prefetch)

    seen = []
    with open_one() as loader, open_one() as resumed:
        while next(loader, None) is not None:
            seen.append(loader.stats()["sources"]["a"]["skipped"]["corrupt_json"])
            resumed.set_state(json.loads(json.dumps(loader.get_state())))
            assert resumed.stats() == loader.stats()
        assert seen[0] == 2 and sorted(seen) == seen and set(seen) == set(range(2, 21, 2))
        assert loader.stats()["sources"]["a"]["skipped"] == {"corrupt_json": 23}
        resumed.set_state(json.loads(json.dumps(loader.get_state())))
        assert resumed.stats() == loader.stats() and next(resumed, None) is None


def test_packing_efficiency_is_that_of_all_batches_whatever_their_sizes(
    make_config: Any, store: Path
) -> None:
    config = make_config(store=str(store))
    tokens = room = 0
    state = None
    for size, steps in ((2, 7), (8, 3), (1, 5)):
        with get_loader(config, batch_size=size) as loader:
            if state is not None:
                loader.set_state(state)
            for _ in range(steps):
                tokens += int((next(loader).segment_ids_BT > 0).sum())
                room += size * loader.row_length
                assert loader.stats()["packing_efficiency"] == tokens / room
            state = loader.get_state()


def test_closing_and_a_new_pass_leave_no_file_open(make_config: Any, tmp_path: Path) -> None:
    def open_files() -> int:
        there = [os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()]
        return sum(str(tmp_path) in name for name in there)

    sources = {"a": with_bad_lines(tmp_path / "a.jsonl", good=3000, every=9, more=0)}
    config = make_config(sources=sources, on_error="skip", packing={"window": 32})
    with get_loader(config, batch_size=8) as loader:
        early = next(loader) and loader.get_state()
        assert open_files() == 1
        while loader.stats()["sources"]["a"]["epoch"] == 0:
            next(loader)
        loader.set_state(early)
        next(loader)
        assert open_files() == 1
    assert open_files() == 0
