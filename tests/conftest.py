"""Settings of every test: eight simulated devices, and property tests without a clock."""

from __future__ import annotations

import os

# Before JAX is imported anywhere: it reads both once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

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
