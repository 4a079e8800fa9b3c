"""Running `dh train` in processes of its own: one, or several that form one run."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

SMALL = (
    "model.vocab_size=768", "model.width=128", "model.layers=1", "model.heads=2",
    "model.kv_heads=2", "model.mlp_width=128", "training.batch_size=8", "training.eval_interval=10",
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
            # Most of such a run is compilation, which may as well be quick.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
            }
        arguments = ["train", *self.overrides(out, *overrides)]
        return [
            subprocess.Popen(
                [sys.executable, "-m", "dh_jax.cli", *arguments],
                env=environment | ({"JAX_PROCESS_ID": str(index)} if processes > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for index in range(processes)
        ]

    def overrides(self, out: Path, *more: str) -> list[str]:
        """What a run is composed of."""
        return [f"data={self.data}", *SMALL, f"out={out}", *more]

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


def write_data(config: Any, folder: Path) -> Path:
    """A data config as a YAML file."""
    path = folder / "small.yaml"
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(config)), path)
    return path
