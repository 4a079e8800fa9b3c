"""Rows for influence: small samples of every training source and of every target probe.

The samplers have loaders of their own, so measuring influence takes nothing away from
training; their states are saved with the run's. Samples are small: every process draws all rows
and places its part of them, so that states fit any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dh_jax.batch import Batch
from dh_jax.config import DataConfig, InfluenceConfig
from dh_jax.data.loader import Loader, get_loader
from dh_jax.data.seeding import derive
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distributed.mesh import row_ways, to_device
from dh_jax.influence.optimizer import resolve_targets


class Samplers:
    """One loader for each training source and for each target probe; a context manager.

    Args:
        config: the run's data.
        influence: how many rows, how long, and which probes are targets with what weight.
        seed: of the samples; independent of the order of training.
    """

    def __init__(
        self,
        config: DataConfig,
        influence: InfluenceConfig,
        tokenizer: TokenizerWrapper,
        mesh: Mesh,
        *,
        seed: int,
    ):
        self._mesh = mesh
        most = max(influence.rows_per_source, influence.probe_rows) // row_ways(mesh)
        self.halvings = max(most, 1).bit_length() - 1  # how often samples can be halved
        probes = list(config.probes or config.sources)
        self.targets = resolve_targets(influence.targets, probes)

        def open_loader(name: str, split: str, rows: int) -> Loader:
            return get_loader(
                config,
                tokenizer=tokenizer,
                batch_size=rows,
                max_length=influence.row_length,
                split=split,
                seed=derive(seed, "influence", split),
                sources=[name],
                shuffle=True,
                repeat=True,
                prefetch=0,
            )

        self._loaders = {
            ("train", name): open_loader(name, "train", influence.rows_per_source)
            for name in config.sources
        }
        for name in self.targets:
            self._loaders["probe", name] = open_loader(name, "probe", influence.probe_rows)

    def draw(self, split: str, halvings: int = 0) -> dict[str, Batch]:
        """The next sample of every source (``train``) or of every target (``probe``).

        With ``halvings`` only the first rows of it, as many as the mesh can split.
        """
        return {
            name: to_device(self._part(next(loader), halvings), self._mesh, whole=True)
            for (kind, name), loader in self._loaders.items()
            if kind == split
        }

    def _part(self, batch: Batch, halvings: int) -> Batch:
        if not halvings:
            return batch
        ways = row_ways(self._mesh)
        rows = max(len(batch.tokens_BT) >> halvings, 1)
        rows = -(-rows // ways) * ways
        part: Batch = jax.tree.map(lambda x: x[:rows], batch)
        return part

    def loader(self, split: str, name: str) -> Loader:
        return self._loaders[split, name]

    def get_state(self) -> dict[str, Any]:
        return {f"{split}/{name}": x.get_state() for (split, name), x in self._loaders.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for (split, name), loader in self._loaders.items():
            loader.set_state(state[f"{split}/{name}"])

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()

    def __enter__(self) -> Samplers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
