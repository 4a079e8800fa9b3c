"""Tensor and sequence parallelism for Hugging Face models of the Llama family.

Megatron's split (Shoeybi et al. 2019, arXiv:1909.08053): the first matrices of attention and
feed-forward by columns, the last by rows, the vocabulary over ranks in embedding, head and loss.
With sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198) ranks also split a row's
tokens between them, where the plain split repeats them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.nn.functional import embedding

from dh_jax.errors import ConfigError
from dh_torch_bridge.distributed.weights import tie, tied_names


class Repeated(ParallelStyle):
    """A module that every tensor rank computes alike, with parameters that say so."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def known(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return tuple(DTensor.from_local(x, mesh, (Replicate(),)) for x in inputs)

        def local(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.to_local()

        return distribute_module(module, device_mesh, None, known, local)


class SplitTable(ParallelStyle):
    """An embedding of which each tensor rank holds some ids.

    As torch's `RowwiseParallel`, whose backward in torch 2.13 has every rank make the gradient
    of the whole table.
    """

    def __init__(self, output: Placement) -> None:
        self.output = output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def split(_: str, table: nn.Module, mesh: DeviceMesh) -> None:
            weight = table.get_parameter("weight")
            table.register_parameter(
                "weight", nn.Parameter(distribute_tensor(weight, mesh, (Shard(0),)))
            )

        def look_up(ids: torch.Tensor) -> torch.Tensor:
            rows: Any = module.weight
            mine = rows.to_local()
            places = ids - device_mesh.get_local_rank() * len(mine)
            elsewhere = (places < 0) | (places >= len(mine))
            found = embedding(places.masked_fill(elsewhere, 0), mine)
            partial = found.masked_fill(elsewhere[..., None], 0)
            whole = DTensor.from_local(partial, device_mesh, (Partial(),))
            return whole.redistribute(placements=(self.output,)).to_local()

        distribute_module(module, device_mesh, split)
        module.forward = look_up
        return module


def check_tensor(model: nn.Module, tensor: int) -> None:
    """Refuse a degree that does not divide what tensor ranks split.

    Raises:
        ConfigError: names the size, the degree and the degrees that fit.
    """
    shape = getattr(model, "config", None)
    sizes = {
        "attention heads": "num_attention_heads",
        "key-value heads": "num_key_value_heads",
        "feed-forward width": "intermediate_size",
        "vocabulary": "vocab_size",
    }
    if any(getattr(shape, key, None) is None for key in sizes.values()) or not is_llama(model):
        raise ConfigError(
            f"distributed.tensor={tensor}: no plan splits {type(model).__name__}; it must be a "
            "Hugging Face model of the Llama family, or take tensor=1"
        )
    table = model.get_submodule("model.embed_tokens")
    if type(table) is not nn.Embedding:
        raise ConfigError(
            f"distributed.tensor={tensor}: the embedding of {type(model).__name__} is a "
            f"{type(table).__name__}, which does more than look rows up and no plan splits; take "
            "tensor=1"
        )
    numbers = {name: getattr(shape, key) for name, key in sizes.items()}
    for name, number in numbers.items():
        if number % tensor:
            fits = [n for n in range(1, 65) if not any(m % n for m in numbers.values())]
            raise ConfigError(
                f"distributed.tensor={tensor} does not divide the model's {number} ({name}); "
                f"degrees that fit this model: {', '.join(map(str, fits))}"
            )


def is_llama(model: nn.Module) -> bool:
    """Whether a model has the parts that the plans and pipeline stages name."""
    body = getattr(model, "model", None)
    blocks = getattr(body, "layers", None)
    return (
        all(hasattr(body, name) for name in ("embed_tokens", "norm", "rotary_emb"))
        and hasattr(model, "lm_head")
        and isinstance(blocks, nn.ModuleList)
        and all(hasattr(block, "self_attn") and hasattr(block, "mlp") for block in blocks)
    )


def split_matrices(model: nn.Module, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Split a model, or a pipeline stage of one, over the ``tensor`` axis, in place.

    Every tensor rank is given the same rows. A whole model then answers with logits that are a
    DTensor, of which each rank holds its part of the vocabulary. Collectives in a layer, forward
    and backward: four all-reduces, or with ``sequence`` four all-gathers and four
    reduce-scatters of the same total bytes; T must then be a multiple of the ranks.

    Args:
        mesh: the axis ``tensor`` alone.
        sequence: between the matrices, ranks hold parts of the tokens.

    Raises:
        ConfigError: a parameter that no plan names is left.
    """
    ties = tied_names(model)
    between = Shard(1) if sequence else Replicate()
    ends: dict[str, ParallelStyle] = {
        "model.embed_tokens": SplitTable(between),
        "model.norm": _norm(sequence),
        "lm_head": ColwiseParallel(
            input_layouts=between, output_layouts=Shard(-1), use_local_output=False
        ),
    }
    held = {name for name, module in model.named_modules() if module is not None}
    parallelize_module(model, mesh, {name: p for name, p in ends.items() if name in held})
    blocks: Any = model.get_submodule("model.layers")
    for block in blocks:
        if block is not None:  # another pipeline stage has it
            plan = _block_plan(sequence)
            names = {name for name, _ in block.named_modules()}
            parallelize_module(block, mesh, {name: p for name, p in plan.items() if name in names})
    tie(model, ties)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise ConfigError(
                f"distributed.tensor={mesh.size()}: no plan splits {name}; take tensor=1"
            )


def _block_plan(sequence: bool) -> dict[str, ParallelStyle]:
    between = Shard(1) if sequence else Replicate()
    columns = ("q_proj", "k_proj", "v_proj")
    return {
        "input_layernorm": _norm(sequence),
        # Once for the three matrices after it, whose gradients are then summed over ranks as one.
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": between},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        **{f"self_attn.{name}": ColwiseParallel() for name in columns},
        # Qwen3's, head by head: [B, T, heads of this rank, head width].
        **{
            f"self_attn.{name}": SequenceParallel(sequence_dim=2, use_local_output=True)
            for name in ("q_norm", "k_norm")
        },
        "self_attn.o_proj": RowwiseParallel(output_layouts=between),
        "post_attention_layernorm": _norm(sequence),
        "mlp": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=between),
    }


def _norm(sequence: bool) -> ParallelStyle:
    return SequenceParallel(use_local_output=True) if sequence else Repeated()


def settle(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A gradient laid out as its parameter: that of a norm whose tokens were split is still to
    be summed over tensor ranks where FSDP2 has not done it."""
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        return gradient.redistribute(placements=parameter.placements)
    return gradient
