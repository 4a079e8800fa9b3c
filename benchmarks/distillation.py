"""Distillation losses from hidden states, with gradients: CPU-seconds, memory, error in bfloat16.

    python -m benchmarks.distillation [--repeats 3] [--only NAME]

2048 tokens, a vocabulary of 49,152, width 576 (SmolLM2-135M's), float32, forward KL and its
gradients in hidden states and table. Each contender has processes of its own, taken in turn; one
call to warm up, then one that counts. The peers in torch are wanted in a folder of their own::

    pip install --no-deps --target .bench/distillation trl liger-kernel torchtune accelerate
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import ROOT, clock, in_a_process, median

TOKENS, VOCABULARY, WIDTH, K = 2048, 49_152, 576, 64
CLOSE = 0.135  # of the teacher's hidden states: noise that makes a KL of about .008
PEERS = ROOT / ".bench" / "distillation"


def inputs(tokens: int, vocabulary: int = VOCABULARY) -> tuple[np.ndarray, ...]:
    """Hidden states and table of student and teacher."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((tokens, WIDTH), np.float32)
    table = rng.standard_normal((vocabulary, WIDTH), np.float32) / WIDTH**0.5
    other = hidden + CLOSE * rng.standard_normal((tokens, WIDTH), np.float32)
    return hidden, table, other, table


Gradient = Callable[..., tuple[Any, Any]]  # (hidden, table, other, others) -> both gradients


# --- ours and optax --------------------------------------------------------------------------


def in_jax(name: str, dtype: str) -> tuple[Gradient, dict[str, float]]:
    import jax
    import jax.numpy as jnp
    import optax

    from dh_jax.distillation.losses import TeacherHead, loss_from_hidden
    from dh_jax.distillation.sparse import top_k
    from dh_jax.functions import Head

    def ours(hidden: Any, table: Any, teacher: Any) -> Any:
        targets = jnp.zeros((1, hidden.shape[0]), jnp.int32)
        losses = loss_from_hidden(
            hidden[None], Head(embedding_VD=table), teacher, targets, targets == 0, chunk=128
        )
        return losses.mean()

    def dense(hidden: Any, table: Any, other: Any, others: Any) -> Any:
        return ours(hidden, table, TeacherHead(other[None], Head(embedding_VD=others)))

    def style_of_optax(hidden: Any, table: Any, other: Any, others: Any) -> Any:
        student = jax.nn.log_softmax((hidden @ table.T).astype(jnp.float32))
        teacher = jax.nn.log_softmax((other @ others.T).astype(jnp.float32))
        return optax.losses.kl_divergence_with_log_targets(student, teacher).mean()

    if name == "sparse":
        loss: Callable[..., Any] = ours
    else:
        loss = dense if name == "dense" else style_of_optax
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    arrays = [jnp.asarray(x, dtype) for x in inputs(TOKENS)]
    if name == "sparse":
        part = jax.jit(lambda h, w: top_k(h[None] @ w.T, K))
        parts = [part(arrays[2][at : at + 128], arrays[3]) for at in range(0, TOKENS, 128)]
        arrays = [*arrays[:2], jax.tree.map(lambda *xs: jnp.concatenate(xs, 1), *parts)]
    compiled = gradient.lower(*arrays).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20

    def call(*given: Any) -> tuple[Any, Any]:
        if given:
            _, found = gradient(*(jnp.asarray(x, dtype) for x in given))
        else:
            _, found = compiled(*arrays)
        jax.block_until_ready(found)
        return found

    return call, {"xla_mib": temporaries}


# --- peers -----------------------------------------------------------------------------------


def in_torch(name: str, dtype: str) -> tuple[Gradient, dict[str, float]]:
    sys.path.insert(0, str(PEERS))
    import torch

    kind = getattr(torch, dtype)
    if name.startswith("liger"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        fused = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False, chunk_size=256)

        def loss(hidden: Any, table: Any, other: Any, others: Any) -> Any:
            return fused(hidden, table, other, others, torch.zeros(len(hidden), dtype=torch.long))

    elif name == "trl":
        from trl.experimental.gkd import GKDTrainer

        def loss(hidden: Any, table: Any, other: Any, others: Any) -> Any:
            student, teacher = hidden @ table.T, other @ others.T
            labels = torch.zeros(1, len(hidden), dtype=torch.long)
            return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels, beta=0.0)

    else:
        path = PEERS / "torchtune" / "modules" / "loss" / "kd_losses.py"  # the package itself wants
        spec = importlib.util.spec_from_file_location("kd_losses", path)  # an older torchao
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        chunked = module.ForwardKLWithChunkedOutputLoss(num_output_chunks=8)

        def loss(hidden: Any, table: Any, other: Any, others: Any) -> Any:
            student = [part[None] @ table.T for part in hidden.chunk(8)]
            teacher = [part[None] @ others.T for part in other.chunk(8)]
            return chunked(student, teacher, torch.zeros(1, len(hidden), dtype=torch.long))

    arrays = [torch.from_numpy(x).to(kind) for x in inputs(TOKENS)]

    def call(*given: Any) -> tuple[Any, Any]:
        tensors = [torch.from_numpy(x).to(kind) for x in given] if given else arrays
        hidden, table = (x.detach().requires_grad_() for x in tensors[:2])
        value = loss(hidden, table, *(x.detach() for x in tensors[2:]))
        return tuple(torch.autograd.grad(value, (hidden, table)))

    return call, {}


CONTENDERS = {
    "dense": in_jax, "sparse": in_jax, "optax": in_jax,
    "trl": in_torch, "liger": in_torch, "torchtune": in_torch,
}  # fmt: skip
LABELS = {
    "dense": "data-handler, dense", "sparse": f"data-handler, {K} entries and tail",
    "optax": "optax-style, whole tables", "trl": "TRL", "liger": "Liger, chunks of 256",
    "torchtune": "torchtune, 8 chunks",
}  # fmt: skip


def one(name: str) -> dict[str, float]:
    """What one process measures."""
    call, facts = CONTENDERS[name](name, "float32")
    call()

    def work() -> int:
        call()
        return TOKENS

    return clock(work) | facts


def error(name: str) -> dict[str, float]:
    """Error of the gradients in bfloat16, of 256 tokens and 4,096 ids, against float64."""
    import torch

    def rounded(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(x).bfloat16().float().numpy()

    given = [rounded(x) for x in inputs(256, 4096)]
    hidden, table, other, others = (torch.from_numpy(x).double() for x in given)
    hidden.requires_grad_(), table.requires_grad_()
    q, p = (torch.log_softmax(h @ w.T, -1) for h, w in ((hidden, table), (other, others)))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    true = torch.autograd.grad(kl, (hidden, table))
    found = CONTENDERS[name](name, "bfloat16")[0](*given)
    errors = {"kl": float(kl.detach())}
    for what, a, b in zip(("hidden", "table"), found, true, strict=True):
        a = a.float().numpy() if isinstance(a, torch.Tensor) else np.asarray(a, np.float32)
        scale = np.vdot(a, b.numpy()) / np.vdot(a, a)  # some divide by something else
        errors[what] = float(np.linalg.norm(scale * a - b.numpy()) / np.linalg.norm(b.numpy()))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--child", choices=("one", "error"))
    options = parser.parse_args()
    names = options.only
    if options.child:
        print(json.dumps({"one": one, "error": error}[options.child](names[0])))
        return
    if not PEERS.is_dir():
        names = [n for n in names if CONTENDERS[n] is in_jax]
        print(f"the peers are left out: {PEERS.relative_to(ROOT)} is not there\n")
    script = Path(__file__)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name in names:
            rows[name].append(in_a_process(script, ["--child", "one", "--only", name]))
    print("| | CPU-s | peak MiB | XLA temporaries, MiB | error in bf16, % (hidden, table) |")
    print("|---|---:|---:|---:|---:|")
    for name in names:
        m = median(rows[name])
        wrong = "" if name == "sparse" else in_a_process(
            script, ["--child", "error", "--only", name]
        )  # fmt: skip
        shown = f"{100 * wrong['hidden']:.2f}, {100 * wrong['table']:.2f}" if wrong else ""
        xla = f"{m['xla_mib']:.0f}" if "xla_mib" in m else ""
        print(f"| {LABELS[name]} | {m['cpu']:.1f} | {m['peak_mib']:.0f} | {xla} | {shown} |")


if __name__ == "__main__":
    main()
