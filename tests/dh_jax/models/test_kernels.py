"""Every kernel gives XLA's numbers (interpreted on a CPU) and lowers for its platform."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from dh_jax.config import MixingConfig, ModelConfig, RunConfig
from dh_jax.distributed.mesh import AXES
from dh_jax.distributed.placement import on_mesh
from dh_jax.errors import ConfigError
from dh_jax.models import decoder
from dh_jax.models.kernels import blocked, check_kernel, splash, tiled, triton
from dh_jax.train import train
from tests.dh_jax.models.model_cases import LLAMA, V, packed_rows

CALLS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}
# Their form may change between releases of JAX; a program that is only lowered does not mind.
UNSTABLE = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CALLS.values()]


def arrays(tokens: int) -> Any:
    """Rows of several segments and padding; queries of four heads, keys of two."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, tokens, n, 64)).astype(np.float32) for n in (4, 2, 2))
    segments = np.sort(rng.integers(1, 4, (2, tokens)), axis=1).astype(np.int32)
    segments[:, -tokens // 8 :] = 0
    return q, k, v, segments


@pytest.mark.parametrize("kernel", [splash, triton])
def test_kernels_agree_with_xla_forwards_and_backwards(kernel: Any) -> None:
    *given, segments = arrays(100)  # a part of a tile
    weights = np.random.default_rng(1).normal(size=given[0].shape).astype(np.float32)

    def value_and_gradients(kernel: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            out = kernel(q, k, v, segments)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*given)

    ours = value_and_gradients(tiled(partial(kernel, interpret=True)))
    for a, b in zip(*map(jax.tree.leaves, (ours, value_and_gradients(blocked))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 1)])
def test_a_training_step_lowers_with_the_kernel_of_each_platform(mesh: tuple[int, ...]) -> None:
    config = dataclasses.replace(
        LLAMA, attention="pallas", head_width=64, layers=1, dtype="bfloat16"
    )
    graph, params = decoder.abstract_graph(config, V), decoder.abstract_params(config, V)
    batch = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), 4, axis=0), packed_rows(100))
    loss = on_mesh(decoder.loss_fn(graph), AbstractMesh(mesh, AXES))
    step = jax.jit(jax.grad(lambda p, b: loss(p, b, jax.random.key(0)).sum()))
    for platform, call in CALLS.items():
        exported = jax.export.export(step, platforms=[platform], disabled_checks=UNSTABLE)
        calls = re.findall(r"custom_call @([\w$.]+)", exported(params, batch).mlir_module())
        assert calls.count(call) >= 2  # forwards and backwards


def test_a_run_refuses_a_kernel_that_it_cannot_use(make_config: Any, tmp_path: Any) -> None:
    check_kernel("xla", "cpu", forward_mode=True)
    check_kernel("pallas", "gpu")
    with pytest.raises(ConfigError, match="'pallas' has no forward mode"):
        check_kernel("pallas", "tpu", forward_mode=True)
    config = RunConfig(
        data=make_config(), model=ModelConfig(attention="pallas"),
        mixing=MixingConfig(policy="uniform"), out=str(tmp_path / "run"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="'pallas' has no kernel for cpu"):
        train(config)
    with pytest.raises(ConfigError, match=r"model\.attention.*xla.*pallas"):
        train(dataclasses.replace(config, model=ModelConfig(attention="flash")))
