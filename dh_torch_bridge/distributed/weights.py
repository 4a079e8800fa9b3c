"""One rank's weights for all: models are laid out without numbers, then each gets its share.

Only the first rank needs the whole model; on the others it may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dh_jax.errors import ConfigError


def take_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; the model itself is left on the meta device.

    Buffers that checkpoints do not hold (rotary frequencies) are among them: without them a model
    that was laid out on the meta device computes with whatever its memory held.

    Returns:
        The tensors on the first rank; on the others shapes and dtypes alone (meta tensors).

    Raises:
        ConfigError: parameters differ in dtype, which no strategy can gather together.
    """
    dtypes: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        dtypes.setdefault(parameter.dtype, name)
    if len(dtypes) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        raise ConfigError(
            f"parameters differ in dtype ({found.replace('torch.', '')}); "
            "bring the model to one (model.float()), and compute in another by "
            "distributed.param_dtype or model.dtype"
        )
    weights = {name: tensor.detach() for name, tensor in _tensors(model)}
    if dist.get_rank():
        weights = {name: tensor.to("meta") for name, tensor in weights.items()}
    elif missing := [name for name, tensor in weights.items() if tensor.is_meta]:
        raise ConfigError(
            f"{missing[0]} is on the meta device of rank 0; that rank needs the whole model, "
            "all others may have it on the meta device"
        )
    ties = tied_names(model)
    model.to("meta")
    tie(model, ties)
    return weights


def give_weights(
    parts: Sequence[nn.Module],
    weights: dict[str, torch.Tensor],
    device: torch.device,
    *,
    offload: bool = False,
) -> None:
    """Allocate what this rank holds and fill it from the first rank, one tensor at a time.

    Args:
        parts: laid out on the meta device; their parameters may be DTensors.
        weights: from `take_weights`.
        offload: parameters are to lie in host memory, buffers on the device all the same.
    """
    held: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        ties = tied_names(part)
        part.to_empty(device="cpu" if offload else device)
        tie(part, ties)
        for module in part.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        for name, tensor in _tensors(part):
            held.setdefault(name, []).append(tensor.detach())
    for name, known in weights.items():
        whole = torch.empty_like(known, device=device) if known.is_meta else known.to(device)
        dist.broadcast(whole, src=0)
        for tensor in held.get(name, ()):
            if isinstance(tensor, DTensor):
                tensor.to_local().copy_(whole[_share(tensor)])
            else:
                tensor.copy_(whole)


def tied_names(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one and the same, such as a tied unembedding's."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def tie(model: nn.Module, ties: list[list[str]]) -> None:
    """Make parameters one again: what replaces parameters does so once for every name."""
    for first, *others in ties:
        for name in others:
            path, _, last = name.rpartition(".")
            model.get_submodule(path).register_parameter(last, model.get_parameter(first))


def _tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _share(tensor: DTensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the whole."""
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(start, start + n) for start, n in zip(offset, shape, strict=True))
