"""Every policy by name moves the weights of a real run; a move that fails loses nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from omegaconf import OmegaConf

from dh_jax import train as training
from dh_jax.config import (
    InfluenceConfig,
    MeshConfig,
    MixingConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    TrainingConfig,
    config_folder,
    typed,
)
from dh_jax.data.store import open_store
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distributed.mesh import make_mesh
from dh_jax.errors import ConfigError, DataError
from dh_jax.influence.optimizer import InfluenceAwareOptimizer
from dh_jax.mixing.pace import next_pace
from dh_jax.mixing.policy import Policy, as_configured, uniform
from dh_jax.mixing.registry import MOVING, PLANNED
from dh_jax.sampling import Samplers

STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def shared_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs that differ in their policy compile the same model: once is enough."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def make_run(make_config: Any, store: Path) -> Any:
    def make(out: Path, mixing: MixingConfig, **changes: Any) -> RunConfig:
        fields = {"steps": STEPS, "batch_size": 4, "eval_interval": STEPS, "eval_rows": 2,
                  "checkpoint_interval": 5}  # fmt: skip
        return RunConfig(
            data=make_config(store=str(store), prefetch=0),
            model=ModelConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=16),
            mixing=mixing,
            influence=InfluenceConfig(
                targets={"sums": 1.0}, rows_per_source=2, probe_rows=2, row_length=32
            ),
            training=TrainingConfig(**fields),
            out=str(out),
            **changes,
        )

    return make


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.slow
def test_a_steered_run_compiles_nothing_behind_its_second_step(
    make_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training, moves, evaluation and checkpoints, each twice behind step 2."""
    config = make_run(tmp_path / "run", MixingConfig(policy="influence", interval=2))
    config.training.steps, config.training.eval_interval = 6, 2
    config.training.checkpoint_interval = 1  # that of step 2 is written before its evaluation ends
    compiled: dict[tuple[int, str], list[str]] = {}

    def note(record: dict[str, Any]) -> None:
        names = [m for m in caplog.messages if m.startswith("Finished XLA compilation")]
        compiled[record["step"], record["kind"]] = names

    with jax.log_compiles(), caplog.at_level("WARNING"):
        training.train(config, listeners=(note,))
        note({"step": 6, "kind": "end"})
    assert {kind for _, kind in compiled} == {"train", "reweight", "eval", "end"}
    until = len(compiled[2, "eval"])
    assert any("jit(step)" in message for message in compiled[1, "train"])
    assert len(compiled[2, "reweight"]) > len(compiled[2, "train"]) > 0
    assert compiled[6, "end"][until:] == []


@pytest.fixture(scope="module")
def reference(make_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, as DoReMi asks for."""
    out: Path = tmp_path_factory.mktemp("reference") / "run"
    training.train(make_run(out, MixingConfig()))
    return out


CHANGES: dict[str, dict[str, Any]] = {  # to the shipped configs, so that twelve steps show moves
    "schedule": {"stages": [{"step": 4, "weights": {"mail": 0.9, "sums": 0.1}}]},
    "odm": {"interval": 1},
    "ado": {"interval": 1},
    "aioli": {"interval": 2, "hold": 2},
}


def some_slow(names: Iterable[str], quick: set[str]) -> list[Any]:
    """What the quick ones of every kind leave out is for `make slow`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


QUICK = {"schedule", "temperature", "aioli"}


@pytest.mark.parametrize("name", some_slow([*PLANNED, *MOVING], QUICK))
def test_every_policy_steers_a_run_by_its_name(
    name: str, make_run: Any, reference: Path, tmp_path: Path
) -> None:
    shipped = OmegaConf.load(config_folder() / "mixing" / f"{name}.yaml")
    fields = {"interval": 4} | CHANGES.get(name, {})
    if name == "doremi":
        fields |= {"interval": 1, "reference_run": str(reference)}
    mixing = typed(MixingConfig, OmegaConf.merge(shipped, fields))
    out = tmp_path / "run"
    assert training.train(make_run(out, mixing))["status"] == "finished"
    first, *_, last = (record["weights"] for record in records(out, "train"))
    assert sum(first.values()) == pytest.approx(1, abs=1e-5)
    moves = records(out, "reweight")
    if name in ("static", "uniform", "temperature", "proportional"):
        assert not moves and first == last
        configured = {"code": 0.5, "mail": 0.2, "sums": 0.3}
        assert (first == pytest.approx(configured, abs=1e-6)) == (name == "static")
        return
    assert moves
    for move in moves:
        assert sum(move["weights"].values()) == pytest.approx(1, abs=1e-5)
        if name in MOVING:
            assert min(move["weights"].values()) >= mixing.min_weight - 1e-6
    assert moves[-1]["weights"] != first
    assert ("influence" in moves[0]) == (
        name in ("influence", "group_influence", "influence_share")
    )
    assert ("alignment" in moves[0]) == (name in ("alignment", "doge"))
    if name == "schedule":
        assert moves[0]["step"] == 4 and moves[0]["weights"]["mail"] == pytest.approx(0.9)
    if name == "doremi":
        saved = OmegaConf.load(out / "config.yaml").mixing
        held_out = records(reference, "eval")[-1]["domains"]
        assert dict(saved.reference) == {n: d["loss"] for n, d in held_out.items()}


def test_proportional_weights_are_the_stores_tokens(
    make_run: Any, store: Path, tmp_path: Path
) -> None:
    training.train(make_run(tmp_path / "run", MixingConfig(policy="proportional")))
    weights = records(tmp_path / "run", "train")[0]["weights"]
    prepared = open_store(store)
    tokens = {name: prepared.total(name, "train", "tokens") for name in weights}
    total = sum(tokens.values())
    assert weights == pytest.approx({n: t / total for n, t in tokens.items()}, rel=1e-5)


@pytest.mark.parametrize("name", some_slow(["schedule", *MOVING], {"aioli"}))
def test_a_run_resumed_midway_moves_its_weights_alike(
    name: str, make_run: Any, tmp_path: Path
) -> None:
    mixing = MixingConfig(
        policy=name, interval=2, hold=1, smoothing=0.9, exploration=0.25,
        reference={"code": 5.0, "mail": 5.5, "sums": 5.2} if name == "doremi" else {},
        stages=[StageConfig(6, {"mail": 0.9, "sums": 0.1})], interpolate=True,
    )  # fmt: skip
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    training.train(make_run(whole, mixing))

    def stop(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == 8:
            raise InterruptedError

    with pytest.raises(InterruptedError):  # killed between two checkpoints
        training.train(make_run(halved, mixing), listeners=(stop,))
    training.train(make_run(halved, mixing, resume=True))
    assert (halved / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


# --- a budget ------------------------------------------------------------------------------------


def rotating(config: MixingConfig, names: Any, sizes: Any = None) -> Policy:
    """A policy that needs nothing and always moves."""
    roll = lambda o, s: (jnp.roll(o.weights_M, 1), s)  # noqa: E731
    return Policy(as_configured, lambda w: jnp.zeros((), jnp.int32), roll)


def test_a_budget_decides_by_the_clock_once_and_a_resumption_by_the_log(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    times_as_slow = 1.0

    def spy(budget: Any, pace: Any, step: int, move: float, of_step: float) -> Any:
        asked.append(step)
        return next_pace(budget, pace, step, times_as_slow * move, of_step)

    ticks = itertools.count()
    monkeypatch.setattr(training, "make_policy", rotating)
    monkeypatch.setattr("dh_jax.influence.optimizer.next_pace", spy)
    monkeypatch.setattr("dh_jax.runlog.time.perf_counter", lambda: float(next(ticks)))
    out = tmp_path / "run"
    mixing = MixingConfig(policy="influence", interval=1, budget=0.5)

    def stop(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == 9:
            raise InterruptedError

    with pytest.raises(InterruptedError):  # behind the checkpoint of step 5
        training.train(make_run(out, mixing), listeners=(stop,))
    # The first move is compiled and counts nothing; each of the others takes as long as a step.
    assert asked == [1, 2, 4, 6, 8]
    before = records(out, "pace"), records(out, "train")
    assert [x["due"] for x in before[0]] == [2, 4, 6, 8, 10]
    assert [x["spent"] for x in before[0]] == [0, 1, 2, 3, 4]
    asked.clear()
    times_as_slow = 4.0
    training.train(make_run(out, mixing, resume=True))
    assert asked == [10]  # those of steps 6 and 8 stand in the log
    after = records(out, "pace"), records(out, "train")
    assert after[0][:5] == before[0] and after[1][:9] == before[1]
    assert after[0][5]["due"] == 21 and after[1][10]["weights"] != after[1][9]["weights"]
    assert [x["step"] for x in records(out, "reweight")] == [1, 2, 4, 6, 8, 10]


def test_samples_are_halved_as_far_as_the_mesh_can_split_them(
    make_run: Any, tmp_path: Path
) -> None:
    config = make_run(tmp_path, MixingConfig(policy="influence"))
    config.influence.probe_rows = 5
    tokenizer = TokenizerWrapper.load(config.data.tokenizer)
    with Samplers(config.data, config.influence, tokenizer, make_mesh(config.mesh), seed=0) as s:
        assert s.halvings == 2
        assert {len(b.tokens_BT) for b in s.draw("train", 1).values()} == {1}
        assert [len(s.draw("probe", k)["sums"].tokens_BT) for k in (0, 1, 2, 9)] == [5, 2, 1, 1]
    two = make_mesh(MeshConfig(data=2))
    config.influence.probe_rows = 8
    with Samplers(config.data, config.influence, tokenizer, two, seed=0) as s:
        assert s.halvings == 2
        assert [len(s.draw("probe", k)["sums"].tokens_BT) for k in (0, 1, 2, 9)] == [8, 4, 2, 2]


def test_with_a_budget_the_state_says_when_a_move_is_due() -> None:
    optimizer = InfluenceAwareOptimizer(
        optax.sgd(0.1), uniform(), source_names=("a", "b"), weights=[0.5, 0.5], interval=3,
        budget=0.1,
    )  # fmt: skip
    state = optimizer.init({"w": jnp.ones(2)})
    assert [optimizer.due(step, state) for step in (2, 3, 4)] == [False, True, True]
    with pytest.raises(ConfigError, match="the state says when a move is due"):
        optimizer.due(3)
    later = optimizer.spent(state._replace(step=jnp.int32(3)), 2.0, 1.0)
    assert not optimizer.due(39, later) and optimizer.due(40, later)
    without = optimizer_of(uniform())
    state = without.init({"w": jnp.ones(2)})
    assert without.spent(state, 2.0, 1.0) is state and not without.halvings(state)


# --- moves that fail -----------------------------------------------------------------------------


def broken(config: MixingConfig, names: Any, sizes: Any = None) -> Policy:
    """A policy that gives NaN for the second source at step 8."""

    def update(observation: Any, state: Any) -> Any:
        bad = jnp.where(jnp.arange(3) == 1, jnp.nan, observation.weights_M[::-1])
        return jnp.where(observation.step == 8, bad, observation.weights_M[::-1]), state + 1

    return Policy(as_configured, lambda w: jnp.zeros((), jnp.int32), update)


def test_a_policy_that_gives_nan_stops_the_run_at_a_checkpoint(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "make_policy", broken)
    out = tmp_path / "run"
    config = make_run(out, MixingConfig(interval=4))
    with pytest.raises(DataError, match=r"no mixture for source 'mail' \(nan\).*step 8 is saved"):
        training.train(config)
    assert (out / "checkpoints" / "8").is_dir()
    last = records(out, "train")[-1]
    assert last["step"] == 8
    config.resume = True  # with the policy mended, say
    assert training.train(config)["status"] == "finished"
    steps = [record["step"] for record in records(out, "train")]
    assert steps == list(range(1, STEPS + 1))
    assert records(out, "train")[8]["weights"] == records(out, "train")[7]["weights"]


def test_a_run_whose_last_move_fails_is_judged_all_the_same(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "make_policy", broken)
    config = make_run(tmp_path / "run", MixingConfig(interval=4))
    config.training.steps = config.training.eval_interval = 8
    with pytest.raises(DataError, match="step 8 is saved"):
        training.train(config)
    config.resume = True
    assert training.train(config)["status"] == "finished"
    assert [record["step"] for record in records(tmp_path / "run", "eval")] == [0, 8]


def test_or_keeps_the_last_weights_and_says_so(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "make_policy", broken)
    out = tmp_path / "run"
    training.train(make_run(out, MixingConfig(interval=4, on_failure="keep")))
    moves = records(out, "reweight")
    assert [move["step"] for move in moves] == [4, 8, 12]
    assert "source 'mail' (nan)" in moves[1]["kept"]
    assert moves[1]["weights"] == moves[0]["weights"] != moves[2]["weights"]


def optimizer_of(policy: Policy) -> InfluenceAwareOptimizer:
    return InfluenceAwareOptimizer(
        optax.sgd(0.1), policy, source_names=("a", "b"), weights=[0.5, 0.5]
    )


def test_losses_are_means_since_the_last_move_and_must_have_been_observed() -> None:
    shown = []

    def update(observation: Any, state: Any) -> Any:
        shown.append(None)
        return observation.loss_M / observation.loss_M.sum(), observation

    needs = frozenset({"loss_M", "tokens_M"})
    optimizer = optimizer_of(Policy(as_configured, lambda w: (), update, needs))
    params = {"w": jnp.ones(2)}
    state = optimizer.init(params)
    with pytest.raises(DataError, match="call observe after every update"):
        optimizer.reweight(params, state)
    state = optimizer.observe(state, jnp.asarray([3.0, 0.0]), jnp.asarray([10.0, 0.0]))
    state = optimizer.observe(state, jnp.asarray([1.0, 4.0]), jnp.asarray([30.0, 20.0]))
    state, move = optimizer.reweight(params, state)
    np.testing.assert_allclose(move.weights_M, np.array([1.5, 4.0]) / 5.5, rtol=1e-6)
    np.testing.assert_array_equal(state.policy.tokens_M, [40, 20])
    # A batch without a target is no mistake of a config: `on_failure` decides.
    nothing = optimizer.observe(state, jnp.zeros(2), jnp.zeros(2))
    with pytest.raises(DataError, match="no target was observed"):
        optimizer.reweight(params, nothing)


def test_a_loss_that_is_not_finite_is_named_before_a_policy_can_spread_it() -> None:
    needs = frozenset({"loss_M", "tokens_M"})
    policy = Policy(as_configured, lambda w: (), lambda o, s: (o.weights_M, s), needs)
    optimizer = optimizer_of(policy)
    params = {"w": jnp.ones(2)}
    state = optimizer.init(params)
    state = optimizer.observe(state, jnp.asarray([1.0, jnp.inf]), jnp.asarray([5.0, 5.0]))
    with pytest.raises(DataError, match="loss of source 'b' is inf"):
        optimizer.reweight(params, state)


def test_weights_that_do_not_sum_to_one_are_refused() -> None:
    policy = uniform()._replace(update=lambda o, s: (o.weights_M * 1.5, s))
    optimizer = optimizer_of(policy)
    params = {"w": jnp.ones(2)}
    with pytest.raises(DataError, match=r"sum to 1.5, not 1"):
        optimizer.reweight(params, optimizer.init(params))


def test_a_reference_run_must_be_one(make_run: Any, reference: Path, tmp_path: Path) -> None:
    config = make_run(tmp_path, MixingConfig(policy="doremi", reference_run=str(tmp_path / "no")))
    with pytest.raises(DataError, match=r"metrics.jsonl: missing; mixing.reference_run names"):
        training.check(config)
    both = MixingConfig(policy="doremi", reference_run=str(reference), reference={"code": 1.0})
    with pytest.raises(ConfigError, match="both given"):
        training.check(make_run(tmp_path, both))
