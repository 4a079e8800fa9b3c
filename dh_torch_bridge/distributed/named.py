"""A training state as tensors under names that do not depend on how the model is spread.

Parameters and buffers are ``model.<name>``, what an optimizer keeps of a parameter is
``optimizer.<name>.<key>``. Names are those of the model before it was wrapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dh_jax.errors import StateError
from dh_torch_bridge.distributed.parallelize import Parallel
from dh_torch_bridge.distributed.pipeline import HEAD, TABLE

Model = nn.Module | Parallel
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # compiled, activation checkpointing


def plain_name(name: str) -> str:
    """A parameter's name without what wrapping a model adds to it (DDP: a first ``module``)."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def parts_of(model: Model) -> tuple[nn.Module, ...]:
    """The modules that this rank has of a model."""
    return model.parts if isinstance(model, Parallel) else (model,)


def named_parameters(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once (a tied one under its first name), by its plain name.

    Where pipeline stages hold a tied table twice, both have the one name.
    """
    twins = {HEAD: TABLE} if isinstance(model, Parallel) and model.tied else {}
    for module in parts_of(model):
        for name, parameter in module.named_parameters():
            name = plain_name(name)
            yield twins.get(name, name), parameter


def named_tensors(
    model: Model, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, torch.Tensor]:
    """Parameters, persistent buffers and the optimizer's state: the tensors themselves, uncopied.

    Of a tied table that this rank holds twice (both ends of a ZBV pipeline) it is the last.

    Args:
        model: whole or spread.
        optimizer: of its parameters.
    """
    tensors: dict[str, torch.Tensor] = {}
    for module in parts_of(model):
        persistent = module.state_dict().keys()  # FSDP2 gives up gathered parameters here
        for name, buffer in module.named_buffers():
            if name in persistent:
                tensors[f"model.{plain_name(name)}"] = buffer
    for name, parameter in named_parameters(model):
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            if not isinstance(value, torch.Tensor):
                raise StateError(
                    f"{type(optimizer).__name__} keeps {key} of {name} as "
                    f"{type(value).__name__}; only tensors can be saved"
                )
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def ready_state(
    model: Model,
    optimizer: torch.optim.Optimizer,
    there: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """Give an optimizer empty state of the kinds that a checkpoint has; returns it by name.

    A tensor of a parameter's shape is spread as the parameter is.

    Args:
        model: whose parameters the optimizer has.
        optimizer: its state is thrown away.
        there: DCP's metadata by name.
    """
    optimizer.state.clear()
    own = {name: parameter for name, parameter in named_parameters(model)}
    on_device = {
        parameter
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
    tensors: dict[str, torch.Tensor] = {}
    for full, saved in there.items():
        kind, _, rest = full.partition(".")
        name, _, key = rest.rpartition(".")
        if kind != "optimizer" or name not in own:
            continue  # of another stage
        parameter, dtype = own[name], saved.properties.dtype
        if saved.size == parameter.shape:
            value = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:  # a counter of steps, which optimizers keep on the CPU unless a kernel reads it
            device = parameter.device if parameter in on_device else None
            value = torch.empty(saved.size, dtype=dtype, device=device)
        optimizer.state[parameter][key] = tensors[full] = value
    return tensors


def fill_twins(model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Give a tied table that this rank holds twice (ZBV) what was read for the last of the two."""
    read = dict(named_parameters(model))
    for name, parameter in named_parameters(model):
        if parameter is not read[name]:
            parameter.data.copy_(read[name].data)
            state = optimizer.state.get(read[name], {})
            optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}


def refuse_other_tensors(
    path: Path, wanted: Mapping[str, torch.Tensor], there: Mapping[str, Any], *, whole: bool
) -> None:
    """Compare names, shapes and types with those of a checkpoint, before any is read.

    Args:
        path: of the checkpoint, for the message.
        wanted: this rank's tensors.
        there: DCP's metadata by name.
        whole: this rank has a piece of every tensor, so the checkpoint has no others.

    Raises:
        StateError: names the first that differs.
    """
    if whole:
        for name in there:
            if name.startswith("model.") and name not in wanted:
                raise StateError(
                    f"checkpoint {path} does not fit this model: it has {name}, which is not "
                    "here; resume with the config it was saved with"
                )
    for name, tensor in wanted.items():
        saved = there.get(name)
        here = f"{tuple(tensor.shape)} {tensor.dtype}"
        said = "none"
        if isinstance(saved, TensorStorageMetadata):
            said = f"{tuple(saved.size)} {saved.properties.dtype}"
        if said != here:
            raise StateError(
                f"checkpoint {path} does not fit this model: {name} is {said} there and {here} "
                "here; resume with the config it was saved with"
            )
