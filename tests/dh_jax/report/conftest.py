"""Nine simulated runs: three policies by three seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dh_jax.report.simulated import simulate


@pytest.fixture(scope="session")
def nine(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("nine")
    return [
        simulate(root / f"{policy}-{seed}", policy, seed, documents=policy == "influence")
        for policy in ("influence", "static", "uniform")
        for seed in (0, 1, 2)
    ]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return simulate(tmp_path / "run", "influence", 0, steps=20, documents=True)
