"""Ctrl-C and SIGTERM end a run behind the step in hand, not in the middle of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM; a second one acts at once, as without us."""
    received: list[int] = []
    old: dict[signal.Signals, Any] = {}

    def receive(number: int, _: Any) -> None:
        received.append(number)
        for each, handler in old.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, receive)
    except ValueError:  # not the main thread (a notebook's worker): the caller handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
