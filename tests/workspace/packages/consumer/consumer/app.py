"""A Hydra application with its own configs that picks its data from data-handler's."""

from __future__ import annotations

import json

import hydra
from omegaconf import DictConfig

import dh_jax
import dh_torch_bridge
from dh_jax.config import config_folder


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Print what came of the choice on the command line, as one line of JSON."""
    by_name = dh_jax.load_data_config("mixed_pretrain")
    composed = dh_torch_bridge.load_data_config(config.data)
    seen = {
        "by_name": {name: source.weight for name, source in by_name.sources.items()},
        "composed": {name: source.weight for name, source in composed.sources.items()},
        "max_length": composed.max_length,
        "configs": str(config_folder()),
        "exported": {
            face.__name__: [
                f"{obj.__module__}.{obj.__qualname__}"
                for obj in (face.get_loader, face.InfluenceAwareOptimizer)
            ]
            for face in (dh_jax, dh_torch_bridge)
        },
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
