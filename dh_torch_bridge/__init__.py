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
    from dh_torch_bridge.data import get_loader

_HOMES = {
    "InfluenceAwareOptimizer": "dh_jax.influence.optimizer",
    "SFTDataset": "dh_jax.data.datasets.sft",
    "get_loader": "dh_torch_bridge.data",
    "load_data_config": "dh_jax.config",
}

__all__ = ["InfluenceAwareOptimizer", "SFTDataset", "get_loader", "load_data_config"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
