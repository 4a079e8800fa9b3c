"""Inner products of gradients in pieces: what a policy sees of them is what JAX measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dh_jax.config import DistributedConfig, ModelConfig  # noqa: E402
from dh_jax.errors import ConfigError, DataError  # noqa: E402
from dh_jax.influence.calculator import DataInfCalculator  # noqa: E402
from dh_jax.influence.sources import measured  # noqa: E402
from dh_jax.models import decoder  # noqa: E402
from dh_jax.models.pretrained import load_pretrained  # noqa: E402
from dh_torch_bridge.distributed.parallelize import Parallel, parallelize  # noqa: E402
from dh_torch_bridge.pieces import measure_pieces, score_documents  # noqa: E402
from dh_torch_bridge.train import build_llama  # noqa: E402
from tests.dh_torch_bridge.launch import torchrun  # noqa: E402
from tests.dh_torch_bridge.test_influence import SHAPE, rows  # noqa: E402

NEEDS = frozenset({"influence_M", "alignment_M", "norm_M", "target_loss"})
TARGETS = {"b": 0.25, "a": 0.75}
KEY = jax.random.key(0)


def samples() -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of three sources, one row of them without a target, and of two probes."""
    sources = {name: rows(i) for i, name in enumerate(("first", "second", "third"))}
    mask_BT = sources["second"].loss_mask_BT.copy()
    mask_BT[1] = False
    sources["second"] = sources["second"]._replace(loss_mask_BT=mask_BT)
    return sources, {"a": rows(8), "b": rows(9), "unasked": rows(10)}


def llama() -> Any:
    torch.manual_seed(0)
    return build_llama(dataclasses.replace(SHAPE, width=16, heads=4, kv_heads=2), 128)


def close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys() == NEEDS
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, atol=2e-5 * np.abs(x).max(), err_msg=name)


def test_a_policy_sees_what_jax_measures(tmp_path: Path) -> None:
    model = parallelize(llama(), DistributedConfig())
    model.parts[0].save_pretrained(tmp_path)
    read = load_pretrained(tmp_path, ModelConfig())
    calculator = DataInfCalculator(decoder.loss_fn(read.graph))
    sources, probes = samples()
    theirs, _ = measured(calculator, read.params, KEY, NEEDS, sources, probes, TARGETS)
    waiting = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = waiting[name].clone()
    ours, coverage = measure_pieces(model)(NEEDS, sources, probes, TARGETS)
    close(ours, theirs)
    assert coverage == 1.0
    for name, parameter in model.named_parameters():  # as if nobody had measured
        assert parameter.grad is not None and torch.equal(parameter.grad, waiting[name])
    assert model.parts[0].training


def test_documents_of_packed_rows_are_scored_as_lone_ones(tmp_path: Path) -> None:
    model = parallelize(llama(), DistributedConfig())
    model.parts[0].save_pretrained(tmp_path)
    read = load_pretrained(tmp_path, ModelConfig())
    loss = decoder.loss_fn(read.graph)
    batch, query = samples()[0]["second"], rows(8)  # its second row learns nothing

    def flat(params: Any, weights_BT: Any, batch: Any) -> np.ndarray:
        found = jax.grad(lambda p: (loss(p, batch, KEY) * weights_BT).sum())(params)
        return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(found)])

    mask_BT = query.loss_mask_BT
    v = flat(read.params, mask_BT / mask_BT.sum(1, keepdims=True) / len(mask_BT), query)
    want, cosines = np.zeros((2, 3, 4))
    for b, s in np.ndindex(3, 3):
        weights_BT = np.zeros(batch.loss_mask_BT.shape)
        weights_BT[b] = batch.loss_mask_BT[b] & (batch.segment_ids_BT[b] == s + 1)
        g = flat(read.params, weights_BT, batch)
        want[b, s] = -g @ v
        cosines[b, s] = want[b, s] / max(np.linalg.norm(g) * np.linalg.norm(v), 1e-30)
    ours = score_documents(model, batch, query, 4)
    np.testing.assert_allclose(ours, want, atol=1e-5 * np.abs(want).max())
    assert (ours[1] == 0).all() and (ours[[0, 2], :3] != 0).all() and (ours[:, 3] == 0).all()
    np.testing.assert_allclose(
        score_documents(model, batch, query, 4, cosine=True), cosines, atol=1e-5
    )
    with pytest.raises(DataError, match="3 documents, above max_segments 2"):
        score_documents(model, batch, query, 2)


def test_only_chosen_parameters_count() -> None:
    model = parallelize(llama(), DistributedConfig())
    sources, probes = samples()
    measure = measure_pieces(model, parameters=r"mlp\.down_proj")
    ours, coverage = measure(NEEDS, sources, probes, TARGETS)
    trained = dict(model.named_parameters())
    for name, parameter in trained.items():
        parameter.requires_grad_("mlp.down_proj" in name)
    alone, whole = measure_pieces(model)(NEEDS, sources, probes, TARGETS)
    close(ours, alone)
    chosen = sum(p.numel() for n, p in trained.items() if "mlp.down_proj" in n)
    assert whole == 1.0 and coverage == chosen / sum(p.numel() for p in trained.values())


def test_what_cannot_be_measured_is_refused() -> None:
    model = parallelize(llama(), DistributedConfig())
    sources, probes = samples()
    with pytest.raises(ConfigError, match="'nowhere' matches none"):
        measure_pieces(model, parameters="nowhere")
    with pytest.raises(ConfigError, match="no rows for probe 'c'"):
        measure_pieces(model)(NEEDS, sources, probes, {"c": 1.0})
    with pytest.raises(ConfigError, match="pipeline ranks hold stages"):
        measure_pieces(Parallel(model.parts, model.config, None, object(), False, None))
    nothing = rows(3)._replace(loss_mask_BT=np.zeros_like(rows(3).loss_mask_BT))
    with pytest.raises(DataError, match="source 'second': none of its"):
        measure_pieces(model)(NEEDS, sources | {"second": nothing}, probes, TARGETS)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="probe 'b': the loss is nan"):
        measure_pieces(model)(NEEDS, sources, probes, TARGETS)
    with pytest.raises(DataError, match="probe 'b', probe 'a': gradient is not finite"):
        measure_pieces(model)(NEEDS - {"target_loss"}, sources, probes, TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"strategy": "fsdp2", "shard": 2}),
        (2, {"strategy": "fsdp2", "shard": 2, "cpu_offload": True}),
        (2, {"strategy": "ddp", "replicate": 2}),
        (4, {"strategy": "fsdp2", "replicate": 2, "shard": 2}),
        (4, {"strategy": "fsdp2", "shard": 2, "tensor": 2}),
        (4, {"strategy": "fsdp2", "shard": 2, "tensor": 2, "sequence_parallel": True}),
    ],
)
def test_ranks_together_see_what_one_process_sees(
    ranks: int, layout: dict[str, Any], tmp_path: Path
) -> None:
    sources, probes = samples()
    single = parallelize(llama(), DistributedConfig())
    alone, _ = measure_pieces(single)(NEEDS, sources, probes, TARGETS)
    scores = score_documents(single, sources["second"], probes["a"], 3)
    done = torchrun(
        str(Path(__file__).parent / "pieces.py"), str(tmp_path), repr(layout), ranks=ranks
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(ranks):
        with np.load(tmp_path / f"{rank}.npz") as found:
            close({name: found[name] for name in NEEDS}, alone)
            np.testing.assert_allclose(found["scores"], scores, atol=1e-5 * np.abs(scores).max())
            largest = int(found["largest"])
    if layout["strategy"] == "fsdp2":  # no rank has more of a gradient than its piece
        whole = max(p.numel() for p in llama().parameters())
        assert largest <= whole // 2
