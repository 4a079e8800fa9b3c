"""Configs of torch ranks: what ships, which sizes fit, and what is refused with which cure."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from dh_jax.config import DistributedConfig, list_configs  # noqa: E402
from dh_jax.errors import ConfigError  # noqa: E402
from dh_torch_bridge import (  # noqa: E402
    data_shard,
    forward_backward,
    load_distributed_config,
    make_mesh,
)
from dh_torch_bridge.distributed.fsdp2 import blocks_of  # noqa: E402
from dh_torch_bridge.distributed.mesh import Sizes, mesh_sizes, pick_device  # noqa: E402
from dh_torch_bridge.distributed.parallelize import distribute, parallelize  # noqa: E402
from dh_torch_bridge.labels import IGNORED  # noqa: E402
from tests.dh_torch_bridge.layouts import make_batch, make_model  # noqa: E402


def test_shipped_configs_take_all_ranks() -> None:
    expected = {
        "ddp": Sizes(replicate=8),
        "fsdp2": Sizes(shard=8),
        "fsdp_tp": Sizes(shard=4, tensor=2),
        "pipeline": Sizes(pipeline=2, shard=4),
        "pipeline_fsdp_tp": Sizes(pipeline=2, shard=2, tensor=2),
        "tp": Sizes(tensor=8),
    }
    assert list_configs()["distributed"] == sorted([*expected, "single"])
    assert {n: mesh_sizes(load_distributed_config(n), 8) for n in expected} == expected
    assert mesh_sizes(load_distributed_config("single"), 1) == Sizes()
    assert mesh_sizes(load_distributed_config("fsdp2", ["replicate=2"]), 6) == Sizes(1, 2, 3)


@given(st.integers(1, 64), st.sampled_from([-1, 1, 2, 3, 4, 8]), st.integers(1, 9))
def test_sizes_multiply_to_the_ranks_or_are_refused(ranks: int, replicate: int, shard: int) -> None:
    config = DistributedConfig(strategy="fsdp2", replicate=replicate, shard=shard)
    fits = ranks % shard == 0 if replicate == -1 else replicate * shard == ranks
    if fits:
        sizes = mesh_sizes(config, ranks)
        assert sizes == Sizes(1, ranks // shard, shard, 1)
    else:
        with pytest.raises(ConfigError, match=f"does not fit {ranks} ranks"):
            mesh_sizes(config, ranks)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": "fsdp"}, "distributed.strategy is 'fsdp' .did you mean 'fsdp2'"),
        ({"backend": "mpi"}, "distributed.backend is 'mpi'; allowed: auto, nccl, gloo"),
        ({"param_dtype": "bf16", "strategy": "fsdp2"}, "param_dtype is 'bf16'.*null"),
        ({"shards": 2}, "unknown key 'shards' .did you mean 'shard'"),
        ({"strategy": "fsdp2", "replicate": -1, "shard": -1}, "at most one may be -1"),
        ({"strategy": "fsdp2", "shard": 0}, "shard=0 .*each must be positive"),
        ({"shard": 2}, "single is one process; set all to 1"),
        ({"tensor": 2}, "tensor=2 .single.: single is one process; set all to 1"),
        ({"strategy": "ddp", "replicate": -1, "tensor": 2}, "ddp splits no model"),
        ({"strategy": "fsdp2", "schedule": "gpip"}, "schedule is 'gpip' .did you mean 'gpipe'"),
        ({"strategy": "fsdp2", "sequence_parallel": True}, "tensor is 1; set distributed.tensor"),
        ({"strategy": "ddp", "replicate": -1, "cpu_offload": True}, "only fsdp2 moves shares"),
        (
            {"strategy": "fsdp2", "pipeline": 2, "stages": 2},
            "stages is 2; the schedule 1f1b takes 1 on every rank",
        ),
        (
            {"strategy": "fsdp2", "pipeline": 2, "shard": 2, "schedule": "zbv"},
            "zbv splits the backward, .*; set distributed.reshard_after_forward=false",
        ),
        ({"strategy": "fsdp2", "timeout": 0}, "timeout is 0.0; give seconds above 0"),
        ({"strategy": "ddp", "shard": -1}, "ddp splits no model; set shard=1"),
        ({"strategy": "ddp", "param_dtype": "bfloat16"}, "only fsdp2 keeps two precisions"),
    ],
)
def test_wrong_configs_name_the_value_and_the_cure(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_distributed_config(changes)


@pytest.mark.parametrize(
    ("sizes", "ranks", "cure"),
    [
        ({"replicate": 2, "shard": 3}, 4, "--nproc-per-node 6, or set one of them to -1"),
        ({"replicate": -1, "shard": 3}, 4, "take one of 1, 2, 4, or a multiple of 3 ranks"),
        ({"strategy": "single"}, 2, "take distributed=ddp or distributed=fsdp2"),
    ],
)
def test_sizes_that_do_not_fit_come_with_a_cure(
    sizes: dict[str, Any], ranks: int, cure: str
) -> None:
    config = load_distributed_config({"strategy": "fsdp2", **sizes})
    with pytest.raises(ConfigError, match=f"does not fit {ranks} ranks; .*{cure}"):
        mesh_sizes(config, ranks)


def test_one_process_needs_no_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_mesh(DistributedConfig()) is None and data_shard(None) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"single.* does not fit 2 ranks"):
        make_mesh(DistributedConfig())
    with pytest.raises(ConfigError, match="needs ranks; start with torchrun"):
        make_mesh(load_distributed_config("ddp"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named() -> None:
    assert pick_device(DistributedConfig()) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"need 1 GPUs, this machine has 0.*backend=gloo"):
        pick_device(DistributedConfig(backend="nccl"))


def test_blocks_are_those_of_the_outermost_list() -> None:
    def block() -> Any:
        experts = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
        return torch.nn.ModuleDict({"experts": experts})

    blocks = [block(), block()]
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(blocks)})
    assert blocks_of(model) == blocks
    with pytest.raises(ConfigError, match=r"finds no nn.ModuleList of blocks in Linear"):
        blocks_of(torch.nn.Linear(2, 2))


def test_a_batch_that_teaches_nothing_is_no_broken_loss() -> None:
    model = parallelize(make_model(), load_distributed_config("single"))
    batch = make_batch(0)
    batch["shift_labels"] = torch.full_like(batch["shift_labels"], IGNORED)
    assert float(forward_backward(model, batch)) == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_single_process_keeps_its_model() -> None:
    model = torch.nn.Linear(2, 2)
    assert distribute(model, DistributedConfig(backend="gloo"), None) is model
