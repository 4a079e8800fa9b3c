"""What a layout costs a rank, without the machines: memory, collectives, padding.

    python -m dh_torch_bridge.plan --ranks 1024 model=... distributed=fsdp_tp

A step runs with tensors that have shapes and no numbers (`FakeTensorMode`), on one rank of a
process group that sends nothing, through the very code that trains. Measured so are the places of
a pipeline: first, middle and last. Not counted: the allocator's own waste, what attention kernels
of a GPU save or spare, and the process group's buffers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# Registers the backend "fake".
from torch.testing._internal.distributed import fake_pg  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM

from dh_jax.compose import compose
from dh_jax.config import DistributedConfig, TorchRunConfig
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, UserError
from dh_jax.models.pretrained import find_folder
from dh_torch_bridge.distributed.mesh import (
    AXES,
    Sizes,
    load_distributed_config,
    mesh_sizes,
    validate,
)
from dh_torch_bridge.distributed.parallelism import check_tensor
from dh_torch_bridge.distributed.parallelize import check_batch, lay_out, tensor_loss
from dh_torch_bridge.distributed.pipeline import check_pipeline, cut, make_schedule, stage_places
from dh_torch_bridge.losses import token_losses
from dh_torch_bridge.meter import Meter, Traffic
from dh_torch_bridge.train import build_llama


class RankPlan(NamedTuple):
    """One place in the pipeline; ranks that differ on other axes only cost the same."""

    place: int  # on the pipeline axis
    parameters: int  # elements that the rank holds
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int  # AdamW's two moments
    peak_bytes: int  # all of these, gathered blocks and activations, at the worst moment
    padding: float  # share of the sharded elements, as sent, that are filling
    traffic: dict[tuple[str, str], Traffic]  # by axis and kind, of one step

    @property
    def sent_bytes(self) -> int:
        """Bytes that the rank sends in one step."""
        return sum(t.bytes for t in self.traffic.values())


class Plan(NamedTuple):
    """A layout's cost, or why it cannot be."""

    ranks: int
    sizes: Sizes | None
    parameters: int  # of the whole model
    problem: str | None
    places: tuple[RankPlan, ...] = ()


def plan(
    build: Callable[[], nn.Module],
    config: DistributedConfig,
    ranks: int,
    *,
    rows: int,
    tokens: int,
    autocast: torch.dtype | None = None,
) -> Plan:
    """The cost of one training step on so many ranks.

    Args:
        build: makes the model; called under ``torch.device("meta")``, so that it costs nothing.
        rows: of the global batch.
        tokens: of a row.

    Returns:
        For an impossible layout a plan with ``problem``, the text of the ConfigError that ranks
        would stop with.

    Raises:
        RuntimeError: the process is a rank of something already.
    """
    if dist.is_initialized():
        raise RuntimeError("plan starts a process group of its own; call it in another process")
    with torch.device("meta"):
        model = build()
    size = sum(p.numel() for p in model.parameters())
    sizes = None
    try:
        sizes = mesh_sizes(validate(config), ranks)
        if sizes.pipeline > 1:
            check_pipeline(model, config, sizes.pipeline)
        if sizes.tensor > 1:
            check_tensor(model, sizes.tensor)
        if rows % (sizes.replicate * sizes.shard):
            raise ConfigError(
                f"{rows} rows do not split over {sizes.replicate * sizes.shard} data-parallel "
                "ranks; take a multiple"
            )
        places = []
        with _pretended(ranks, sizes) as mesh:
            mine = rows // (sizes.replicate * sizes.shard)
            check_batch(config, mesh, mine, tokens)
            for place in sorted({0, sizes.pipeline // 2, sizes.pipeline - 1}):
                with torch.device("meta"):
                    model = build()
                places.append(_measure(model, config, mesh, place, (mine, tokens), autocast))
    except ConfigError as error:
        return Plan(ranks, sizes, size, str(error))
    return Plan(ranks, sizes, size, None, tuple(places))


@contextmanager
def _pretended(ranks: int, sizes: Sizes) -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", sizes, mesh_dim_names=AXES)
    finally:
        dist.destroy_process_group()


def _measure(
    model: nn.Module,
    config: DistributedConfig,
    mesh: DeviceMesh,
    place: int,
    shape: tuple[int, int],
    autocast: torch.dtype | None,
) -> RankPlan:
    """One place of the pipeline, whose stages rank 0 runs in its stead."""
    pipeline = mesh["pipeline"].size()
    parts: dict[int, nn.Module] = {0: model}
    if pipeline > 1:
        parts = dict(cut(model, config, pipeline, place, autocast))
    for part in parts.values():
        lay_out(part, config, mesh)
    with FakeTensorMode(allow_non_fake_inputs=True), Meter(mesh) as meter:
        for part in parts.values():
            part.to_empty(device="cpu")
        parameters = {id(p): p for part in parts.values() for p in part.parameters()}
        meter.hold(parameters.values())
        batch = {
            name: torch.zeros(shape, dtype=torch.int32)
            for name in ("input_ids", "position_ids", "segment_ids")
        }
        batch["shift_labels"] = torch.zeros(shape, dtype=torch.int64)
        with tensor_loss(mesh):
            if pipeline > 1:
                _run_stages(parts, config, mesh, place, batch, meter)
            else:
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    losses_BT = token_losses(model, batch)
                losses_BT.sum().backward()
                del losses_BT
        if config.strategy == "ddp":
            meter.add_reduction("replicate", sum(p.nbytes for p in parameters.values()))
        local = {key: _local(p) for key, p in parameters.items()}
        held = sum(p.nbytes for p in local.values())
        gradients = sum(_local(p.grad).nbytes for p in parameters.values() if p.grad is not None)
        return RankPlan(
            place=place,
            parameters=sum(p.numel() for p in local.values()),
            parameter_bytes=held,
            gradient_bytes=gradients,
            optimizer_bytes=2 * held,
            peak_bytes=meter.peak + 2 * held,
            padding=_padding([*parameters.values()]),
            traffic=meter.traffic,
        )


def _run_stages(
    parts: dict[int, nn.Module],
    config: DistributedConfig,
    mesh: DeviceMesh,
    rank: int,
    batch: dict[str, torch.Tensor],
    meter: Meter,
) -> None:
    """What the schedule has this rank do, in its order. A backward that a schedule splits is
    done at its second half: what the first frees is counted as held until then."""
    first = stage_places(config, mesh["pipeline"].size(), 0)
    stages = dict(zip(first, parts.values(), strict=True))
    schedule = make_schedule(stages, config, mesh, torch.device("cpu"))
    count = schedule._n_microbatches
    microbatch = {name: tensor[: len(tensor) // count] for name, tensor in batch.items()}
    rows, tokens = microbatch["input_ids"].shape
    if config.sequence_parallel:
        tokens //= mesh["tensor"].size()
    any_part: Any = next(iter(parts.values()))
    dtype = getattr(torch, config.param_dtype) if config.param_dtype else _dtype_of(any_part)
    left = {place: count for place in parts}
    # First in, first out: torch 2.13's table for 1F1B counts the last rank's forwards from 1.
    running: dict[int, deque[tuple[torch.Tensor, torch.Tensor]]] = {p: deque() for p in parts}
    for action in schedule.pipeline_order[rank]:
        if action is None:
            continue
        place, kind = action.stage_index, action.computation_type.name
        part: Any = parts[place]
        if kind == "FORWARD":
            inputs = microbatch["input_ids"]
            if not part.first:
                shape = (rows, tokens, part.config.hidden_size)
                inputs = torch.empty(shape, dtype=dtype, requires_grad=True)
            output = part(inputs, **{k: v for k, v in microbatch.items() if k != "input_ids"})
            running[place].append((inputs, output))
            if not part.last and place + 1 not in parts:
                meter.send("pipeline", "send", output.nbytes)
        elif kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT"):
            inputs, output = running[place].popleft()
            left[place] -= 1
            if isinstance(part, FSDPModule):  # sums over ranks wait for the last microbatch
                part.set_is_last_backward(not left[place])
                part.set_requires_gradient_sync(not left[place])
                part.set_reshard_after_backward(not left[place])
            output.backward(torch.empty_like(output))
            if not part.first and place - 1 not in parts:
                meter.send("pipeline", "send", inputs.nbytes)
            del inputs, output


def _dtype_of(part: nn.Module) -> torch.dtype:
    return next(part.parameters()).dtype


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _padding(parameters: list[Any]) -> float:
    """FSDP2 splits the first dimension and fills it up to a multiple of the ranks."""
    real = padded = 0
    for p in parameters:
        names = (p.device_mesh.mesh_dim_names or ()) if isinstance(p, DTensor) else ()
        for name, placement in zip(names, getattr(p, "placements", ()), strict=True):
            if name == "shard" and placement.is_shard():
                rows, ranks = p.shape[0], p.device_mesh["shard"].size()
                if "tensor" in names and any(
                    other == "tensor" and split.is_shard(0)
                    for other, split in zip(names, p.placements, strict=True)
                ):
                    rows //= p.device_mesh["tensor"].size()
                rest = math.prod(p.shape[1:])
                real += rows * rest
                padded += -(-rows // ranks) * ranks * rest
    return 1 - real / padded if padded else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if some layout can be, 2 if none can or the arguments are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m dh_torch_bridge.plan",
        description="What a layout of ranks costs each of them, without the machines. "
        "Overrides are those of dh_torch_bridge.train: model=..., distributed=fsdp_tp, "
        "training.batch_size=... (rows of the global batch), data.max_length=...",
    )
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument(
        "--layouts", nargs="*", default=[], metavar="AXIS=N,...",
        help="several beside one another, for example shard=8,tensor=2 pipeline=2,shard=8",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    asked = parser.parse_intermixed_args(arguments)
    try:
        run = compose("torch_train", TorchRunConfig, asked.overrides)
        build = _builder(run)
        plans = []
        for layout in asked.layouts or [""]:
            said = f"planning {layout or 'the layout'} on {asked.ranks:,} ranks"
            print(said, file=sys.stderr, flush=True)
            config = run.distributed
            if layout:
                sizes = ["shard=1", "replicate=1", "tensor=1", "pipeline=1", *layout.split(",")]
                config = load_distributed_config(config, ["strategy=fsdp2", *sizes])
            plans.append(
                plan(
                    build, config, asked.ranks,
                    rows=run.training.batch_size, tokens=run.data.max_length,
                    autocast=torch.bfloat16 if run.model.dtype == "bfloat16" else None,
                )
            )  # fmt: skip
    except UserError as error:
        print(f"dh_torch_bridge.plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps([as_json(p) for p in plans], indent=1) if asked.json else table(plans))
    return 0 if any(p.problem is None for p in plans) else 2


def _builder(run: TorchRunConfig) -> Callable[[], nn.Module]:
    ids = run.model.vocab_size
    if run.model.pretrained is not None:
        shape = AutoConfig.from_pretrained(find_folder(run.model.pretrained))
        return lambda: AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")
    if ids is None:
        ids = TokenizerWrapper.load(run.data.tokenizer).vocab_size
    return lambda: build_llama(run.model, ids)


def as_json(made: Plan) -> dict[str, Any]:
    """A plan in JSON's types; bytes are bytes, ``traffic`` is by axis and kind."""
    return {
        "ranks": made.ranks,
        "sizes": made.sizes and made.sizes._asdict(),
        "parameters": made.parameters,
        "problem": made.problem,
        "places": [
            {
                **place._asdict(),
                "sent_bytes": place.sent_bytes,
                "traffic": [
                    {"axis": axis, "kind": kind, **traffic._asdict()}
                    for (axis, kind), traffic in place.traffic.items()
                ],
            }
            for place in made.places
        ],
    }


def table(plans: Sequence[Plan]) -> str:
    """Plans as text: a line for each place and each kind of collective, or what is wrong."""
    lines = []
    for made in plans:
        sizes = made.sizes._asdict() if made.sizes else {}
        named = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "one rank"
        lines.append(f"{made.ranks} ranks ({named}), {made.parameters:,} parameters")
        if made.problem:
            lines.append(f"  cannot be: {made.problem}")
        for place in made.places:
            who = f"pipeline stage {place.place}" if len(made.places) > 1 else "every rank"
            lines.append(
                f"  {who}: {place.parameters:,} parameters here, {place.padding:.1%} padding"
            )
            lines.append(
                f"    memory   {_size(place.peak_bytes)} at the peak: "
                f"parameters {_size(place.parameter_bytes)}, "
                f"gradients {_size(place.gradient_bytes)}, "
                f"AdamW {_size(place.optimizer_bytes)}, the rest gathered blocks and activations"
            )
            lines.append(f"    a step   {_size(place.sent_bytes)} sent by a rank, of it")
            for (axis, kind), traffic in place.traffic.items():
                size = _size(traffic.bytes)
                lines.append(f"      {axis:<10} {kind:<15} {traffic.times:>6} calls {size:>12}")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main())
