"""A search finds the bottom of a bowl, trains nothing twice, and writes what `dh train` takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.config import (
    InfluenceConfig,
    MeshConfig,
    MixingConfig,
    TrainingConfig,
    load_data_config,
    weights_of,
)
from dh_jax.errors import ConfigError, DataError, StateError
from dh_jax.mixing import regmix
from dh_jax.mixing.doremi import average_weights, doremi
from dh_jax.mixing.policy import Observation
from dh_jax.search import SearchConfig, SearchRunConfig, find_weights, plan_of, write_search_report
from dh_jax.search import proxies as trained
from dh_jax.search.find import judge, warning_of
from dh_jax.search.page import headline
from dh_jax.search.proxies import Proxy, Result, run_config
from dh_jax.search.written import round_weights, write_data_config

NAMES = ("code", "mail", "sums")
BEST = np.array([0.2, 0.1, 0.7])


@pytest.fixture
def make_search(make_config: Any, tmp_path: Path) -> Any:
    def make(**fields: Any) -> SearchRunConfig:
        search = {"proxies": 40, "candidates": 5_000, "top": 25} | fields.pop("search", {})
        return SearchRunConfig(
            **{
                "data": make_config(),
                "influence": InfluenceConfig(targets={"sums": 1.0}),
                "training": TrainingConfig(steps=7, eval_interval=2, tensorboard=True),
                "search": SearchConfig(**search),
                "out": str(tmp_path / "search"),
            }
            | fields
        )

    return make


class Bowl:
    """Stands in for training: the loss on ``sums`` is a bowl in the weights, others are flat."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, dies_at: int | None = None):
        self.ran: list[str] = []
        self.dies_at = dies_at
        monkeypatch.setattr(trained, "_in_processes", self._run)

    def _run(
        self, config: SearchRunConfig, proxies: list[Proxy], workers: int
    ) -> Iterator[tuple[str, Result]]:
        for proxy in reversed(proxies):  # they finish in any order
            if len(self.ran) == self.dies_at:
                raise KeyboardInterrupt
            self.ran.append(proxy.name)
            w = np.array([proxy.weights[name] for name in NAMES])
            losses = {"code": 1.0, "mail": 2.0, "sums": 3 + float(np.square(w - BEST).sum())}
            moves = [dict(zip(NAMES, x, strict=True)) for x in ([0.2, 0.2, 0.6], [0.4, 0.0, 0.6])]
            result = Result(proxy.name, proxy.weights, moves, losses)
            path = Path(config.out) / "results" / f"{proxy.name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"version": trained.VERSION, **result._asdict()}))
            yield proxy.name, result


def test_regmix_finds_the_best_mixture_and_writes_it(
    make_search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bowl, config, told = Bowl(monkeypatch), make_search(), []
    finding = find_weights(config, lambda *progress: told.append(progress))
    np.testing.assert_allclose([finding.weights[name] for name in NAMES], BEST, atol=0.06)
    assert finding.fit is not None and finding.fit.rank_correlation > 0.99
    assert finding.fit.error < 0.05 * finding.fit.spread
    assert finding.measured is not None and finding.predicted is not None
    assert finding.measured["found"] == pytest.approx(3, abs=0.01)
    assert finding.predicted["found"] == pytest.approx(finding.measured["found"], abs=0.01)
    assert len(bowl.ran) == len(set(bowl.ran)) == 42 and told[-1] == (42, 42)
    written = load_data_config(Path(config.out) / "data.yaml")
    assert weights_of(written.sources) == round_weights(finding.weights)
    assert written.sources["code"].paths == config.data.sources["code"].paths
    assert warning_of(finding) is None
    worse = finding._replace(measured={"found": 8.0, "configured": 6.5})
    remark = warning_of(worse)
    assert remark is not None and "lost 8.000 nats a token, with those configured 6.500" in remark
    write_data_config(config.data, finding.weights, "regmix", Path(config.out) / "w.yaml", remark)
    assert f"# {remark}" in (Path(config.out) / "w.yaml").read_text()
    load_data_config(Path(config.out) / "w.yaml")
    far = finding._replace(predicted={"found": 2.0, "configured": 6.5})
    remark = warning_of(far)
    assert remark is not None and "ended 1.000 nats from what the fit predicted" in remark
    corner = dict(zip(NAMES, np.eye(len(NAMES))[0].tolist(), strict=True))
    tried = [dict.fromkeys(NAMES, 1 / len(NAMES))]
    remark = warning_of(far._replace(weights=corner, tried=tried))
    assert remark is not None and f"they give {NAMES[0]} 1.00, no proxy more than" in remark


def test_proxies_that_finished_before_a_kill_are_not_trained_again(
    make_search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Bowl(monkeypatch)
    want = find_weights(make_search(out=make_search().out + "-whole"))
    killed = Bowl(monkeypatch, dies_at=11)
    with pytest.raises(KeyboardInterrupt):
        find_weights(make_search())
    with pytest.raises(ConfigError, match="already holds a search; add resume=true"):
        find_weights(make_search())
    with pytest.raises(StateError, match=r"search.proxies .was 40, now 41"):
        find_weights(make_search(resume=True, search={"proxies": 41}))
    rest = Bowl(monkeypatch)
    again = find_weights(make_search(resume=True, search={"processes": 2}))
    assert again == want and sorted(killed.ran + rest.ran) == sorted(whole.ran)
    nothing = Bowl(monkeypatch)
    assert find_weights(make_search(resume=True)) == want and not nothing.ran


def test_a_result_that_is_broken_or_of_other_weights_is_refused(
    make_search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bowl(monkeypatch)
    config = make_search()
    find_weights(config)
    path = Path(config.out) / "results" / "003.json"
    whole = path.read_text()
    path.write_text(whole[:50])
    with pytest.raises(DataError, match=r"003.json: no result of a proxy.*delete it"):
        find_weights(make_search(resume=True))
    path.write_text(whole.replace('"weights": {"code"', '"weights": {"coed"', 1))
    with pytest.raises(DataError, match=r"003.json is of other weights"):
        find_weights(make_search(resume=True))


def test_doremi_averages_its_proxys_weights_and_begins_the_next_round_with_them(
    make_search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bowl = Bowl(monkeypatch)
    config = make_search(search={"method": "doremi", "rounds": 2})
    finding = find_weights(config)
    assert bowl.ran[:4] == ["reference-1", "proxy-1", "reference-2", "proxy-2"]
    assert sorted(bowl.ran[4:]) == ["configured", "found"]
    assert finding.weights == pytest.approx({"code": 0.3, "mail": 0.1, "sums": 0.6})
    second = json.loads((Path(config.out) / "results" / "reference-2.json").read_text())
    assert second["weights"] == pytest.approx(finding.weights)
    assert finding.excess == dict.fromkeys(NAMES, 0.0) and finding.fit is None


def test_a_proxy_is_a_run_of_these_weights_judged_once_on_the_probes(make_search: Any) -> None:
    proxy = Proxy("007", {"code": 0.1, "mail": 0.2, "sums": 0.7})
    run = run_config(make_search(), proxy)
    assert weights_of(run.data.sources) == proxy.weights and run.mixing.policy == "static"
    assert run.out.endswith("search/proxies/007") and run.resume
    training = run.training
    assert (training.eval_interval, training.eval_split) == (7, "probe")
    assert not training.tensorboard


def test_the_fit_is_judged_on_what_it_has_not_seen() -> None:
    rng = np.random.default_rng(0)
    tried = rng.dirichlet(np.ones(4), 30)
    noise = rng.normal(size=30)  # nothing to learn: no prediction beats the mean
    fit = judge(noise, regmix.fit(tried, noise))
    assert fit.error > 0.9 * fit.spread and fit.rank_correlation < 0.5
    assert fit.error == pytest.approx(
        np.sqrt(np.mean(np.square(np.subtract(fit.measured_N, fit.left_out_N))))
    )


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [[1 / 3] * 3, [0.9999996, 2e-7, 2e-7], [0.1234567] * 3])
def test_written_weights_sum_to_one(raw: list[float]) -> None:
    weights = dict(zip(NAMES, np.array(raw) / sum(raw), strict=True))
    rounded = round_weights(weights)
    assert sum(rounded.values()) == pytest.approx(1, abs=1e-9)
    assert rounded == pytest.approx(weights, abs=2e-6)


def test_secrets_are_not_written_down(make_config: Any, tmp_path: Path) -> None:
    data = make_config()
    data.sources["mail"].storage_options = {"key": "hunter2"}
    write_data_config(data, dict.fromkeys(NAMES, 1 / 3), "regmix", tmp_path / "data.yaml")
    text = (tmp_path / "data.yaml").read_text()
    assert "hunter2" not in text and "storage_options of mail are not written" in text
    data.sources["mail"].storage_options = {}


def test_the_report_says_what_was_found_and_escapes_names(
    make_search: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Bowl(monkeypatch)
    config = make_search()
    finding = find_weights(config)
    config.data.name = "<b>bold</b>"
    write_search_report(config, finding, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page
    assert f"RegMix gives sums the most, {100 * finding.weights['sums']:.1f}" in page
    assert "42 small runs" in page and "leave-one-out error" in page and "missed by" in page
    assert plan_of(config).startswith("42 small runs: 40 proxies, then one with the configured")
    assert page.count("<svg") == 4 and not re.search(r"(src|href)=.https?:", page)
    alone = finding._replace(weights={name: float(name == "sums") for name in finding.weights})
    assert headline(alone).startswith("RegMix gives sums all of the mixture; ")
    worthless = finding._replace(fit=finding.fit._replace(error=1.0, spread=1.0))
    write_search_report(config, worthless, tmp_path / "report.html")
    assert "do not trust these weights" in (tmp_path / "report.html").read_text()


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"search": {"method": "regmixx"}}, "'regmixx' .did you mean 'regmix'"),
        ({"search": {"proxies": 2}}, "search.proxies is 2; the least is 3"),
        ({"search": {"candidates": 25}}, "search.candidates is 25; the least is 26"),
        ({"search": {"processes": 0}}, "search.processes is 0"),
        ({"search": {"method": "doremi", "rounds": 0}}, "search.rounds is 0"),
        ({"mesh": MeshConfig(processes=2)}, "set search.processes"),
        ({"influence": InfluenceConfig(targets={"sumz": 1.0})}, "'sumz' .did you mean 'sums'"),
        ({"training": TrainingConfig(eval_split="test")}, "training.eval_split is 'test'"),
    ],
)
def test_impossible_searches_are_refused(
    fields: dict[str, Any], message: str, make_search: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_weights(make_search(**fields))


def test_a_source_without_weight_or_company_is_refused(make_search: Any, make_config: Any) -> None:
    def sources(**weights: float) -> dict[str, Any]:
        return {n: {"kind": "files", "paths": ["x"], "weight": w} for n, w in weights.items()}

    zero = make_config(sources=sources(code=0.5, mail=0.5, sums=0.0))
    with pytest.raises(ConfigError, match="weight of source 'sums' is 0"):
        find_weights(make_search(data=zero))
    alone = make_config(sources=sources(sums=1.0))
    with pytest.raises(ConfigError, match="has one source"):
        find_weights(make_search(data=alone, out=make_search().out + "-alone"))


def test_a_probe_that_holds_nothing_is_named(
    make_search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bowl(monkeypatch)
    monkeypatch.setattr(np, "square", lambda x: np.full(3, np.nan))
    with pytest.raises(DataError, match=r"proxy 0..: the loss of probe 'sums' is nan"):
        find_weights(make_search())


@pytest.mark.parametrize(
    "losses",
    [[[1.0, 1.0]] * 8 + [[4.0, 1.0]] * 2, [[40.0, 1.0]] * 8 + [[1.0, 4.0]] * 2],
    ids=["still", "saturated"],
)
def test_a_move_that_left_weights_as_they_were_counts_in_the_mean(losses: Any) -> None:
    """Against DoReMi's own mean over all of its moves."""
    names = ("code", "mail")
    mixing = MixingConfig(policy="doremi", interval=1)
    policy = doremi([2.0, 2.0])
    weights_M = policy.start(jnp.array([0.3, 0.7]))
    state = policy.init(weights_M)

    def named(weights_M: Any) -> dict[str, float]:
        return dict(zip(names, np.asarray(weights_M, float).tolist(), strict=True))

    records = [{"kind": "train", "step": 1, "weights": named(weights_M)}]
    for step, loss_M in enumerate(losses, 1):
        observation = Observation(
            jnp.int32(step), weights_M, loss_M=jnp.array(loss_M), tokens_M=jnp.ones(2)
        )
        new_M, state = policy.update(observation, state)
        if (new_M != weights_M).any():  # as `dh_jax.steering.move_weights` logs
            records.append({"kind": "reweight", "step": step, "weights": named(new_M)})
        weights_M = new_M
    assert len(records) < 1 + len(losses)
    moves = trained.weights_after_moves(records, mixing, len(losses))
    got = average_weights([list(move.values()) for move in moves])
    np.testing.assert_allclose(got, state.mean_M, atol=1e-6)
    later = trained.weights_after_moves(records, MixingConfig("doremi", interval=4, warmup=2), 10)
    assert later == [moves[1], moves[5], moves[9]]
    assert trained.weights_after_moves(records, MixingConfig(), 10) == []
