"""Influence in a model that ranks hold in pieces: gradients stay where they lie, and only their
inner products go over the wire.

Every rank draws the same rows and runs them through the model as it is spread (FSDP2, tensor
parallel), a row at a time; what each rank keeps of a row's gradient is its own piece. A measurement
holds as many pieces as there are rows and probes, and no rank ever holds a whole gradient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError, DataError
from dh_jax.influence.alignment import check_targets
from dh_jax.influence.checks import CURE, rows_with_targets
from dh_jax.influence.inner_products import (
    InnerProducts,
    alignment_of,
    influence_of,
    refuse_broken,
)
from dh_jax.influence.sources import GRADIENTS, Measure
from dh_torch_bridge.data import TorchBatch, as_torch
from dh_torch_bridge.distributed.gradients import split_axes
from dh_torch_bridge.distributed.mesh import AXES, pick_device, sum_over
from dh_torch_bridge.distributed.named import named_parameters
from dh_torch_bridge.distributed.parallelism import settle
from dh_torch_bridge.distributed.parallelize import Parallel, tensor_loss
from dh_torch_bridge.influence import TorchLoss, evaluating
from dh_torch_bridge.labels import IGNORED
from dh_torch_bridge.losses import token_losses

SEEN = ("input_ids", "position_ids", "segment_ids", "shift_labels")  # by a loss
CHUNK = 8  # rows that run at once
ALL = slice(None)


def measure_pieces(
    model: Parallel, loss: TorchLoss = token_losses, *, parameters: str = ".*", damping: float = 0.1
) -> Measure:
    """What `dh_jax.influence.sources.measured` measures, of a model in pieces; all ranks call it.

    Rows run in evaluation mode and in the precision of training; gradients that lie ready for the
    next step stay as they are.

    Args:
        model: from `parallelize`, without pipeline stages.
        loss: ``(model, batch) -> loss_BT``.
        parameters: regular expression searched for in the names of trained parameters.
        damping: of DataInf.

    Raises:
        ConfigError: the model has pipeline stages, or ``parameters`` matches nothing trained.
    """
    chosen, coverage = _chosen(model, parameters)

    def measure(
        needs: frozenset[str],
        sources: Mapping[str, Batch],
        probes: Mapping[str, Batch],
        targets: Mapping[str, float],
        /,
    ) -> tuple[dict[str, Any], float | None]:
        check_targets(targets, probes)
        targeted = {name: probes[name] for name in targets}
        seen: dict[str, Any] = {}
        with evaluating(model.parts[0]):
            if "target_loss" in needs:
                means = [_mean_loss(model, loss, *probe) for probe in targeted.items()]
                seen["target_loss"] = float(np.dot([*targets.values()], means))
            if not needs & GRADIENTS:
                return seen, None
            products = inner_products(model, loss, chosen, sources, targeted, targets)
        refuse_broken(products)
        if "influence_M" in needs:
            seen["influence_M"] = influence_of(products, damping)
        both = dict(zip(("alignment_M", "norm_M"), alignment_of(products), strict=True))
        return seen | {name: both[name] for name in needs & set(both)}, coverage

    return measure


def inner_products(
    model: Parallel,
    loss: TorchLoss,
    chosen: Mapping[str, nn.Parameter],
    sources: Mapping[str, Batch],
    probes: Mapping[str, Batch],
    targets: Mapping[str, float],
) -> InnerProducts:
    """Run the rows, and add up the products of the ranks' pieces; the same on every rank.

    Args:
        model: without pipeline stages.
        loss: of it, unreduced.
        chosen: parameters that gradients are taken of, by name.
        sources: name -> training rows, the same on every rank.
        probes: name -> held-out rows, likewise; those of ``targets``, in its order.
        targets: probe -> weight, summing to 1.

    Raises:
        DataError: rows hold nothing to learn.
    """
    valid = {name: rows_with_targets(f"source {name!r}", x) for name, x in sources.items()}
    kept: list[list[torch.Tensor]] = []
    with _set_aside(model):
        for batch in sources.values():
            for row in range(len(batch.tokens_BT)):
                seen = _tensors(model, batch, slice(row, row + 1))
                kept.append(_gradient(model, loss, chosen, seen, _mean_weights(seen)))
        for name, batch in probes.items():
            rows_with_targets(f"probe {name!r}", batch)
            seen = _tensors(model, batch)
            kept.append(_gradient(model, loss, chosen, seen, _mean_weights(seen)))
    tables = []
    for index in range(len(chosen)):
        pieces_NP = torch.stack([each[index] for each in kept])
        tables.append((pieces_NP @ pieces_NP.T).double())
        for each in kept:  # what has been multiplied is not needed again
            each[index] = each[index].new_empty(0)
    return InnerProducts(
        _over_ranks(model, chosen, tables),
        {name: parameter.numel() for name, parameter in chosen.items()},
        valid,
        dict(targets),
    )


def score_documents(
    model: Parallel,
    batch: Batch,
    query: Batch,
    max_segments: int,
    loss: TorchLoss = token_losses,
    *,
    parameters: str = ".*",
    cosine: bool = False,
) -> np.ndarray:
    """Plain influence of every document of packed rows on a query, without curvature: float32
    ``[B, S]``, positive = harmful; 0 where there is no such document, or nothing learnt of it.

    ``-<v, g_d>`` with a document's loss summed over its targets, one backward pass a document; no
    gradient but the query's outlasts its own. All ranks call it with the same rows, and get the
    same scores.

    Args:
        model: from `parallelize`, without pipeline stages.
        batch: segment ``s + 1`` of row ``b`` is scored in entry ``[b, s]``.
        query: ``v`` is the gradient of the mean over its rows of each row's mean loss.
        max_segments: S.
        loss: ``(model, batch) -> loss_BT``.
        parameters: as of `measure_pieces`.
        cosine: divided by both norms.

    Raises:
        ConfigError: as `measure_pieces`.
        DataError: a row has more than S documents, the query has no target, or a score is not
            finite; names the document's place.
    """
    chosen, _ = _chosen(model, parameters)
    rows_with_targets("the query", query)
    most = int(np.max(batch.segment_ids_BT))
    if most > max_segments:
        raise DataError(f"a row has {most} documents, above max_segments {max_segments}; raise it")
    shape = (len(batch.tokens_BT), max_segments)
    tables = [torch.zeros(*shape, 3, dtype=torch.float64) for _ in chosen]
    with evaluating(model.parts[0]), _set_aside(model):
        asked = _tensors(model, query)
        query_pieces = _gradient(model, loss, chosen, asked, _mean_weights(asked))
        for b in range(shape[0]):
            seen = _tensors(model, batch, slice(b, b + 1))
            learnt_BT = seen["shift_labels"] != IGNORED
            for s in range(shape[1]):
                weights_BT = learnt_BT & (seen["segment_ids"] == s + 1)
                if not weights_BT.any():  # the same on every rank
                    continue
                pieces = _gradient(model, loss, chosen, seen, weights_BT.float())
                for table, g, v in zip(tables, pieces, query_pieces, strict=True):
                    table[b, s] = torch.stack([g @ v, g @ g, v @ v])
    products_BS, squares_BS, square_BS = np.sum(
        [*_over_ranks(model, chosen, tables).values()], axis=0
    ).transpose(2, 0, 1)
    scores_BS = -products_BS
    if cosine:
        norms_BS = np.sqrt(squares_BS * square_BS)
        scores_BS = np.divide(scores_BS, norms_BS, np.zeros(shape), where=norms_BS != 0)
    for b, s in np.argwhere(~np.isfinite(scores_BS)):
        raise DataError(f"document {s} of row {b}: score is not finite; {CURE}")
    return scores_BS.astype(np.float32)


def _chosen(model: Parallel, parameters: str) -> tuple[dict[str, nn.Parameter], float]:
    """The trained parameters that match, and their share of all trained, in entries."""
    if model.schedule is not None:
        raise ConfigError("pipeline ranks hold stages, of which no loss can be asked by row")
    trained = {name: p for name, p in named_parameters(model) if p.requires_grad}
    chosen = {name: p for name, p in trained.items() if re.search(parameters, name)}
    if not chosen:
        raise ConfigError(f"parameters {parameters!r} matches none that is trained")
    entries = [sum(p.numel() for p in some.values()) for some in (chosen, trained)]
    return chosen, entries[0] / entries[1]


def _mean_weights(seen: TorchBatch) -> torch.Tensor:
    """``[B, T]``, of the mean over rows that have a target of each row's mean loss."""
    learnt_BT = seen["shift_labels"] != IGNORED
    counts_B = learnt_BT.sum(1, keepdim=True)
    valid = (counts_B > 0).sum()
    return learnt_BT / (counts_B.clamp(min=1) * valid.clamp(min=1))


def _gradient(
    model: Parallel,
    loss: TorchLoss,
    chosen: Mapping[str, nn.Parameter],
    seen: TorchBatch,
    weights_BT: torch.Tensor,
) -> list[torch.Tensor]:
    """This rank's pieces, flat and at least float32, of the gradient of the losses' weighted sum.

    Data-parallel ranks run the same rows, so the mean over ranks, which FSDP2 and DDP take, is it.
    """
    for start in range(0, len(weights_BT), CHUNK):
        part = {name: x[start : start + CHUNK] for name, x in seen.items()}
        with torch.enable_grad(), tensor_loss(model.mesh):
            loss_BT = _losses(model, loss, part)
            (loss_BT * weights_BT[start : start + CHUNK]).sum().backward()
    pieces = []
    for parameter in chosen.values():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        settled = settle(found.detach(), parameter)
        local = settled.to_local() if isinstance(settled, DTensor) else settled
        wide = torch.promote_types(local.dtype, torch.float32)
        # Copied, since FSDP2's pieces of a block look into one buffer, which would stay with them.
        pieces.append(local.flatten().to(wide, copy=True))
    for parameter in model.parameters():
        parameter.grad = None
    return pieces


def _mean_loss(model: Parallel, loss: TorchLoss, name: str, batch: Batch) -> float:
    """Of all targets of a probe, nats."""
    rows_with_targets(f"probe {name!r}", batch)
    seen = _tensors(model, batch)
    with torch.no_grad(), tensor_loss(model.mesh):
        total = _losses(model, loss, seen).sum()
    mean = float(total / (seen["shift_labels"] != IGNORED).sum())
    if not math.isfinite(mean):
        raise DataError(f"probe {name!r}: the loss is {mean}; {CURE}")
    return mean


def _losses(model: Parallel, loss: TorchLoss, batch: TorchBatch) -> torch.Tensor:
    device = batch["input_ids"].device.type
    with torch.autocast(device, model.autocast, enabled=model.autocast is not None):
        return loss(model.parts[0], batch)


def _tensors(model: Parallel, batch: Batch, rows: slice = ALL) -> TorchBatch:
    host = Batch._make([*(np.array(x[rows]) for x in batch[:6]), None])
    device = pick_device(model.config)
    return {name: x.to(device) for name, x in as_torch(host, SEEN).items()}


def _over_ranks(
    model: Parallel, chosen: Mapping[str, nn.Parameter], tables: list[torch.Tensor]
) -> dict[str, np.ndarray]:
    """Every tensor's products added up over the ranks that have another piece of it."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for index, parameter in enumerate(chosen.values()):
        alike.setdefault(split_axes(parameter), []).append(index)
    device = "cpu" if model.mesh is None else model.mesh.device_type
    found: dict[int, np.ndarray] = {}
    for axes, indices in sorted(alike.items()):  # in one order on all ranks
        together = torch.stack([tables[index] for index in indices]).to(device)
        together = sum_over(together, model.mesh, [axis for axis in AXES if axis in axes])
        found.update(zip(indices, together.cpu().numpy(), strict=True))
    return {name: found[index] for index, name in enumerate(chosen)}


@contextmanager
def _set_aside(model: Parallel) -> Iterator[None]:
    """Within it no parameter has a gradient; behind it each has its own again."""
    before = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient
