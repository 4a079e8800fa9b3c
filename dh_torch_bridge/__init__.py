"""The same data and the same steering for trainers written in torch.

The names below are imported when first used, as in `dh_jax`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dh_jax.config import load_data_config
    from dh_jax.data.datasets.pretrain import PretrainDataset
    from dh_jax.data.datasets.sft import SFTDataset
    from dh_jax.data.mixing import MixedDataset
    from dh_jax.data.packing import PackedDataset
    from dh_torch_bridge.data import TorchLoader, document_mask, get_loader
    from dh_torch_bridge.distributed.checkpoint import Checkpoints
    from dh_torch_bridge.distributed.mesh import data_shard, load_distributed_config, make_mesh
    from dh_torch_bridge.distributed.parallelize import (
        clip,
        distribute,
        forward_backward,
        parallelize,
    )
    from dh_torch_bridge.influence import torch_objective, torch_params
    from dh_torch_bridge.optimizer import InfluenceAwareOptimizer, from_first_rank
    from dh_torch_bridge.pieces import measure_pieces, score_documents
    from dh_torch_bridge.runstate import restore_run, save_run
    from dh_torch_bridge.teacher import wrap_torch_teacher

_HOMES = {
    "Checkpoints": "dh_torch_bridge.distributed.checkpoint",
    "InfluenceAwareOptimizer": "dh_torch_bridge.optimizer",
    "MixedDataset": "dh_jax.data.mixing",
    "PackedDataset": "dh_jax.data.packing",
    "PretrainDataset": "dh_jax.data.datasets.pretrain",
    "SFTDataset": "dh_jax.data.datasets.sft",
    "TorchLoader": "dh_torch_bridge.data",
    "clip": "dh_torch_bridge.distributed.parallelize",
    "data_shard": "dh_torch_bridge.distributed.mesh",
    "distribute": "dh_torch_bridge.distributed.parallelize",
    "document_mask": "dh_torch_bridge.data",
    "forward_backward": "dh_torch_bridge.distributed.parallelize",
    "from_first_rank": "dh_torch_bridge.optimizer",
    "get_loader": "dh_torch_bridge.data",
    "load_data_config": "dh_jax.config",
    "load_distributed_config": "dh_torch_bridge.distributed.mesh",
    "make_mesh": "dh_torch_bridge.distributed.mesh",
    "measure_pieces": "dh_torch_bridge.pieces",
    "parallelize": "dh_torch_bridge.distributed.parallelize",
    "restore_run": "dh_torch_bridge.runstate",
    "save_run": "dh_torch_bridge.runstate",
    "score_documents": "dh_torch_bridge.pieces",
    "torch_objective": "dh_torch_bridge.influence",
    "torch_params": "dh_torch_bridge.influence",
    "wrap_torch_teacher": "dh_torch_bridge.teacher",
}

__all__ = [
    "Checkpoints",
    "InfluenceAwareOptimizer",
    "MixedDataset",
    "PackedDataset",
    "PretrainDataset",
    "SFTDataset",
    "TorchLoader",
    "clip",
    "data_shard",
    "distribute",
    "document_mask",
    "forward_backward",
    "from_first_rank",
    "get_loader",
    "load_data_config",
    "load_distributed_config",
    "make_mesh",
    "measure_pieces",
    "parallelize",
    "restore_run",
    "save_run",
    "score_documents",
    "torch_objective",
    "torch_params",
    "wrap_torch_teacher",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
