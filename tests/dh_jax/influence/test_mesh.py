"""Sharded rows and parameters give what one device gives."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dh_jax.influence.calculator import DataInfCalculator
from tests.dh_jax.influence import tiny

key = jax.random.PRNGKey(0)
rng = np.random.default_rng(0)
params = tiny.sequence_params(key)
train, probe, rows = (tiny.pack(tiny.random_rows(rng, 8, 12), 12) for _ in range(3))
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
everywhere = NamedSharding(mesh, P(("data", "fsdp")))

def shard(x):
    split = x.ndim > 1 and x.shape[0] % 2 == 0
    return jax.device_put(x, NamedSharding(mesh, P("fsdp") if split else P()))

calculator = DataInfCalculator(tiny.sequence_loss, chunk=4, max_bytes=0)

def run(params, *batches):
    train, probe, rows = batches
    state = calculator.fit(params, train, key)
    q = calculator.precondition(state, calculator.probe_gradient(params, probe, key))
    return calculator.score_documents(params, q, rows, 4, key)

alone = run(params, train, probe, rows)
placed = [jax.device_put(batch, everywhere) for batch in (train, probe, rows)]
meshed = run(jax.tree.map(shard, params), *placed)
assert len(placed[0].tokens_BT.sharding.device_set) == 4
np.testing.assert_allclose(meshed, alone, rtol=2e-4, atol=1e-4 * abs(np.asarray(alone)).max())
assert np.count_nonzero(alone) > 8
print("agree")
"""


def test_a_mesh_of_four_devices_agrees_with_one():
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "agree", done.stderr[-2000:]
