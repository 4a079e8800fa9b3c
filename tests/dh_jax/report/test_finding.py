"""What is concluded from runs: spreads, intervals, verdicts, refusals, and their words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from dh_jax.report import load_run, summarise
from dh_jax.report.finding import amount, number, seconds, signed
from dh_jax.report.statistics import interval, spread, t_cdf, t_quantile
from tests.dh_jax.report.simulated import SOURCES, TOKENS_A_STEP, last_losses, raw

# --- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("dof", [*range(1, 13), 29, 30, 200])
def test_students_t_equals_scipys(dof: int) -> None:
    for t in (-7.5, -1.0, 0.0, 0.3, 2.0, 40.0):
        assert t_cdf(t, dof) == pytest.approx(scipy.stats.t.cdf(t, dof), rel=1e-9, abs=1e-13)
    for p in (0.5, 0.9, 0.975, 0.9995):
        assert t_quantile(p, dof) == pytest.approx(scipy.stats.t.ppf(p, dof), rel=1e-9, abs=1e-12)


def test_t_quantiles_are_those_of_the_printed_tables() -> None:
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042}
    assert {dof: round(t_quantile(0.975, dof), 3) for dof in printed} == printed


def test_interval_is_that_of_a_one_sample_t_test() -> None:
    values = [-0.31, -0.05, -0.22, 0.04]
    s = spread(values)
    assert s.standard_error == pytest.approx(scipy.stats.sem(values))
    test = scipy.stats.ttest_1samp(values, 0.0)
    assert interval(s) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert interval(spread([1.0])) is None


def test_numbers_are_put_into_words() -> None:
    assert [number(-0.0621), signed(0.0621), signed(0.0), number(float("nan"))] == [
        "−0.062", "+0.062", "0.000", "not finite"]  # fmt: skip
    assert [amount(n) for n in (0, 999, 40_960, 999_800, 1_803_392, 2.5e9)] == [
        "0", "999", "41 k", "1 M", "1.8 M", "2.5 G"]  # fmt: skip
    assert [seconds(s) for s in (0.414, 47.6, 200, 3599.7, 7500)] == [
        "0.41 s", "48 s", "3 min 20 s", "1 h 00 min", "2 h 05 min"]  # fmt: skip


# --- the finding -----------------------------------------------------------------------------


def test_paired_differences_equal_numpys(nine: list[Path]) -> None:
    summary = summarise([load_run(f) for f in nine])
    assert summary.refusal is None
    for d in summary.differences:
        column = SOURCES.index(d.domain or "maths")
        ours = last_losses(nine, "influence")[:, column]
        theirs = last_losses(nine, d.baseline)[:, column]
        np.testing.assert_allclose(d.spread.values, ours - theirs, rtol=1e-12)
        assert d.spread.mean == pytest.approx((ours - theirs).mean())
        assert d.relative == pytest.approx((ours - theirs).mean() / theirs.mean())
        paired = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        assert d.interval == pytest.approx(tuple(paired))
    assert len(summary.differences) == 2 * (1 + len(SOURCES))


def test_several_targets_are_weighted(nine: list[Path]) -> None:
    runs = [load_run(f)._replace(targets={"maths": 3.0, "puzzles": 1.0}) for f in nine]
    summary = summarise(runs)
    weights = np.array([0, 0, 0, 0.75, 0.25])
    for policy in summary.policies:
        expected = last_losses(nine, policy) @ weights
        np.testing.assert_allclose(summary.target_loss[policy].values, expected)
    first = summary.differences[0]
    expected = (last_losses(nine, "influence") - last_losses(nine, "static")) @ weights
    np.testing.assert_allclose(first.spread.values, expected)


def test_overhead_is_reweight_seconds_over_all_seconds(nine: list[Path]) -> None:
    summary = summarise([load_run(f) for f in nine])
    times = [r for f in nine[:3] for r in raw(f, "timing.jsonl")]
    spent = sum(r["seconds"] for r in times if r["phase"] == "reweight")
    total = sum(r["seconds"] for r in times)
    assert summary.clock["influence"].overhead == pytest.approx(spent / total)
    assert summary.clock["static"].overhead == 0
    trained = sum(r["seconds"] for r in times if r["phase"] == "train")
    assert summary.clock["influence"].tokens_per_second == pytest.approx(
        3 * 120 * TOKENS_A_STEP / trained
    )


def with_final(runs: list[Any], changes: dict[str, list[float]]) -> list[Any]:
    """The runs with the last loss on maths replaced: a policy's values by seed."""
    changed = []
    for run in runs:
        end = run.evals[-1]
        loss = end.domains["maths"]._replace(loss=changes[run.policy][run.seed])
        point = end._replace(domains={**end.domains, "maths": loss})
        changed.append(run._replace(evals=(*run.evals[:-1], point)))
    return changed


@pytest.mark.parametrize(
    ("steered", "said", "denied"),
    [
        ([3.0, 3.1, 3.2], "beats static and uniform", "worse"),
        ([5.0, 5.1, 5.2], "does worse than static and uniform", "beats"),
        ([3.5, 4.1, 4.2], "ends ahead of static and uniform, but the 95", "beats"),
        ([3.9, 4.1, 5.0], "ends behind static and uniform, but the 95", "beats"),
        ([4.0, 4.1, 4.2], "ends level with static and uniform", "beats"),
    ],
)
def test_the_headline_says_how_it_went_and_not_better(
    nine: list[Path], steered: list[float], said: str, denied: str
) -> None:
    base = [4.0, 4.1, 4.2]
    runs = with_final(
        [load_run(f) for f in nine], {"influence": steered, "static": base, "uniform": base}
    )
    headline = summarise(runs).headline
    assert said in headline and denied not in headline
    assert "maths" in headline


def test_the_headline_tells_baselines_apart(nine: list[Path]) -> None:
    finals = {"influence": [4.0, 4.1, 4.2], "static": [4.5, 4.6, 4.71], "uniform": [3.5, 3.6, 3.71]}
    runs = with_final([load_run(f) for f in nine], finals)
    headline = summarise(runs).headline
    aimed, _, elsewhere = headline.partition(" On the 4 others it is on average ")
    assert aimed == (
        "On held-out maths, mixing steered by influence beats static; it does worse than uniform."
    )
    others = [SOURCES.index(name) for name in SOURCES if name != "maths"]
    ours, static, uniform = (
        last_losses(nine, name)[:, others].mean() for name in ("influence", "static", "uniform")
    )
    assert elsewhere == (
        f"{ours - static:.3f} behind static and {ours - uniform:.3f} behind uniform (nats a token)."
    )


def test_a_single_seed_gets_no_interval_and_no_verdict(nine: list[Path]) -> None:
    summary = summarise([load_run(nine[0]), load_run(nine[3])])
    assert "in the one seed that was run" in summary.headline and "beats" not in summary.headline
    assert all(d.interval is None and d.verdict == "single" for d in summary.differences)


def refused(runs: list[Any]) -> str:
    summary = summarise(runs)
    assert summary.differences == ()
    assert summary.refusal is not None and summary.refusal in summary.headline
    return summary.refusal


def test_what_cannot_be_compared_is_refused(nine: list[Path]) -> None:
    a, b = load_run(nine[0]), load_run(nine[3])  # influence and static, seed 0
    assert "unequal numbers of tokens" in refused(
        [a, b._replace(train=tuple(p._replace(tokens=2 * p.tokens) for p in b.train))]
    )
    assert "not every run is finished" in refused([a, b._replace(status="interrupted")])
    assert "both static with seed 0" in refused([a, b, b])
    assert "share no seed" in refused([a, b._replace(seed=5)])
    assert "without an evaluation" in refused([a, b._replace(evals=())])
    assert "different targets" in refused([a, b._replace(targets={"code": 1.0})])
    nan = {"influence": [float("nan")], "static": [4.0]}
    assert "not finite" in refused(with_final([a, b], nan))


def test_a_token_count_within_one_per_cent_is_compared(nine: list[Path]) -> None:
    a, b = load_run(nine[0]), load_run(nine[3])
    near = b._replace(train=tuple(p._replace(tokens=round(0.995 * p.tokens)) for p in b.train))
    summary = summarise([a, near])
    assert summary.refusal is None
    assert any("489,062 to 491,520 tokens" in sentence for sentence in summary.sentences)


def test_unequal_seeds_configs_versions_and_devices_are_flagged(nine: list[Path]) -> None:
    runs = [load_run(f) for f in nine[:5]]  # static lacks seed 2
    summary = summarise(runs)
    assert summary.differences[0].seeds == (0, 1)
    assert any("different seeds" in warning for warning in summary.warnings)
    assert summarise([load_run(f) for f in nine]).warnings == ()
    config = {**runs[0].config, "model": {"name": "large"}}
    odd = runs[0]._replace(config=config, versions={"jax": "0.9"}, device="tpu")
    told = " ".join(summarise([odd, *runs[1:]]).warnings)
    assert "model.name" in told and "versions of jax: 0.10.2, 0.9" in told and "tpu" in told
