"""Torch's losses against JAX's own and against full tables in float64; teachers in torch."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dh_jax.batch import Batch, TopKLogits  # noqa: E402
from dh_jax.config import ModelConfig  # noqa: E402
from dh_jax.distillation import losses  # noqa: E402
from dh_jax.distillation.divergences import Divergence  # noqa: E402
from dh_jax.distillation.losses import Kind, Mix, TeacherHead  # noqa: E402
from dh_jax.distillation.sparse import top_k  # noqa: E402
from dh_jax.errors import ConfigError  # noqa: E402
from dh_jax.functions import Head  # noqa: E402
from dh_torch_bridge import distillation as ours  # noqa: E402
from dh_torch_bridge.copies import COPIED  # noqa: E402
from dh_torch_bridge.exchange import to_jax, to_torch  # noqa: E402
from dh_torch_bridge.labels import IGNORED  # noqa: E402
from dh_torch_bridge.teacher import wrap_torch_teacher  # noqa: E402
from dh_torch_bridge.train import build_llama  # noqa: E402

B, T, D, V, K = 2, 12, 16, 50, 6
KINDS = [
    Kind(),
    Kind(Divergence("reverse_kl"), squared=False),
    Kind(Divergence("jensen_shannon", 0.3), vocabulary=40),
]
MIXES = [Mix(), Mix(0.7, 0.3, 2.0)]


def drawn(dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "hidden": rng.normal(size=(B, T, D)).astype(dtype),
        "table": rng.normal(size=(V, D)).astype(dtype),
        "bias": rng.normal(size=V).astype(dtype),
        "teacher": (3 * rng.normal(size=(B, T, V))).astype(np.float32),
        "targets": rng.integers(0, V, (B, T)).astype(np.int32),
        "mask": rng.random((B, T)) < 0.7,
        "weights": rng.random((B, T)).astype(np.float32),
    }


def labels_of(d: dict[str, Any]) -> Any:
    return torch.from_numpy(np.where(d["mask"], d["targets"], IGNORED).astype(np.int64))


def teachers(d: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Each for JAX and for torch: logits, hidden states with a head, the most probable ids."""
    head = TeacherHead(d["hidden"][..., ::-1].copy(), Head(embedding_VD=d["table"][:, ::-1].copy()))
    sparse = TopKLogits(*map(np.array, top_k(d["teacher"], K, 2.0)))
    wide = sparse._replace(ids_BTK=sparse.ids_BTK.astype(np.int64))
    return [
        (jax_s, jax.tree.map(torch.from_numpy, torch_s))
        for jax_s, torch_s in ((d["teacher"], d["teacher"]), (head, head), (sparse, wide))
    ]


ALL = [(k, t, m) for k in range(len(KINDS)) for t in range(3) for m in range(len(MIXES))]
EACH = [(1, 2, 1)]  # the others are slow


@pytest.mark.parametrize(
    ("which_kind", "which", "which_mix"),
    [pytest.param(*x, marks=[] if x in EACH else pytest.mark.slow) for x in ALL],
)
def test_losses_and_gradients_are_those_of_jax(which_kind: int, which: int, which_mix: int) -> None:
    kind, mix = KINDS[which_kind], MIXES[which_mix]
    d = drawn()
    jax_teacher, torch_teacher = teachers(d)[which]

    def theirs(hidden: Any, table: Any, bias: Any) -> Any:
        head = Head(embedding_VD=table, bias_V=bias)
        loss_BT = losses.loss_from_hidden(
            hidden, head, jax_teacher, d["targets"], d["mask"], mix, kind, chunk=8
        )
        return (loss_BT * d["weights"]).sum(), loss_BT

    given = d["hidden"], d["table"], d["bias"]
    grads, loss_BT = jax.jit(jax.grad(theirs, (0, 1, 2), has_aux=True))(*given)
    hidden, table, bias = (torch.from_numpy(x.copy()).requires_grad_() for x in given)
    linear = torch.nn.Linear(D, V)
    linear.weight, linear.bias = torch.nn.Parameter(table), torch.nn.Parameter(bias)
    found = ours.loss_from_hidden(hidden, linear, torch_teacher, labels_of(d), mix, kind, chunk=8)
    np.testing.assert_allclose(found.detach(), loss_BT, atol=1e-6, rtol=1e-6)
    (found * torch.from_numpy(d["weights"])).sum().backward()
    for a, b in zip((hidden.grad, linear.weight.grad, linear.bias.grad), grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)
    # The same from logits that torch made, with torch's own gradient behind them.
    again = [x.detach().clone().requires_grad_() for x in (hidden, table, bias)]
    logits = torch.nn.functional.linear(*again)
    loss = ours.loss_from_logits(logits, torch_teacher, labels_of(d), mix, kind)
    np.testing.assert_allclose(loss.detach(), loss_BT, atol=2e-6, rtol=2e-6)
    (loss * torch.from_numpy(d["weights"])).sum().backward()
    for a, b in zip(again, grads, strict=True):
        np.testing.assert_allclose(a.grad, b, atol=5e-6, rtol=5e-6)


def test_forward_kl_and_cross_entropy_are_those_of_torch_in_float64() -> None:
    d = drawn()
    logits = torch.from_numpy(d["hidden"] @ d["table"].T).requires_grad_()
    found = ours.loss_from_logits(
        logits, torch.from_numpy(d["teacher"]), labels_of(d), Mix(0.7, 0.3, 2.0)
    )
    found.sum().backward()
    wide = logits.detach().double().requires_grad_()
    p = torch.log_softmax(torch.from_numpy(d["teacher"]).double() / 2, -1)
    q = torch.log_softmax(wide / 2, -1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    hard = torch.nn.functional.cross_entropy(
        wide.transpose(1, 2), labels_of(d), ignore_index=IGNORED, reduction="none"
    )
    expected = torch.where(torch.from_numpy(d["mask"]), 0.7 * 4 * kl, 0.0) + 0.3 * hard
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(logits.grad.double(), wide.grad, atol=1e-6, rtol=1e-5)


def test_bfloat16_keeps_its_type_and_its_memory() -> None:
    d = drawn()
    logits = torch.randn(B, T, V, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.tensor(d["teacher"])  # in memory of torch's own, which is aligned
    before = COPIED["to_jax"], COPIED["to_torch"]
    loss = ours.loss_from_logits(logits, teacher, labels_of(d))
    loss.sum().backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    assert to_jax(logits).unsafe_buffer_pointer() == logits.data_ptr()
    assert (COPIED["to_jax"] - before[0], COPIED["to_torch"] - before[1]) == (
        B * T * 4, 0  # the weights of the sum, which torch expands from one number
    )  # fmt: skip


def test_a_new_weight_or_temperature_compiles_nothing() -> None:
    d = drawn()
    logits = torch.randn(B, T, V, requires_grad=True)
    teacher, labels = torch.from_numpy(d["teacher"]), labels_of(d)
    ours.loss_from_logits(logits, teacher, labels, Mix(1.0, 0.5, 2.0)).sum().backward()
    sizes = ours._forward._cache_size(), ours._backward._cache_size()
    for step in range(3):
        mix = Mix(1.0 - 0.1 * step, 0.1 * step, 2.0 + step)
        ours.loss_from_logits(logits, teacher, labels, mix).sum().backward()
    assert (ours._forward._cache_size(), ours._backward._cache_size()) == sizes


def test_what_is_written_over_before_the_backward_pass_is_an_error() -> None:
    d = drawn()
    logits = torch.randn(B, T, V, requires_grad=True) * 1
    loss = ours.loss_from_logits(logits, torch.from_numpy(d["teacher"]), labels_of(d))
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_a_gradient_of_the_gradient_is_refused() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 8, 64, requires_grad=True), torch.randn(2, 8, 64)
    loss_BT = ours.loss_from_logits(logits, teacher, torch.randint(0, 64, (2, 8)))
    with pytest.raises(ConfigError, match="first derivatives alone; call backward without create"):
        torch.autograd.grad(loss_BT.sum(), logits, create_graph=True)


def test_writing_to_a_tensor_never_changes_a_jax_array() -> None:
    array = jax.numpy.arange(16.0)
    before = COPIED["to_torch"]
    to_torch(array).mul_(-1)
    np.testing.assert_array_equal(array, np.arange(16.0))
    assert COPIED["to_torch"] - before == 64
    with pytest.raises(ConfigError, match=r"torch.float64 goes to JAX, which has 32 bits"):
        to_jax(torch.zeros(3, dtype=torch.float64))


# --- teachers --------------------------------------------------------------------------------


SHAPE = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, mlp_width=48)


def packed() -> Batch:
    rng = np.random.default_rng(1)
    tokens_BT = rng.integers(1, 512, (2, 16)).astype(np.int32)
    segment_ids_BT = np.repeat([[1, 2, 3, 0]], 4, axis=1).repeat(2, axis=0).astype(np.int32)
    positions_BT = np.tile(np.arange(4), (2, 4)).astype(np.int32)
    mask_BT = segment_ids_BT > 0
    return Batch(tokens_BT, tokens_BT, mask_BT, segment_ids_BT, positions_BT, np.zeros(2, np.int32))


@pytest.mark.parametrize("way", ["hidden states", "logits"])
def test_a_torch_model_is_a_teacher(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build_llama(SHAPE, 512)
    if way == "logits":  # as a model that scales what its head gives
        inner = model.lm_head.forward
        monkeypatch.setattr(model.lm_head, "forward", lambda x: inner(x))
        monkeypatch.setattr("dh_torch_bridge.teacher._ends_in", lambda *_: False)
    teacher = wrap_torch_teacher(model)
    batch = packed()
    found = teacher.top_k(batch, 8, 2.0)
    rows = []
    for row in range(2):  # each document alone, by transformers' own causal attention
        for segment in (1, 2, 3):
            inside = batch.segment_ids_BT[row] == segment
            with torch.no_grad():
                ids = torch.from_numpy(batch.tokens_BT[row, inside]).long()[None]
                rows.append(model(input_ids=ids).logits[0])
    logp = torch.log_softmax(torch.cat(rows) / 2.0, -1)
    values, ids = logp.topk(8)
    inside = batch.segment_ids_BT > 0
    np.testing.assert_array_equal(np.asarray(found.ids_BTK)[inside], ids)
    np.testing.assert_allclose(np.asarray(found.log_probs_BTK)[inside], values, atol=1e-5)
    tail = torch.log1p(-values.exp().sum(-1))
    np.testing.assert_allclose(np.asarray(found.log_tail_BT)[inside], tail, atol=1e-5)
