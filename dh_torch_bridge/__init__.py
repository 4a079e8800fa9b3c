"""The same data and the same steering for trainers written in torch.

The names below are imported when first used, as in `dh_jax`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dh_jax.config import load_data_config
    from dh_jax.data.datasets.sft import SFTDataset
    from dh_jax.influence.optimizer import InfluenceAwareOptimizer
    from dh_torch_bridge.data import document_mask, get_loader
    from dh_torch_bridge.distributed.mesh import data_shard, load_distributed_config, make_mesh
    from dh_torch_bridge.distributed.parallelize import (
        clip,
        distribute,
        forward_backward,
        parallelize,
    )

_HOMES = {
    "InfluenceAwareOptimizer": "dh_jax.influence.optimizer",
    "SFTDataset": "dh_jax.data.datasets.sft",
    "data_shard": "dh_torch_bridge.distributed.mesh",
    "clip": "dh_torch_bridge.distributed.parallelize",
    "distribute": "dh_torch_bridge.distributed.parallelize",
    "document_mask": "dh_torch_bridge.data",
    "forward_backward": "dh_torch_bridge.distributed.parallelize",
    "get_loader": "dh_torch_bridge.data",
    "load_data_config": "dh_jax.config",
    "load_distributed_config": "dh_torch_bridge.distributed.mesh",
    "make_mesh": "dh_torch_bridge.distributed.mesh",
    "parallelize": "dh_torch_bridge.distributed.parallelize",
}

__all__ = [
    "InfluenceAwareOptimizer",
    "SFTDataset",
    "clip",
    "data_shard",
    "distribute",
    "document_mask",
    "forward_backward",
    "get_loader",
    "load_data_config",
    "load_distributed_config",
    "make_mesh",
    "parallelize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
