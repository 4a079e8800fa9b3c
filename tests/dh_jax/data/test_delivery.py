"""Delivery: what an interruption leaves, and what is said of what was delivered."""

from __future__ import annotations

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
