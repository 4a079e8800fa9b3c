"""One model over a mesh of any layout, and the step that is the same for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel

from dh_jax.config import DistributedConfig
from dh_jax.errors import ConfigError
from dh_torch_bridge.data import TorchBatch
from dh_torch_bridge.distributed.fsdp2 import recompute_blocks, shard_blocks
from dh_torch_bridge.distributed.gradients import clip_gradients
from dh_torch_bridge.distributed.mesh import (
    DATA_AXES,
    data_shard,
    make_mesh,
    pick_device,
    sum_over,
    sum_over_data,
    validate,
)
from dh_torch_bridge.distributed.parallelism import check_tensor, split_matrices
from dh_torch_bridge.distributed.pipeline import (
    HEAD,
    add_tied_gradients,
    check_pipeline,
    cut,
    make_schedule,
    microbatches_of,
    tied_parameters,
)
from dh_torch_bridge.distributed.weights import give_weights, take_weights, tied_names
from dh_torch_bridge.labels import IGNORED
from dh_torch_bridge.losses import token_losses


class Parallel(NamedTuple):
    """A model as one rank holds it."""

    parts: tuple[nn.Module, ...]  # the model; with pipeline ranks, this one's stages
    config: DistributedConfig
    mesh: DeviceMesh | None
    schedule: Any  # of `torch.distributed.pipelining`, or None
    tied: bool  # the first pipeline stage's embedding is the last one's head
    autocast: torch.dtype | None  # matrices are multiplied in it

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under the whole model's names, each once."""
        for part in self.parts:
            yield from part.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, each once."""
        for _, parameter in self.named_parameters():
            yield parameter


def parallelize(
    model: nn.Module,
    config: DistributedConfig,
    mesh: DeviceMesh | None = None,
    *,
    autocast: torch.dtype | None = None,
) -> Parallel:
    """Spread a model over the ranks: pipeline stages, split matrices, shares of blocks, in turn.

    Make the optimizer afterwards, from `Parallel.parameters`: the old ones are gone. Rank 0's
    numbers go to all, tensor by tensor, so that on every other rank the model may be on the meta
    device (``with torch.device("meta"): build()``) and no rank but the first ever holds it whole.

    Args:
        model: with ``tensor`` or ``pipeline`` above 1 a Hugging Face model of the Llama family,
            with any other config any module that keeps its blocks in an `nn.ModuleList`.
        config: see `DistributedConfig`; ``configs/distributed`` has one for each use.
        mesh: from `make_mesh`; None makes it.
        autocast: dtype for `torch.autocast` around the forward.

    Raises:
        ConfigError: the model does not fit the layout, its parameters differ in dtype, or there
            are no blocks. All ranks come to the same verdict before they first exchange anything.
    """
    validate(config)
    mesh = make_mesh(config) if mesh is None else mesh
    device = pick_device(config)
    if mesh is None:
        model = model.to(device)
        if config.checkpoint_activations:
            recompute_blocks(model)
        return Parallel((model,), config, None, None, False, autocast)
    pipeline, tensor = mesh["pipeline"].size(), mesh["tensor"].size()
    if pipeline > 1:
        check_pipeline(model, config, pipeline)
    if tensor > 1:
        check_tensor(model, tensor)
    weights = take_weights(model)
    tied = pipeline > 1 and any(HEAD in names for names in tied_names(model))
    parts: dict[int, nn.Module] = {0: model}
    if pipeline > 1:
        rank = mesh.get_local_rank("pipeline")
        parts = dict(cut(model, config, pipeline, rank, autocast))
    for part in parts.values():
        lay_out(part, config, mesh)
    give_weights([*parts.values()], weights, device, offload=config.cpu_offload)
    if config.strategy == "ddp":
        parts[0] = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=mesh.get_group("replicate"),
            init_sync=False,  # just done
        )
    schedule = make_schedule(parts, config, mesh, device) if pipeline > 1 else None
    return Parallel(tuple(parts.values()), config, mesh, schedule, tied, autocast)


def lay_out(part: nn.Module, config: DistributedConfig, mesh: DeviceMesh) -> None:
    """Split one stage's matrices and shard its blocks, in place; it may be on the meta device."""
    if mesh["tensor"].size() > 1:
        split_matrices(part, mesh["tensor"], sequence=config.sequence_parallel)
    if config.checkpoint_activations:
        recompute_blocks(part)
    if config.strategy == "fsdp2":
        shard_blocks(part, config, mesh)


def check_batch(config: DistributedConfig, mesh: DeviceMesh | None, rows: int, tokens: int) -> None:
    """Refuse a data-parallel rank's batch that its layout cannot cut.

    Raises:
        ConfigError: rows make no microbatches, or tokens no equal parts for tensor ranks.
    """
    if mesh is None:
        return
    if mesh["pipeline"].size() > 1:
        microbatches_of(config, mesh["pipeline"].size(), rows)
    if config.sequence_parallel and tokens % mesh["tensor"].size():
        raise ConfigError(
            f"rows of {tokens} tokens do not split over tensor={mesh['tensor'].size()} ranks; "
            "take another row length, or distributed.sequence_parallel=false"
        )


def forward_backward(model: Parallel, batch: TorchBatch) -> torch.Tensor:
    """Loss of the global batch, and its gradients added to every ``.grad``.

    The loss is the sum over all ranks' targets divided by their number: no rank's rows and no
    microbatch weighs more for having fewer targets.

    Args:
        batch: this data-parallel rank's rows, on its device, as `get_loader` gives them.

    Returns:
        Mean cross-entropy in nats (a float64 scalar), the same on every rank; 0 where nothing is
        learnt.
    """
    targets = (batch["shift_labels"] != IGNORED).sum()
    count = sum_over_data(targets, model.mesh)
    # DDP and FSDP2 average gradients over the data-parallel ranks, so the sum is wanted times
    # their number.
    ranks = data_shard(model.mesh)[1]
    scale = ranks / count.clamp(min=1).double()
    device = batch["input_ids"].device
    # What earlier calls have left there is summed already.
    before = {x: x.grad for x in tied_parameters(model.parts)} if model.tied else {}
    for parameter in before:
        parameter.grad = None
    with tensor_loss(model.mesh):
        if model.schedule is None:
            with torch.autocast(device.type, model.autocast, enabled=model.autocast is not None):
                loss_BT = token_losses(model.parts[0], batch)
            loss = loss_BT.sum() * scale
            loss.backward()
        else:
            loss = _pipelined(model, batch, scale)
    if model.tied and model.mesh is not None:
        add_tied_gradients(model.parts, model.mesh)
        for parameter, gradient in before.items():
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient
    return sum_over(loss.detach().double() / ranks, model.mesh, ("pipeline", *DATA_AXES))


def _pipelined(model: Parallel, batch: TorchBatch, scale: torch.Tensor) -> torch.Tensor:
    """Run a schedule; the loss on the rank of the last stage, 0 on the others."""
    names = ("position_ids", "segment_ids", "shift_labels")
    parts = [getattr(part, "first", False) for part in model.parts]
    losses: list[torch.Tensor] = []
    model.schedule.step(
        *([batch["input_ids"]] if any(parts) else []),
        target=batch["shift_labels"],
        losses=losses,
        return_outputs=False,
        loss_kwargs={"scale": scale},
        **{name: batch[name] for name in names},
    )
    if not losses:
        return torch.zeros_like(scale)
    return torch.stack(losses).sum()


def clip(model: Parallel, max_norm: float) -> torch.Tensor:
    """Clip the gradients of the whole model; its norm before, the same on every rank."""
    twins = []
    if model.tied:
        twins = [
            parameter
            for part in model.parts
            if getattr(part, "last", False)
            for name, parameter in part.named_parameters()
            if name == HEAD
        ]
    return clip_gradients(model.parameters(), max_norm, model.mesh, twins=twins)


@contextlib.contextmanager
def tensor_loss(mesh: DeviceMesh | None) -> Iterator[None]:
    """Within it tensor ranks compute losses from their parts of the vocabulary."""
    if mesh is None or mesh["tensor"].size() == 1:
        yield
    else:
        with loss_parallel():
            yield


def distribute(model: nn.Module, config: DistributedConfig, mesh: DeviceMesh | None) -> nn.Module:
    """`parallelize` for layouts without pipeline stages: the model itself, to call as before.

    Raises:
        ConfigError: as `parallelize`; or there are pipeline ranks, which hold no whole model.
    """
    if config.pipeline != 1:
        raise ConfigError(
            f"distributed.pipeline={config.pipeline} leaves no rank a model to call; "
            "use parallelize and forward_backward"
        )
    return parallelize(model, config, mesh).parts[0]
