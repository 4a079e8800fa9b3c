"""Runs of one policy under different settings get names of their own, so that none stands for
another's repetition."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from dh_jax.report.runs import Run
from dh_jax.report.statistics import REPEATED, WEIGHT, by_policy, config_differences, flat

MOST_KEYS, MOST_LETTERS = 2, 40  # of a name; where settings differ in more, folders name them


def tell_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, in their order; those of a policy that has two of one seed renamed.

    Such runs do not repeat each other. Their settings are named by what they differ in, as in
    ``influence (budget 0.05)``, else by what the names of their folders begin with; runs of one
    setting and seed by their own folders. Where runs differ in their data config's name, each
    policy that has one says it: ``static (demo-regmix)`` is not what was configured by hand.
    """
    several = len({_data(run) for run in runs}) > 1
    names: dict[Path, str] = {}
    for policy, group in by_policy(runs).items():
        if _repeats(group):
            names |= {folder: f"{policy} ({name})" for folder, name in _names(group).items()}
        elif several and (name := _data(group[0])) and {_data(run) for run in group} == {name}:
            names |= {run.folder: f"{policy} ({name})" for run in group}
    return [run._replace(policy=names.get(run.folder, run.policy)) for run in runs]


def _data(run: Run) -> str | None:
    return flat(run.config).get("data.name")


def _repeats(group: Sequence[Run]) -> bool:
    return len({run.seed for run in group}) < len(group)


def _names(group: Sequence[Run]) -> dict[Path, str]:
    settings: dict[str, list[Run]] = {}
    for run in group:
        kept = {key: value for key, value in flat(run.config).items() if key not in REPEATED}
        settings.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(run)
    several = not any(map(_repeats, settings.values()))
    differing = [key for key in config_differences(group) if key not in REPEATED]
    if "data.name" in differing:  # it stands for their weights, too
        differing = [key for key in differing if not WEIGHT.fullmatch(key)]
    if several and len(differing) <= MOST_KEYS:
        names = {run.folder: _values(run, differing) for run in group}
        if max(map(len, names.values())) <= MOST_LETTERS:
            return names
    if several:
        begins = [_beginning(same) for same in settings.values()]
        if all(begins) and len(set(begins)) == len(begins):
            pairs = zip(settings.values(), begins, strict=True)
            return {run.folder: name for same, name in pairs for run in same}
    alike = len({run.folder.name for run in group}) < len(group)
    return {r.folder: str(Path(*r.folder.parts[-2:])) if alike else r.folder.name for r in group}


def _values(run: Run, keys: Sequence[str]) -> str:
    config = flat(run.config)
    shown = {key: "none" if config.get(key) is None else str(config[key]) for key in keys}
    return ", ".join(
        value if key == "data.name" else f"{key.rpartition('.')[2]} {value}"
        for key, value in shown.items()
    )


def _beginning(runs: Sequence[Run]) -> str:
    """The name of a run's folder, or of several the one they have but for a seed's number."""
    names = {run.folder.name for run in runs}
    if len(names) > 1:
        names = {re.sub(r"[-_.]?\d+$", "", name) for name in names}
    return names.pop() if len(names) == 1 else ""
