"""Taps: what each operation of a model received, and the cotangent of what it gave.

A `Tape` goes through the model's calls. Every operation with parameters shows it what met its
weight and what came out; where a tap is given under its name, the tap (zeros) is added and the
input kept. The gradient with respect to a tap is then the cotangent at that operation, and no
other machinery is needed: taps work under jit, vmap, grad and rematerialisation, since they are
ordinary arguments and results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import jax

Array: TypeAlias = jax.Array


class Tape:
    """The taps of one call, at one place in the model.

    Args:
        taps: zeros by name; only these operations are tapped.
        measuring: keep the output of every operation instead, for its shape.
    """

    def __init__(self, taps: Mapping[str, Array] | None = None, *, measuring: bool = False) -> None:
        self.measuring = measuring
        self.kept: dict[str, Array] = {}
        self.shown: dict[str, Array] = {}  # of one layer; see `show`
        self._taps = taps or {}
        self._name = ""

    def inside(self, name: str) -> Tape:
        """The same tape, one module further in."""
        tape = Tape(self._taps, measuring=self.measuring)
        tape.kept, tape._name = self.kept, f"{self._name}/{name}" if self._name else name
        tape.shown = self.shown
        return tape

    def show(self, **states: Array) -> None:
        """Leave a layer's states for who asks; those that nobody takes cost nothing compiled."""
        self.shown.update(states)

    def taps_of(self, name: str) -> dict[str, Array]:
        """The taps further in than ``name``, by the rest of their names."""
        return under(self._taps, name)

    def __call__(self, x: Array, y: Array) -> Array:
        """``y``, which an operation gave for ``x``; with its tap, if there is one."""
        if self.measuring:
            self.kept[self._name] = y
        if self._name not in self._taps:
            return y
        self.kept[self._name] = x
        return y + self._taps[self._name].astype(y.dtype)


def under(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """The entries whose names begin with ``prefix/``, without it."""
    start = f"{prefix}/"
    return {k.removeprefix(start): x for k, x in arrays.items() if k.startswith(start)}


def named(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """The entries with ``prefix/`` before their names."""
    return {f"{prefix}/{name}": array for name, array in arrays.items()}
