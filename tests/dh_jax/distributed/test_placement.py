"""Where parameters and activations live: the table, what it cannot split, what it saves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from dh_jax.config import MeshConfig, ModelConfig, TrainingConfig
from dh_jax.distributed.mesh import AXES, make_mesh, replicate
from dh_jax.distributed.placement import (
    check_heads,
    constrain,
    on_mesh,
    param_shardings,
    unsplit,
    warn_unsplit,
)
from dh_jax.dryrun import abstract_step, collectives, step_bytes
from dh_jax.errors import ConfigError
from dh_jax.models import decoder

ALL = AbstractMesh((2, 2, 1, 2), AXES)
FSDP = AbstractMesh((1, 8, 1, 1), AXES)


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def specs(params: Any, mesh: AbstractMesh) -> Any:
    return jax.tree.map(lambda s: tuple(s.spec), param_shardings(params, mesh))


def test_every_parameter_of_the_decoder_has_its_place() -> None:
    config = ModelConfig(width=128, layers=1, heads=4, kv_heads=4, mlp_width=256, tied=False)
    found = specs(decoder.abstract_params(config, 512), ALL)
    assert found == {
        "embed": {"embedding": ("tensor", "fsdp")},
        "final_norm": {"scale": ()},
        "head": {"kernel": ("fsdp", "tensor")},
        "layers": {
            "0": {
                "attention": {
                    "query": {"kernel": ("fsdp", "tensor")},
                    "key": {"kernel": ("fsdp", "tensor")},
                    "value": {"kernel": ("fsdp", "tensor")},
                    "out": {"kernel": ("tensor", "fsdp")},
                },
                "attention_norm": {"scale": ()},
                "mlp": {
                    "gate": {"kernel": ("fsdp", "tensor")},
                    "up": {"kernel": ("fsdp", "tensor")},
                    "down": {"kernel": ("tensor", "fsdp")},
                },
                "mlp_norm": {"scale": ()},
            }
        },
    }


def test_layers_of_a_scanned_model_adapters_and_moments_follow_their_kernel() -> None:
    params = {
        "layers": {
            "attention": {
                "query": {
                    "kernel": array(16, 256, 512),
                    "bias": array(64, 512),
                    "lora_a": array(16, 256, 8),
                    "lora_b": array(16, 8, 512),
                }
            },
            "mlp": {"down": {"kernel": {"lora_a": array(16, 512, 8), "lora_b": array(16, 8, 256)}}},
        }
    }
    found = specs(params, ALL)
    assert found["layers"]["attention"]["query"] == {
        "kernel": (None, "fsdp", "tensor"),
        "bias": (None, "tensor"),
        "lora_a": (None, "fsdp"),
        "lora_b": (None, "fsdp", "tensor"),  # fsdp takes what it divides: the rank
    }
    assert found["layers"]["mlp"]["down"]["kernel"] == {
        "lora_a": (None, "tensor", "fsdp"),
        "lora_b": (None, None, "fsdp"),
    }
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    assert specs(state, ALL)[0].mu == specs(state, ALL)[0].nu == found


def test_what_no_rule_knows_is_split_along_its_longest_dimension_that_divides() -> None:
    params = {
        "wide": array(64, 1024),
        "tall": array(1024, 64),
        "odd": array(1023, 64),
        "prime": array(257, 131),
        "small": array(64),
    }
    assert specs(params, FSDP) == {
        "wide": (None, "fsdp"),
        "tall": ("fsdp",),  # as jit spells it: no second compilation
        "odd": (None, "fsdp"),
        "prime": (),
        "small": (),
    }


def test_a_dimension_that_does_not_divide_stays_whole_and_is_named() -> None:
    params = {"embed": {"embedding": array(4097, 128)}, "head": {"kernel": array(130, 4096)}}
    mesh = AbstractMesh((1, 4, 1, 2), AXES)
    assert specs(params, mesh) == {
        "embed": {"embedding": (None, "fsdp")},
        "head": {"kernel": (None, "tensor")},  # 130 is no multiple of 4, and nothing else is free
    }
    assert [(x.path, x.dimension, x.axis) for x in unsplit(params, mesh)] == [
        ("embed/embedding", 0, "tensor"),
        ("head/kernel", 0, "fsdp"),
    ]
    assert unsplit(params, AbstractMesh((8, 1, 1, 1), AXES)) == []
    with pytest.warns(UserWarning, match=r"does not divide 2 dimensions .* embed/embedding"):
        warn_unsplit(params, mesh)


@given(
    shape=st.lists(st.integers(1, 300), min_size=1, max_size=4).map(tuple),
    path=st.sampled_from(
        ["layers/0/attention/query/kernel", "embed/embedding", "mine", "a/down/lora_a", "x/bias"]
    ),
    sizes=st.tuples(*[st.sampled_from([1, 2, 3, 4, 6])] * 4),
)
def test_any_shape_on_any_mesh_gets_a_sharding_that_divides_it(
    shape: tuple[int, ...], path: str, sizes: tuple[int, int, int, int]
) -> None:
    mesh = AbstractMesh(sizes, AXES)
    (sharding,) = jax.tree.leaves(param_shardings({path: array(*shape)}, mesh))
    share = sharding.shard_shape(shape)  # raises where an axis does not divide
    axes = [axis for axis in sharding.spec if axis]
    assert len(set(axes)) == len(axes)
    assert np.prod(share) * np.prod([mesh.shape[a] for a in axes], dtype=int) == np.prod(shape)


def test_a_tensor_axis_through_heads_is_refused() -> None:
    config = ModelConfig(width=576, heads=9, kv_heads=3)
    check_heads(config, AbstractMesh((1, 2, 1, 3), AXES))
    with pytest.raises(ConfigError, match=r"tensor 2 does not divide model\.heads 9; .* 1, 3"):
        check_heads(config, ALL)
    with pytest.raises(ConfigError, match=r"sequence 3 x mesh\.tensor 3 does not divide model\.kv"):
        check_heads(config, AbstractMesh((1, 1, 3, 3), AXES))


def test_constrain_means_nothing_without_a_mesh_and_changes_no_value_with_one() -> None:
    x = jnp.arange(8 * 4 * 6.0).reshape(8, 4, 6)

    def double(x: jax.Array) -> jax.Array:
        return constrain(2 * x, "BTF")

    assert double(x).sharding == x.sharding
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x = replicate(x, mesh)
    placed = jax.jit(on_mesh(double, mesh))(x)
    np.testing.assert_array_equal(placed, 2 * x)
    assert placed.sharding.shard_shape(x.shape) == (2, 4, 3)
    # Dimensions that do not divide, rows under vmap, and both modes of differentiation.
    summed = on_mesh(lambda x: (constrain(x, "BTF") ** 2).sum(), mesh)
    odd = replicate(jnp.ones((3, 4, 5)), mesh)
    np.testing.assert_array_equal(jax.jit(jax.grad(summed))(odd), 2 * odd)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(summed)))(x[:, None]), 2 * x[:, None])
    assert jax.jit(lambda x: jax.jvp(summed, (x,), (x,)))(odd)[1] == 2 * 60


@pytest.mark.slow
def test_saying_where_activations_live_halves_what_crosses_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ModelConfig(width=256, layers=2, heads=4, kv_heads=4, mlp_width=512)
    mesh = make_mesh(MeshConfig(fsdp=8))

    def traffic() -> tuple[int, int]:
        step, arguments = abstract_step(
            model, TrainingConfig(batch_size=8), mesh, vocab_size=512, row_length=256
        )
        compiled = step.lower(*arguments).compile()
        return sum(x.bytes for x in collectives(compiled).values()), step_bytes(compiled)

    said = traffic()
    monkeypatch.setattr("dh_jax.dryrun.on_mesh", lambda function, _: function)
    unsaid = traffic()
    assert 2 * said[0] < unsaid[0] and said[1] < unsaid[1]
