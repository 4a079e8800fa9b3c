"""The steering optimizer: the wrapped one in all that torch asks, and the house's own moves."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

from dh_jax.config import MixingConfig, ModelConfig  # noqa: E402
from dh_jax.errors import StateError  # noqa: E402
from dh_jax.influence import optimizer as house  # noqa: E402
from dh_jax.influence.calculator import DataInfCalculator  # noqa: E402
from dh_jax.mixing.registry import make_policy  # noqa: E402
from dh_jax.models import decoder  # noqa: E402
from dh_jax.models.pretrained import load_pretrained  # noqa: E402
from dh_torch_bridge.data import get_loader  # noqa: E402
from dh_torch_bridge.distributed.checkpoint import Checkpoints  # noqa: E402
from dh_torch_bridge.optimizer import InfluenceAwareOptimizer  # noqa: E402
from dh_torch_bridge.runstate import restore_run, save_run  # noqa: E402
from dh_torch_bridge.train import build_llama  # noqa: E402
from tests.dh_torch_bridge.test_influence import SHAPE, rows  # noqa: E402

NAMES = ["code", "mail", "sums"]


@pytest.fixture
def loader(make_config: Any, store: Any) -> Any:
    with get_loader(make_config(store=str(store)), batch_size=4, prefetch=2) as loader:
        yield loader


def make(loader: Any, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    optimizer = InfluenceAwareOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.1), policy("doremi"), loader,
        interval=2, **options,
    )  # fmt: skip
    return model, optimizer


def policy(name: str) -> Any:
    reference = dict.fromkeys(NAMES, 0.0) if name == "doremi" else {}
    return make_policy(MixingConfig(policy=name, reference=reference), NAMES, None)


def learn(model: Any, optimizer: Any, loader: Any, scaler: Any = None) -> None:
    batch = next(loader)
    loss = model(torch.ones(4, 6)).square().sum()
    (loss if scaler is None else scaler.scale(loss)).backward()
    per_token = batch["source_ids"][:, None].float() + torch.zeros(batch["input_ids"].shape)
    optimizer.observe(per_token, batch)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def test_it_is_the_wrapped_optimizer_in_all_that_torch_asks(loader: Any) -> None:
    model, optimizer = make(loader)
    torch.manual_seed(0)
    plain_model = torch.nn.Linear(6, 3)
    plain = torch.optim.AdamW(plain_model.parameters(), lr=0.1)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(x, 0.3, total_steps=20) for x in (optimizer, plain)
    ]
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        learn(model, optimizer, loader, scaler if step % 2 else None)
        plain_model(torch.ones(4, 6)).square().sum().backward()
        plain.step()
        plain.zero_grad()
        for schedule in schedules:
            schedule.step()
        assert torch.equal(model.weight, plain_model.weight)
    assert isinstance(optimizer, torch.optim.Optimizer) and len(calls) == 6
    assert optimizer.param_groups is optimizer.inner.param_groups
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1.0})
    assert [g["lr"] for g in optimizer.inner.param_groups][1] == 1.0
    # An overflow skips the step, and so the move.
    before = optimizer.steering_state()
    scaler.scale(model(torch.full((4, 6), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.steering_state() == before


def test_weights_move_and_go_on_after_a_restart(loader: Any, tmp_path: Any) -> None:
    model, optimizer = make(loader)
    start = dict(loader.weights)
    learn(model, optimizer, loader)
    assert loader.weights == start
    learn(model, optimizer, loader)
    moved = dict(loader.weights)
    # DoReMi goes where losses are highest, and these rise with the number of the source.
    assert moved["sums"] > moved["mail"] > moved["code"]
    with Checkpoints(tmp_path) as checkpoints:
        state = json.loads(json.dumps(optimizer.steering_state()))
        save_run(checkpoints, 2, model, optimizer, loader, steering=state)
        for _ in range(4):
            learn(model, optimizer, loader)
        expected = model.weight.clone(), dict(loader.weights), optimizer.state_dict()
        again, fresh = make(loader)
        restored = restore_run(checkpoints, again, fresh, loader)
    assert restored is not None and loader.weights == moved
    fresh.load_steering_state(restored.host["steering"])
    for _ in range(4):
        learn(again, fresh, loader)
    assert torch.equal(again.weight, expected[0]) and loader.weights == expected[1]
    assert fresh.state_dict()["steering"] == expected[2]["steering"]
    other, third = make(loader)
    third.load_state_dict(expected[2])
    assert third.steering_state() == fresh.steering_state()
    third.load_state_dict(torch.optim.AdamW(other.parameters()).state_dict())  # a plain one's
    assert third.steering_state() == fresh.steering_state() and third.state is third.inner.state
    with pytest.raises(StateError, match="another policy or other sources"):
        third.load_steering_state([1.0])


@pytest.mark.slow
def test_moves_by_influence_are_those_of_jax(loader: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = build_llama(SHAPE, 128)
    model.save_pretrained(tmp_path)
    twin = build_llama(SHAPE, 128)  # of other numbers until it is filled
    read = load_pretrained(tmp_path, ModelConfig())
    sources = {name: rows(i) for i, name in enumerate(NAMES)}
    probes = {"mail": rows(9)}
    seen: list[Any] = []
    optimizer = InfluenceAwareOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), policy("influence"), loader, model,
        lambda split: sources if split == "train" else probes,
        twin=twin, interval=3, probe_names=["mail"], on_move=seen.append,
    )  # fmt: skip
    start = [loader.weights[name] for name in NAMES]
    for _ in range(3):
        optimizer.step()
    theirs = house.InfluenceAwareOptimizer(
        optax.identity(), policy("influence"), DataInfCalculator(decoder.loss_fn(read.graph)),
        source_names=NAMES, weights=start, interval=3, probe_names=["mail"],
    )  # fmt: skip
    _, move = theirs.reweight(read.params, theirs.init({}), sources, probes)
    (ours,) = seen
    assert ours.step == 3 and ours.coverage == 1.0
    np.testing.assert_allclose(
        ours.influence_M, move.influence_M, atol=1e-5 * np.abs(move.influence_M).max()
    )
    np.testing.assert_allclose(ours.weights_M, move.weights_M, atol=1e-5)
    np.testing.assert_allclose([loader.weights[n] for n in NAMES], ours.weights_M, atol=1e-6)
