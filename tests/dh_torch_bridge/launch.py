"""Starting ranks for tests, and the data config that they are given."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from dh_jax.config import DataConfig

ROOT = Path(__file__).resolve().parents[2]


def torchrun(
    *arguments: str, ranks: int = 2, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc-per-node={ranks}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=timeout,
        check=False,
    )


def written(config: DataConfig, folder: Path) -> Path:
    """A data config as the YAML file that a command line names."""
    path = folder / "small.yaml"
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(config)), path)
    return path
