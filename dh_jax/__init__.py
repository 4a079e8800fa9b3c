"""Data mixtures for language-model training that steer themselves by influence, in JAX.

The names below are imported when first used, so ``import dh_jax`` costs next to nothing: worker
processes and torch ranks import it too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dh_jax.batch import Batch, Origins
    from dh_jax.config import DataConfig, load_data_config
    from dh_jax.data.datasets.pretrain import PretrainDataset
    from dh_jax.data.datasets.sft import SFTDataset
    from dh_jax.data.loader import get_loader
    from dh_jax.data.mixing import MixedDataset
    from dh_jax.data.packing import PackedDataset
    from dh_jax.data.tokenization import TokenizerWrapper
    from dh_jax.distillation.cached import CachedTeacher
    from dh_jax.distillation.teacher import TeacherWrapper
    from dh_jax.influence.calculator import DataInfCalculator
    from dh_jax.influence.optimizer import InfluenceAwareOptimizer

    __version__: str

_HOMES = {
    "Batch": "dh_jax.batch",
    "CachedTeacher": "dh_jax.distillation.cached",
    "DataConfig": "dh_jax.config",
    "DataInfCalculator": "dh_jax.influence.calculator",
    "InfluenceAwareOptimizer": "dh_jax.influence.optimizer",
    "MixedDataset": "dh_jax.data.mixing",
    "Origins": "dh_jax.batch",
    "PackedDataset": "dh_jax.data.packing",
    "PretrainDataset": "dh_jax.data.datasets.pretrain",
    "SFTDataset": "dh_jax.data.datasets.sft",
    "TeacherWrapper": "dh_jax.distillation.teacher",
    "TokenizerWrapper": "dh_jax.data.tokenization",
    "get_loader": "dh_jax.data.loader",
    "load_data_config": "dh_jax.config",
}

__all__ = [
    "Batch",
    "CachedTeacher",
    "DataConfig",
    "DataInfCalculator",
    "InfluenceAwareOptimizer",
    "MixedDataset",
    "Origins",
    "PackedDataset",
    "PretrainDataset",
    "SFTDataset",
    "TeacherWrapper",
    "TokenizerWrapper",
    "__version__",
    "get_loader",
    "load_data_config",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.import_module("importlib.metadata").version("data-handler")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
