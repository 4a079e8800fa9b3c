"""Influence of torch models against JAX's own for the same weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dh_jax.batch import Batch  # noqa: E402
from dh_jax.config import ModelConfig  # noqa: E402
from dh_jax.errors import ConfigError  # noqa: E402
from dh_jax.influence.calculator import DataInfCalculator  # noqa: E402
from dh_jax.influence.estimator import score  # noqa: E402
from dh_jax.influence.first_order import gradient_cosine, gradient_dot  # noqa: E402
from dh_jax.influence.objective import Objective, Scope  # noqa: E402
from dh_jax.influence.taps import complete_layers  # noqa: E402
from dh_jax.models import decoder  # noqa: E402
from dh_jax.models.pretrained import load_pretrained  # noqa: E402
from dh_torch_bridge.influence import fill_twin, torch_objective, torch_params  # noqa: E402
from dh_torch_bridge.train import build_llama  # noqa: E402

KEY = jax.random.key(0)
# SmolLM2's proportions: 3 query heads a key-value head, tied, feed-forward 8/3 of the width.
SHAPE = ModelConfig(width=48, layers=1, heads=3, kv_heads=1, mlp_width=128, tied=True)


class Pair(NamedTuple):
    torch_model: Any
    params: Any
    loss: Any


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.manual_seed(0)
    model = build_llama(SHAPE, 128)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    read = load_pretrained(folder, ModelConfig())
    return Pair(model, read.params, decoder.loss_fn(read.graph))


def rows(seed: int, count: int = 3) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = (7, 5, 12)
    segments = np.repeat([1, 2, 3], lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    shape = (count, sum(lengths))
    mask = rng.random(shape) < 0.8
    return Batch(
        *(rng.integers(0, 128, shape).astype(np.int32) for _ in range(2)),
        mask,
        np.tile(segments, (count, 1)).astype(np.int32),
        np.tile(positions, (count, 1)).astype(np.int32),
        np.zeros(count, np.int32),
    )


@pytest.mark.slow
def test_datainf_of_rows_is_that_of_jax(pair: Pair) -> None:
    train, probe = rows(1, 4), rows(2)
    found = []
    for loss, params in (
        (pair.loss, pair.params),
        (torch_objective(pair.torch_model).loss, torch_params(pair.torch_model)),
    ):
        calculator = DataInfCalculator(loss, chunk=2)
        assert calculator.coverage(params) == 1.0
        state = calculator.fit(params, train, KEY)
        v = calculator.probe_gradient(params, probe, KEY)
        q = calculator.precondition(state, v)
        found.append(np.asarray(calculator.score_fitted(state, q)))
    theirs, ours = found
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [gradient_dot, gradient_cosine])
def test_documents_by_taps_are_those_of_jax(estimator: Any, pair: Pair) -> None:
    plain, ours = Objective(loss=pair.loss), torch_objective(pair.torch_model)
    scores = []
    for objective, params, kernels in (
        (plain, pair.params, "kernel$"),
        (ours, torch_params(pair.torch_model), "_proj.weight$"),
    ):
        scope = Scope(parameters=kernels, max_segments=3, chunk=2)
        with pytest.warns(UserWarning, match="of the parameters"):
            method = estimator(objective, scope)
            state = method.fit(params, [rows(1)], KEY)
        found = score(method, params, state, [rows(2, 1)], [rows(1)], KEY)
        scores.append(found.values_KN)
    assert scores[0].shape == (3, 9)
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5, atol=1e-5 * np.abs(scores[0]).max())


def test_taps_are_the_whole_gradient_of_every_tapped_layer(pair: Pair) -> None:
    model = pair.torch_model
    objective = torch_objective(model)
    _, wrong = complete_layers(objective, torch_params(model), rows(3, 2), KEY, 1e-4)
    assert wrong == {}
    assert objective.layers is not None
    assert len(objective.layers) == 7  # the tied table is not among them
    untied = build_llama(ModelConfig(**{**SHAPE.__dict__, "tied": False}), 128)
    layers = torch_objective(untied).layers
    assert layers is not None and "model.embed_tokens" in layers and "lm_head" not in layers


def test_the_model_is_left_as_it_was(pair: Pair) -> None:
    model = pair.torch_model.train()
    model.model.layers[0].eval()  # by its owner
    before = {name: x.clone() for name, x in model.state_dict().items()}
    calculator = DataInfCalculator(torch_objective(model).loss)
    calculator.probe_gradient(torch_params(model), rows(4), KEY)
    assert model.training and not model.model.layers[0].training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    twin = build_llama(SHAPE, 128)
    fill_twin(twin, model)
    assert all(torch.equal(x, before[name]) for name, x in twin.state_dict().items())


def test_what_cannot_be_measured_is_named(pair: Pair) -> None:
    with pytest.raises(ConfigError, match="'nothing' matches none that is trained"):
        torch_params(pair.torch_model, "nothing")
    shared = torch.nn.Linear(4, 4)

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = shared

        def forward(self, x: Any) -> Any:
            return self.layer(self.layer(x))

    model = Twice()
    objective = torch_objective(model, lambda m, b: m(b["input_ids"][..., None].expand(
        -1, -1, 4).float()).sum(-1))  # fmt: skip
    assert objective.tapped is not None and objective.zero_taps is not None
    taps = objective.zero_taps({}, rows(1))
    with pytest.raises(Exception, match="layer is called twice in a pass"):
        objective.tapped({}, taps, rows(1), KEY)
