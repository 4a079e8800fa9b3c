"""Running `dh train` in processes of its own: one, or several that form one run."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

SMALL = (
    "model.width=128", "model.layers=1", "model.heads=2", "model.kv_heads=2",
    "model.mlp_width=128", "training.batch_size=8", "training.eval_interval=10",
    "training.eval_rows=8", "training.warmup=2",
)  # fmt: skip


class Command:
    """Starts runs on simulated devices; compiled code is shared between processes."""

    def __init__(self, data: Path, cache: Path):
        self.data, self.cache = data, cache

    def start(
        self, out: Path, *overrides: str, devices: int = 1, processes: int = 1
    ) -> list[subprocess.Popen[bytes]]:
        """One run of ``processes`` processes with ``devices`` devices each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
            }
        arguments = ["train", f"data={self.data}", *SMALL, f"out={out}", *overrides]
        return [
            subprocess.Popen(
                [sys.executable, "-m", "dh_jax.cli", *arguments],
                env=environment | ({"JAX_PROCESS_ID": str(index)} if processes > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for index in range(processes)
        ]

    def run(self, out: Path, *overrides: str, **sizes: int) -> list[str]:
        """Run to the end; what each process printed."""
        return finish(self.start(out, *overrides, **sizes))


def finish(running: list[subprocess.Popen[bytes]], code: int = 0) -> list[str]:
    """Wait for all processes of a run; what each printed."""
    printed = [process.communicate(timeout=240)[0].decode() for process in running]
    assert [process.returncode for process in running] == [code] * len(running), printed
    return printed


def records(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records of one kind in a run's log."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(out: Path) -> list[float]:
    """The training losses in a run's log."""
    return [record["loss"] for record in records(out)]


@pytest.fixture(scope="session")
def train_command(
    make_config: Callable[..., Any], store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Command:
    """`dh train` of a tiny model on the prepared store of the small corpora."""
    return Command(
        write_data(make_config(store=str(store)), tmp_path_factory), _cache(tmp_path_factory)
    )


@pytest.fixture(scope="session")
def stream_command(
    make_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Command:
    """The same from streamed sources."""
    return Command(write_data(make_config(), tmp_path_factory), _cache(tmp_path_factory))


def _cache(factory: pytest.TempPathFactory) -> Path:
    return factory.mktemp("compiled")


def write_data(config: Any, factory: pytest.TempPathFactory) -> Path:
    """A data config as a YAML file."""
    path = factory.mktemp("config") / "small.yaml"
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(config)), path)
    return path
