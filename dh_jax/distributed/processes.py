"""Joining the processes of one run, and leaving them."""

from __future__ import annotations

import os
import sys
from typing import Any

import jax

from dh_jax.config import MeshConfig
from dh_jax.errors import ConfigError

ENVIRONMENT = {  # of what the config leaves null
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}


def join(config: MeshConfig) -> int:
    """Make this process one of several; nothing happens where no coordinator is named.

    Every process is started with the same command. ``mesh.coordinator`` is the ``host:port`` of
    process 0, ``mesh.processes`` their number, ``mesh.process`` the index of this one; what is
    null is read from `ENVIRONMENT`. ``mesh.coordinator=auto`` asks the cluster for all three
    (Slurm, Open MPI, Kubernetes, Cloud TPU). Must run before anything touches a device.

    Returns:
        The index of this process.

    Raises:
        ConfigError: one of the three is missing or impossible.
    """
    if jax.distributed.is_initialized():
        return jax.process_index()
    found: dict[str, Any] = {
        key: getattr(config, key) if getattr(config, key) is not None else os.environ.get(name)
        for key, name in ENVIRONMENT.items()
    }
    address = found["coordinator"]
    if address == "auto":
        jax.distributed.initialize()
        return jax.process_index()
    missing = [key for key, value in found.items() if value is None]
    if len(missing) == len(found):
        return 0
    if missing:
        raise ConfigError(
            f"mesh.{missing[0]} is null, but a run of several processes needs it; set it, or the "
            f"environment's {ENVIRONMENT[missing[0]]}, or none of the three for one process"
        )
    try:
        count, index = int(found["processes"]), int(found["process"])
    except ValueError:
        count = index = -1
    host, _, port = str(address).rpartition(":")
    if not 0 <= index < count or not host or not port.isdigit():
        raise ConfigError(
            f"mesh.coordinator {address!r}, processes {found['processes']}, process "
            f"{found['process']}: give host:port, a positive count, and an index below it"
        )
    jax.distributed.initialize(address, count, index, cluster_detection_method="deactivate")
    return index


def leave(code: int, *, together: bool) -> int:
    """End this process if it is one of several; else hand the exit code back.

    The collectives' library (gloo) leaves threads behind that abort an ordinary exit now and
    then.

    Args:
        code: of the exit.
        together: all processes are leaving, so wait for them. One that fails alone does not wait:
            the others notice within two minutes.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return code
    if together:
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
