"""Norms of gradients that lie in parts on many ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dh_torch_bridge.distributed.mesh import AXES, sum_over
from dh_torch_bridge.distributed.parallelism import settle


def clip_gradients(
    parameters: Iterable[torch.Tensor],
    max_norm: float,
    mesh: DeviceMesh | None,
    *,
    twins: Collection[torch.Tensor] = (),
) -> torch.Tensor:
    """Scale gradients in place so that their norm over all ranks is at most ``max_norm``.

    A part is counted once however many ranks hold it: squares are added up over the axes that a
    gradient is split over, then over pipeline stages. `torch.nn.utils.clip_grad_norm_` refuses
    gradients of different meshes and knows no stages.

    Args:
        parameters: this rank's, each once; those without a gradient are passed over.
        mesh: from `make_mesh`.
        twins: scaled but not counted, as another stage counts the same (a tied head).

    Returns:
        The norm before clipping, on the mesh's device, the same on every rank.
    """
    held = [(p, p.grad) for p in parameters if p.grad is not None]
    squares: dict[tuple[str, ...], list[torch.Tensor]] = {}
    locals_ = []
    for parameter, unsettled in held:
        gradient = parameter.grad = settle(unsettled, parameter)
        axes = split_axes(gradient)
        if isinstance(gradient, DTensor):
            gradient = gradient.to_local()
        locals_.append(gradient)
        if any(parameter is twin for twin in twins):
            continue
        wide = torch.promote_types(gradient.dtype, torch.float32)
        squares.setdefault(axes, []).append(gradient.to(wide).square().sum())
    if not held:
        raise ValueError("no parameter has a gradient; clip after the backward")
    device = mesh.device_type if mesh is not None else locals_[0].device
    sums = {axes: torch.stack(terms).sum().to(device) for axes, terms in squares.items()}
    for axis in AXES:
        split = [axes for axes in sorted(sums) if axis in axes]
        if split:
            together = sum_over(torch.stack([sums[axes] for axes in split]), mesh, (axis,))
            sums.update(zip(split, together, strict=True))
    total = torch.stack(list(sums.values())).sum()
    norm = sum_over(total, mesh, ("pipeline",)).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in locals_:
        gradient.mul_(scale.to(gradient))
    return norm


def split_axes(tensor: torch.Tensor) -> tuple[str, ...]:
    """The mesh's axes along which ranks hold different pieces of a tensor."""
    if not isinstance(tensor, DTensor):
        return ()
    names = tensor.device_mesh.mesh_dim_names or ()
    splits = zip(names, tensor.placements, strict=True)
    return tuple(name for name, placement in splits if not placement.is_replicate())
