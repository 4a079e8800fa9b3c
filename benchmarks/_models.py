"""The trained models of the influence benchmarks, as npz files that torch children read too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(".bench/attribution")


def save(name: str, params: Any) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.npz"
    np.savez(path, **flat(params))
    return path


def load(name: str) -> dict[str, Any]:
    """Nested dictionary of float32 arrays."""
    out: dict[str, Any] = {}
    with np.load(FOLDER / f"{name}.npz") as file:
        for path in file.files:
            *parents, leaf = path.split("/")
            at = out
            for parent in parents:
                at = at.setdefault(parent, {})
            at[leaf] = file[path]
    return out


def flat(params: Any, prefix: str = "") -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for name, value in params.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}/")
        else:
            out[f"{prefix}{name}"] = np.asarray(value)
    return out
