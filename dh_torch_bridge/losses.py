"""Losses token by token, also where tensor ranks hold parts of the vocabulary."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from dh_torch_bridge.data import TorchBatch, document_mask
from dh_torch_bridge.families import config_of, refuse_other_attention
from dh_torch_bridge.labels import IGNORED


def token_losses(model: nn.Module, batch: TorchBatch) -> torch.Tensor:
    """Cross-entropy ``[B, T]`` in nats, float32 or wider, 0 where nothing is learnt.

    Raises:
        ConfigError: as `refuse_other_attention`.
    """
    refuse_other_attention(config_of(model), batch["input_ids"].shape[1])
    logits_BTV = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=document_mask(batch["segment_ids"]),
    ).logits
    return losses_of_logits(logits_BTV, batch["shift_labels"])


def losses_of_logits(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy ``[B, T]`` of logits, which tensor ranks may hold in parts (a DTensor).

    Of parts, ranks exchange three numbers a token instead of the logits, as long as this and the
    backward run under `torch.distributed.tensor.parallel.loss_parallel`.
    """
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    loss_BT = cross_entropy(
        logits_BTV.to(wide).transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none"
    )
    return loss_BT.to_local() if isinstance(loss_BT, DTensor) else loss_BT
