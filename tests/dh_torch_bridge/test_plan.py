"""What layouts cost, on a process group that sends nothing: counted by torch's own debugging mode
and worked out by hand, against the plan."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor.debug import CommDebugMode  # noqa: E402

from dh_jax.errors import ConfigError  # noqa: E402
from dh_torch_bridge import load_distributed_config  # noqa: E402
from dh_torch_bridge.distributed.mesh import AXES, mesh_sizes  # noqa: E402
from dh_torch_bridge.distributed.parallelize import lay_out, parallelize, tensor_loss  # noqa: E402
from dh_torch_bridge.losses import token_losses  # noqa: E402
from dh_torch_bridge.meter import Meter  # noqa: E402
from dh_torch_bridge.plan import main, plan  # noqa: E402
from tests.dh_torch_bridge.layouts import make_batch, make_model  # noqa: E402


def shares(**sizes: Any) -> dict[str, Any]:
    return {"strategy": "fsdp2", **sizes}


@contextmanager
def pretended(layout: dict[str, Any], ranks: int) -> Iterator[tuple[Any, Any]]:
    config = load_distributed_config(layout)
    dist.init_process_group("fake", rank=0, world_size=ranks)
    try:
        yield config, init_device_mesh("cpu", mesh_sizes(config, ranks), mesh_dim_names=AXES)
    finally:
        dist.destroy_process_group()


def collectives(layout: dict[str, Any], layers: int) -> Counter[str]:
    """Of one step on two ranks, as torch's CommDebugMode counts them."""
    with pretended(layout, 2) as (config, mesh):
        model = make_model(num_hidden_layers=layers)
        lay_out(model, config, mesh)
        counted = CommDebugMode()
        with counted, tensor_loss(mesh):
            token_losses(model, make_batch(0)).sum().backward()
    found: Counter[str] = Counter()
    for operation, count in counted.get_comm_counts().items():
        name = str(operation)
        kinds = {"gather": "all_gather", "reduce_scatter": "reduce_scatter", "reduce": "all_reduce"}
        found[next(kind for part, kind in kinds.items() if part in name)] += count
    return found


# All for the hooks of CommDebugMode.
@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("layers", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_collectives_of_a_step(layers: int) -> None:
    # A gather for each block's forward and backward, one for table, norm and head together.
    assert collectives(shares(shard=2), layers) == {
        "all_gather": 2 * layers + 1, "reduce_scatter": layers + 1,
    }  # fmt: skip
    # Four a layer; one each for the table's output and the head's input, three in the loss.
    assert collectives(shares(tensor=2), layers) == {"all_reduce": 4 * layers + 5}
    assert collectives(shares(tensor=2, sequence_parallel=True), layers) == {
        "all_gather": 4 * layers + 2, "reduce_scatter": 4 * layers + 2, "all_reduce": 3,
    }  # fmt: skip


def test_the_meter_sees_the_peak() -> None:
    with Meter() as meter:
        first = torch.ones(1000)  # 4,000 bytes
        second = first * 2
        del first
        second = second * 2
        views = second[:10].view(2, 5)  # noqa: F841
    assert meter.peak == 8000


def test_bytes_of_shares_are_those_of_the_formula() -> None:
    model = make_model()
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    every = sum(p.numel() for p in model.parameters())
    made = plan(make_model, load_distributed_config(shares(shard=4)), 4, rows=8, tokens=16)
    (place,) = made.places
    assert place.parameters == every / 4 and place.padding == 0
    assert place.optimizer_bytes == 2 * place.parameter_bytes == 2 * place.gradient_bytes
    rest = every - 4 * block  # gathered once, as it is kept for the backward
    assert place.traffic["shard", "all_gather"].bytes == 0.75 * 4 * (2 * 4 * block + rest)
    assert place.traffic["shard", "reduce_scatter"].bytes == 0.75 * 4 * every
    assert place.peak_bytes > 4 * place.parameter_bytes + 4 * block


@pytest.mark.slow
def test_recomputing_and_sharding_lower_the_peak() -> None:
    def peak(**layout: Any) -> int:
        config = load_distributed_config({"strategy": "fsdp2", **layout})
        return plan(make_model, config, 4, rows=32, tokens=64).places[0].peak_bytes

    assert peak(shard=4, checkpoint_activations=True) < peak(shard=4) < peak(shard=2, replicate=2)


@pytest.mark.parametrize(
    "schedule",
    [
        "1f1b",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("gpipe", "interleaved_1f1b", "zbv")),
    ],
)
def test_stages_together_hold_the_model_and_send_their_hidden_states(schedule: str) -> None:
    layout = shares(pipeline=2, schedule=schedule, microbatches=4)
    made = plan(make_model, load_distributed_config(layout), 2, rows=8, tokens=16)
    assert sum(place.parameters for place in made.places) == made.parameters
    hidden = 2 * 16 * 32 * 4  # rows of a microbatch, tokens, width, bytes
    # Rank 0 sends forward at every border that it has before it, and nothing backward into ids.
    borders = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 3, "zbv": 2}[schedule]
    assert made.places[0].traffic["pipeline", "send"].bytes == borders * 4 * hidden


@pytest.mark.parametrize(
    ("layout", "ranks", "said"),
    [
        (shares(shard=3), 4, "does not fit 4 ranks"),
        (shares(tensor=4), 4, "tensor=4 does not divide the model's 2 .key-value heads.*: 1, 2"),
        (shares(pipeline=8), 8, "4 layers are too few for 8 pipeline stages"),
        (shares(pipeline=2, microbatches=1), 2, "microbatches is 1, fewer than the 2 stages"),
        (
            shares(pipeline=2, schedule="interleaved_1f1b", microbatches=5),
            2,
            "microbatches=5 with interleaved_1f1b must be a multiple of pipeline=2; take 4",
        ),
        (shares(pipeline=2, microbatches=3), 2, "8 rows do not make 3 microbatches"),
        (shares(shard=16), 16, "8 rows do not split over 16 data-parallel ranks"),
    ],
)
def test_a_layout_that_cannot_be_says_why(layout: dict[str, Any], ranks: int, said: str) -> None:
    made = plan(make_model, load_distributed_config(layout), ranks, rows=8, tokens=16)
    with pytest.raises(ConfigError, match=said):
        raise ConfigError(made.problem)


def test_what_ranks_refuse_before_they_speak() -> None:
    with pretended(shares(shard=2), 2) as (config, mesh):
        model = make_model()
        model.model.norm.bfloat16()
        with pytest.raises(ConfigError, match=r"embed_tokens.weight is float32, model.norm.* is"):
            parallelize(model, config, mesh)
        with pytest.raises(ConfigError, match="on the meta device of rank 0"):
            parallelize(make_model().to("meta"), config, mesh)
    for layout, said in (
        (shares(tensor=2), "no plan splits Linear; it must be a Hugging"),
        (shares(pipeline=2), "Linear cannot be cut into stages"),
    ):
        with pretended(layout, 2) as (config, mesh), pytest.raises(ConfigError, match=said):
            parallelize(torch.nn.Linear(2, 2), config, mesh)


def test_sixteen_thousand_ranks_by_the_command(capsys: Any) -> None:
    """Uneven shares are filled up: 2,048 ranks split at most 384 rows of a matrix."""
    arguments = [
        "--ranks=16384", "--json", "model=tiny", "model.vocab_size=4096", "model.heads=16",
        "model.kv_heads=8", "distributed=fsdp_tp", "distributed.tensor=8", "data.max_length=64",
        "training.batch_size=2048",
    ]  # fmt: skip
    assert main(arguments) == 0
    (made,) = json.loads(capsys.readouterr().out)
    assert made["sizes"] == {"pipeline": 1, "replicate": 1, "shard": 2048, "tensor": 8}
    assert 0.9 < made["places"][0]["padding"] < 1
    assert main([*arguments, "distributed.tensor=3", "--layouts"]) == 2


def test_the_table_names_what_a_rank_pays(capsys: Any) -> None:
    arguments = ["--ranks", "4", "model=tiny", "model.vocab_size=64", "data.max_length=16"]
    assert main([*arguments, "--layouts", "shard=4", "tensor=3,shard=-1"]) == 0
    text = capsys.readouterr().out
    assert "4 ranks (shard 4)" in text and "all_gather" in text and "at the peak" in text
    assert "cannot be: distributed replicate=1 shard=-1 tensor=3 (fsdp2) does not fit 4" in text
