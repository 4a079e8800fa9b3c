"""What a distilled run logged of its teacher and its student."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dh_jax.errors import DataError

DISTILLED = ", distilled"  # behind a policy's name, so that both kinds of runs compare


class TeachingPoint(NamedTuple):
    """Means over the targets of one training batch, behind its step; see `Measures`."""

    step: int
    divergence: float
    cross_entropy: float
    agreement: float
    teacher_entropy: float
    tail_mass: float
    hidden: float = 0.0  # terms on the inside, without their weights; 0 where there is none
    relations: float = 0.0

    @property
    def inside(self) -> bool:
        """Whether the inside was distilled, too."""
        return self.hidden > 0 or self.relations > 0


_INSIDE = tuple(TeachingPoint._field_defaults)


def named(policy: str, config: Mapping[str, Any]) -> str:
    """The policy's name in a report: a run from a teacher is compared with those without."""
    return policy + (DISTILLED if is_distilled(config) else "")


def is_distilled(config: Mapping[str, Any]) -> bool:
    """Whether a run's config names a teacher or a cache of one."""
    group = config.get("distillation") or {}
    return any(group.get(key) is not None for key in ("teacher", "cache"))


def teaching(folder: Path, config: Mapping[str, Any]) -> tuple[TeachingPoint, ...]:
    """A run's records of kind ``distillation``.

    Raises:
        DataError: a record lacks a number.
    """
    if not is_distilled(config):
        return ()
    path = folder / "metrics.jsonl"
    points = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if '"kind": "distillation"' not in line:
            continue
        try:
            record = json.loads(line)
            needed = {n: record[n] for n in TeachingPoint._fields if n not in _INSIDE}
            points.append(TeachingPoint(**needed, **{n: record.get(n, 0.0) for n in _INSIDE}))
        except (ValueError, KeyError) as error:
            raise DataError(f"{path} line {number}: no record of a teacher ({error!r})") from error
    return tuple(points)
