"""Runs of one policy and seed are told apart, compared, and never pooled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dh_jax.report import load_run, summarise, write_report
from dh_jax.report.variants import tell_apart
from tests.dh_jax.report.simulated import simulate


def run_in(folder: Path, policy: str, seed: int, gain: float = 1.0, **settings: Any) -> Path:
    """A simulated run whose config has further settings, by dotted key."""
    simulate(folder, policy, seed, gain=gain)
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for key, value in settings.items():
        group, _, name = key.partition("__")
        config.setdefault(group, {})[name] = value
    path.write_text(yaml.safe_dump(config))
    return folder


def names(folders: list[Path]) -> list[str]:
    return [run.policy for run in tell_apart([load_run(f) for f in folders])]


def test_repetitions_keep_their_policys_name(nine: list[Path]) -> None:
    assert names(nine) == [run.policy for run in map(load_run, nine)]


def test_a_setting_names_what_differs(tmp_path: Path) -> None:
    folders = [
        run_in(tmp_path / f"{budget}-{seed}", "influence", seed, mixing__budget=budget)
        for budget in (None, 0.05)
        for seed in (0, 1)
    ]
    told = ["influence (budget none)"] * 2 + ["influence (budget 0.05)"] * 2
    assert names(folders) == told


def test_many_differences_are_named_by_folders(tmp_path: Path) -> None:
    folders = [
        run_in(tmp_path / f"{name}-{seed}", "static", seed, data__a=x, data__b=x, data__c=x)
        for name, x in (("hand", 1), ("regmix", 2))
        for seed in (0, 1)
    ]
    assert names(folders) == ["static (hand)"] * 2 + ["static (regmix)"] * 2


def test_policies_on_different_data_say_which(tmp_path: Path) -> None:
    folders = [
        run_in(tmp_path / policy, policy, 0, data__name=name)
        for policy, name in (("influence", "demo"), ("static", "demo-regmix"))
    ]
    assert names(folders) == ["influence (demo)", "static (demo-regmix)"]


def test_equal_runs_are_named_by_their_own_folders(tmp_path: Path) -> None:
    folders = [run_in(tmp_path / where / "run", "static", 0) for where in ("a", "b")]
    assert names(folders) == ["static (a/run)", "static (b/run)"]


def test_two_settings_of_a_policy_are_compared_with_the_first_named(tmp_path: Path) -> None:
    folders = [
        run_in(tmp_path / f"{rate}-{seed}", "influence", seed, gain, mixing__learning_rate=rate)
        for rate, gain in ((0.1, 0.0), (0.5, 2.0))
        for seed in (0, 1, 2)
    ]
    summary = summarise(tell_apart([load_run(f) for f in folders]))
    slow, quick = "influence (learning_rate 0.1)", "influence (learning_rate 0.5)"
    assert summary.refusal is None
    assert {(d.steered, d.baseline) for d in summary.differences} == {(quick, slow)}
    assert f"mixing steered by {quick} beats {slow}" in summary.headline
    assert summary.seeds == {slow: (0, 1, 2), quick: (0, 1, 2)}
    assert len(summary.target_loss[slow].values) == 3  # not six


def test_a_steered_run_is_compared_with_each_static_mixture(tmp_path: Path) -> None:
    folders = [
        run_in(tmp_path / "steered", "influence", 0),
        run_in(tmp_path / "a", "static", 0, data__name="hand"),
        run_in(tmp_path / "b", "static", 0, data__name="found"),
    ]
    out = tmp_path / "report.html"
    summary = write_report(folders, out)
    pairs = {(d.steered, d.baseline) for d in summary.differences}
    assert pairs == {("influence (demo)", f"static ({name})") for name in ("found", "hand")}
    ids = re.findall(r' id="([^"]*)"', out.read_text())
    assert not [name for name in ids if re.search(r"\s", name)] and len(set(ids)) == len(ids)


@pytest.mark.parametrize("policies", [("influence", "odm"), ("static", "static")])
def test_two_runs_of_different_seeds_alone_are_not_paired(
    tmp_path: Path, policies: tuple[str, str]
) -> None:
    folders = [run_in(tmp_path / str(n), p, n) for n, p in enumerate(policies)]
    summary = summarise(tell_apart([load_run(f) for f in folders]))
    assert summary.differences == ()
    assert ("share no seed" in (summary.refusal or "")) == (policies[0] != policies[1])


def test_other_configured_weights_are_one_warning(tmp_path: Path) -> None:
    folders = [
        run_in(tmp_path / name, policy, 0, data__sources={s: {"weight": w} for s in ("a", "b")})
        for name, policy, w in (("steered", "influence", 0.5), ("found", "static", 0.25))
    ]
    (warning,) = summarise([load_run(f) for f in folders]).warnings
    assert "different configured weights (influence, seed 0: code 0.3, docs" in warning
