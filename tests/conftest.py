"""Settings of every test: eight simulated devices, property tests without a clock, programs that
an earlier run has compiled, and quick compilation where formulas are held against references."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before JAX is imported anywhere: it reads them once.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compiling. JAX's key is the program, the version and the processor.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import pytest
from hypothesis import HealthCheck, settings

# Compilation makes first examples slow, and session fixtures are meant to be shared.
settings.register_profile(
    "house",
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("house")

pytest_plugins = ["tests.small_data"]  # fixtures

# What tests in these folders compile runs for milliseconds, and whether it is fast or equal in
# every bit is not what they ask: without optimisation it compiles in half the time. Slow tests,
# those of training and whole runs, and what is marked `optimised` compile as users do.
FORMULAS = {"attribution", "distillation", "influence", "mixing", "models"}


@pytest.fixture(autouse=True)
def compiled_plainly(request: pytest.FixtureRequest) -> Iterator[None]:
    folder = Path(request.node.path).parent.name
    if folder not in FORMULAS or any(
        request.node.get_closest_marker(name) for name in ("slow", "optimised")
    ):
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
