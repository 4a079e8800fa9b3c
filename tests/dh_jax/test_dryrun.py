"""The step before it runs: it lowers for accelerators, and XLA's text is read right."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from dh_jax.config import MeshConfig, ModelConfig, TrainingConfig
from dh_jax.distributed.mesh import AXES, make_mesh
from dh_jax.dryrun import Traffic, abstract_step, collectives, step_bytes

MODEL = ModelConfig(width=128, layers=2, heads=4, kv_heads=4, mlp_width=256)


@pytest.mark.parametrize(
    ("sizes", "embedding"),
    [((1, 1, 1, 1), "{}, {}"), ((8, 1, 1, 1), "{}, {}"), ((2, 2, 2, 2), '{"tensor"}, {"fsdp"}')],
)
def test_the_train_step_lowers_for_cuda_and_tpu(sizes: tuple[int, ...], embedding: str) -> None:
    mesh = AbstractMesh(sizes, AXES)  # of devices that are not there
    step, arguments = abstract_step(
        MODEL, TrainingConfig(batch_size=8), mesh, vocab_size=512, row_length=64, sources=3
    )
    exported = export.export(step, platforms=["cuda", "tpu"])(*arguments)
    assert exported.platforms == ("cuda", "tpu") and exported.nr_devices == mesh.size
    text = exported.mlir_module()
    assert len(text) > 100_000  # the step is in it
    first = re.search(r"tensor<512x128xf32> {sdy.sharding = #sdy.sharding<@mesh, \[(.*?)\]>", text)
    assert first is not None and first[1] == embedding


def test_a_sequence_axis_splits_work_and_memory_and_exchanges_tokens_for_heads() -> None:
    one = dataclasses.replace(MODEL, layers=1)

    def compiled(sequence: int) -> Any:
        step, arguments = abstract_step(
            one, TrainingConfig(batch_size=4), make_mesh(MeshConfig(fsdp=2, sequence=sequence)),
            vocab_size=512, row_length=1024,
        )  # fmt: skip
        return step.lower(*arguments).compile()

    alone, four = compiled(1), compiled(4)
    assert four.cost_analysis()["flops"] < 0.27 * alone.cost_analysis()["flops"]
    assert step_bytes(four) < 0.5 * step_bytes(alone)
    # Queries, keys, values and what is mixed, forwards and backwards; and the embedding's look-up.
    assert collectives(four)["all-to-all"].times == 8 + 4
    states = 4 * 1024 // 8 * MODEL.width * 4  # bytes of a device's hidden states
    gathered = collectives(four).get("all-gather", Traffic(0, 0)).bytes
    assert gathered < collectives(alone)["all-gather"].bytes + states  # weights, no activations


def test_collectives_in_a_loop_count_as_often_as_it_runs() -> None:
    mesh = make_mesh(MeshConfig(fsdp=8))
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    @jax.jit
    def chain(x: jax.Array, kernels: jax.Array) -> jax.Array:
        def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(jax.lax.with_sharding_constraint(x @ kernel, whole)), None

        return jax.lax.scan(layer, x, kernels)[0]

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=whole)
    kernels = jax.ShapeDtypeStruct(
        (5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, *split.spec))
    )
    compiled = chain.lower(x, kernels).compile()
    assert sum(t.times for t in collectives(compiled).values()) == 5
    assert collectives(compiled)["all-gather"] == Traffic(5, 5 * 64 * 64 * 4)  # of kernels


def test_memory_is_of_one_device() -> None:
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
    alone = step_bytes(jax.jit(jnp.sin).lower(x).compile())
    mesh = make_mesh(MeshConfig(fsdp=8))
    rows = jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
    )
    shared = step_bytes(jax.jit(jnp.sin).lower(rows).compile())
    assert alone == 2 * 8 * 1024 * 4 and shared == alone // 8
