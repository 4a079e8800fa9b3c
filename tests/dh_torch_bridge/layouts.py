"""What ranks do for test_layouts.py, under torchrun: the same training in one layout after another.

torchrun ... layouts.py CASES.json ANSWERS.json
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dh_torch_bridge import clip, data_shard, forward_backward, load_distributed_config
from dh_torch_bridge.distributed.mesh import make_mesh
from dh_torch_bridge.distributed.parallelize import parallelize

ROWS, TOKENS, VOCABULARY, MAX_NORM = 8, 16, 64, 0.5


def make_model(dtype: str = "float32", *, tied: bool = False, **shape: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    config = LlamaConfig(
        **{**sizes, **shape},
        tie_word_embeddings=tied,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    if dtype == "float64":  # transformers rounds norms to float32, which hides all beneath 1e-7
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = partial(root_mean_square, module)
    return model


def root_mean_square(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    mean = hidden.square().mean(-1, keepdim=True)
    return norm.weight * hidden * torch.rsqrt(mean + norm.variance_epsilon)


def make_batch(step: int) -> dict[str, torch.Tensor]:
    """Rows of two documents and padding; later rows have ever fewer targets."""
    random = torch.Generator().manual_seed(step)
    segments = torch.ones(ROWS, TOKENS, dtype=torch.int32)
    positions = torch.zeros(ROWS, TOKENS, dtype=torch.int32)
    tokens = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=random)
    labels = (5 * tokens + 1) % VOCABULARY  # something to learn
    for row in range(ROWS):
        cut = int(torch.randint(2, TOKENS - 4, (1,), generator=random))
        segments[row, cut:] = 2
        segments[row, TOKENS - 2 :] = 0
        for start, stop in ((0, cut), (cut, TOKENS - 2)):
            positions[row, start:stop] = torch.arange(stop - start)
            labels[row, stop - 1] = -100
        labels[row, TOKENS - 2 :] = -100
        labels[row, : row + 1] = -100
    return {
        "input_ids": tokens,
        "shift_labels": labels,
        "position_ids": positions,
        "segment_ids": segments,
    }


def train_case(case: dict[str, Any]) -> dict[str, list[float]]:
    """Losses and gradient norms of a case: ``layout`` (a distributed config), ``dtype``, ``model``,
    ``autocast``, ``steps``, ``calls`` (of `forward_backward` a step, over a batch each)."""
    config = load_distributed_config({"backend": "gloo", **case["layout"]})
    mesh = make_mesh(config)
    with torch.device("cpu" if dist.get_rank() == 0 else "meta"):
        whole = make_model(case.get("dtype", "float32"), **case.get("model", {}))
    model = parallelize(
        whole, config, mesh, autocast=torch.bfloat16 if case.get("autocast") else None
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    rank, ranks = data_shard(mesh)
    losses, norms = [], []
    for step in range(case.get("steps", 20)):
        rows = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
        calls = case.get("calls", 1)
        for call in range(calls):
            batch = make_batch(step * calls + call)
            loss = forward_backward(model, {name: x[rows] for name, x in batch.items()})
        norm = clip(model, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        norms.append(float(norm))
    return {"loss": losses, "norm": norms}


def main(cases: Path, answers: Path) -> None:
    found = {}
    for name, case in json.loads(cases.read_text()).items():
        print(name, flush=True)
        found[name] = train_case(case)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    assert all(other == found for other in everyone)  # every rank is told the same
    if dist.get_rank() == 0:
        answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    dist.barrier()
    os._exit(0)
