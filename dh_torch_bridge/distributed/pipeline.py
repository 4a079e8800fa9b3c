"""Pipeline parallelism: stages of consecutive layers, and schedules that keep ranks busy.

Schedules are those of `torch.distributed.pipelining`: GPipe (Huang et al. 2019,
arXiv:1811.06965), 1F1B and its interleaved form (Narayanan et al. 2021, arXiv:2104.04473), and
two of zero bubble (Qi et al. 2024, arXiv:2401.10241): interleaved, and ZBV with its V of stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from dh_jax.config import DistributedConfig
from dh_jax.errors import ConfigError
from dh_torch_bridge.data import document_mask
from dh_torch_bridge.distributed.mesh import SCHEDULES, stages_of_rank
from dh_torch_bridge.distributed.parallelism import is_llama
from dh_torch_bridge.families import STAGED, config_of, refuse_other_attention
from dh_torch_bridge.losses import losses_of_logits

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


class Stage(nn.Module):
    """Consecutive layers of a Llama-family model, with the embedding first and the loss last.

    Names of parameters are those of the whole model; a layer of another stage is None.
    """

    def __init__(self, whole: nn.Module, layers: range, *, autocast: torch.dtype | None) -> None:
        super().__init__()
        body: Any = whole.model
        self.first, self.last = layers.start == 0, layers.stop == len(body.layers)
        self.config = whole.config
        self.autocast = autocast
        mine: Any = nn.Module()
        self.model = mine
        mine.embed_tokens = body.embed_tokens if self.first else None
        mine.layers = nn.ModuleList()
        for index, layer in enumerate(body.layers):
            mine.layers.add_module(str(index), layer if index in layers else None)
        mine.norm = body.norm if self.last else None
        mine.rotary_emb = body.rotary_emb
        head: Any = whole.lm_head if self.last else None
        self.lm_head: nn.Module | None = head

    def forward(
        self,
        inputs: torch.Tensor,
        position_ids: torch.Tensor,
        segment_ids: torch.Tensor,
        shift_labels: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states ``[B, T, D]`` (ids ``[B, T]`` into the first stage) to hidden states, or
        out of the last stage the loss of every token, ``[B, T]``.

        Raises:
            ConfigError: as `refuse_other_attention`.
        """
        refuse_other_attention(self.config, position_ids.shape[1])
        with torch.autocast(
            position_ids.device.type, self.autocast, enabled=self.autocast is not None
        ):
            body: Any = self.model
            hidden_BTD = body.embed_tokens(inputs) if self.first else inputs
            rotations = body.rotary_emb(hidden_BTD, position_ids=position_ids)
            mask = document_mask(segment_ids)
            for layer in body.layers:
                if layer is not None:
                    hidden_BTD = layer(
                        hidden_BTD,
                        attention_mask=mask,
                        position_ids=position_ids,
                        position_embeddings=rotations,
                    )
            if not self.last:
                return hidden_BTD
            assert self.lm_head is not None
            logits_BTV = self.lm_head(body.norm(hidden_BTD))
        return losses_of_logits(logits_BTV, shift_labels).clone()  # FSDP2 dislikes views


def check_pipeline(model: nn.Module, config: DistributedConfig, pipeline: int) -> None:
    """Refuse models without stages, and layers or microbatches too few for them.

    Raises:
        ConfigError: names the number, what it must be and the cure.
    """
    family = getattr(config_of(model), "model_type", None)
    if not is_llama(model) or family not in STAGED:
        raise ConfigError(
            f"distributed.pipeline={pipeline}: {type(model).__name__} cannot be cut into stages; "
            f"families that can: {', '.join(STAGED)}; or take pipeline=1"
        )
    layers, stages = _count_layers(model), pipeline * stages_of_rank(config)
    if layers < stages:
        raise ConfigError(
            f"the model's {layers} layers are too few for {stages} pipeline stages "
            f"(pipeline={pipeline}, {stages_of_rank(config)} a rank); set distributed.pipeline or "
            "distributed.stages lower"
        )
    microbatches_of(config, pipeline)


def microbatches_of(config: DistributedConfig, pipeline: int, batch_size: int | None = None) -> int:
    """Parts of a rank's batch that are in the pipeline one after another.

    Args:
        batch_size: rows of one data-parallel rank, if known.

    Raises:
        ConfigError: fewer than stages, no divisor of the rows, or not what the schedule takes.
    """
    stages = pipeline * stages_of_rank(config)
    parts = stages if config.microbatches is None else config.microbatches
    if parts < stages:
        raise ConfigError(
            f"distributed.microbatches is {parts}, fewer than the {stages} stages; "
            f"set it to {stages} or more, or null"
        )
    rounds = max(1, parts // pipeline)
    if config.schedule.startswith("interleaved") and parts % rounds:
        raise ConfigError(
            f"distributed.microbatches={parts} with {config.schedule} must be a multiple of "
            f"pipeline={pipeline}; take {parts // pipeline * pipeline}"
        )
    if batch_size is not None and batch_size % parts:
        raise ConfigError(
            f"a data-parallel rank's {batch_size} rows do not make {parts} microbatches; "
            f"take a multiple of {parts} rows a rank, or set distributed.microbatches"
        )
    return parts


def cut(
    model: nn.Module,
    config: DistributedConfig,
    pipeline: int,
    rank: int,
    autocast: torch.dtype | None,
) -> dict[int, Stage]:
    """The stages of one rank of so many on the pipeline axis, by their place in the pipeline."""
    cuts = _cuts(_count_layers(model), pipeline * stages_of_rank(config))
    return {
        place: Stage(model, range(cuts[place], cuts[place + 1]), autocast=autocast)
        for place in stage_places(config, pipeline, rank)
    }


def stage_places(config: DistributedConfig, pipeline: int, rank: int) -> list[int]:
    """Where a rank's stages stand: every so many ranks, or down the ranks and up again (ZBV)."""
    if config.schedule == "zbv":
        return [rank, 2 * pipeline - 1 - rank]
    return [rank + pipeline * i for i in range(stages_of_rank(config))]


def _count_layers(model: nn.Module) -> int:
    blocks: Any = model.get_submodule("model.layers")
    return len(blocks)


def _cuts(layers: int, stages: int) -> list[int]:
    """Where stages begin. Layers left over go to the middle: the ends have table and head."""
    sizes = [layers // stages] * stages
    left = layers % stages
    for place in range((stages - left) // 2, (stages - left) // 2 + left):
        sizes[place] += 1
    return [sum(sizes[:place]) for place in range(stages + 1)]


def make_schedule(
    parts: dict[int, nn.Module], config: DistributedConfig, mesh: DeviceMesh, device: torch.device
) -> Any:
    """The schedule of `torch.distributed.pipelining` over this rank's stages.

    Its loss is the sum of the token losses times the keyword ``scale``, so that microbatches
    with few targets weigh no more than their targets do.
    """
    group = mesh.get_group("pipeline")
    total = mesh["pipeline"].size() * len(parts)
    stages = [
        PipelineStage(part, place, total, device, group=group) for place, part in parts.items()
    ]

    def loss_of(loss_BT: torch.Tensor, _: Any, *, scale: torch.Tensor) -> torch.Tensor:
        return loss_BT.sum() * scale

    kind: Any = get_schedule_class(SCHEDULES[config.schedule][0])
    return kind(
        stages[0] if SCHEDULES[config.schedule][1] == 1 else stages,
        microbatches_of(config, mesh["pipeline"].size()),
        loss_fn=loss_of,
        scale_grads=False,
    )


def tied_parameters(parts: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The tied embedding of the first stage and the head of the last, as far as they are here."""
    return [
        parameter
        for part in parts
        for name, parameter in part.named_parameters()
        if name in (HEAD, TABLE)
    ]


def add_tied_gradients(parts: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Give both `tied_parameters` the sum of their gradients, so that equal steps keep them
    equal. Call it before clipping, on every rank, with the gradients of one backward alone."""
    ranks = dist.get_process_group_ranks(mesh.get_group("pipeline"))
    mine = tied_parameters(parts)
    locals_ = [_local(parameter.grad) for parameter in mine]
    if len(locals_) == 2:  # a V: both ends are here
        total = locals_[0] + locals_[1]
        for gradient in locals_:
            gradient.copy_(total)
    elif locals_:
        ours = locals_[0].to(mesh.device_type)
        theirs = torch.empty_like(ours)
        peer = ranks[-1] if dist.get_rank() == ranks[0] else ranks[0]
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, ours, peer), dist.P2POp(dist.irecv, theirs, peer)]
        ):
            work.wait()
        locals_[0].add_(theirs.to(locals_[0].device))


def _local(gradient: Any) -> torch.Tensor:
    if gradient is None:
        raise RuntimeError("a tied matrix has no gradient; call this after the backward")
    local: torch.Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local
