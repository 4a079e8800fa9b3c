"""The reference trainer: documents that cannot see one another, and ranks that change nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

torch = pytest.importorskip("torch")

from dh_jax.compose import compose  # noqa: E402
from dh_jax.config import (  # noqa: E402
    ModelConfig,
    TorchRunConfig,
    TrainingConfig,
    list_configs,
    typed,
)
from dh_jax.config import config_folder as folder_of_configs  # noqa: E402
from dh_jax.data.tokenization import TokenizerWrapper  # noqa: E402
from dh_jax.errors import ConfigError  # noqa: E402
from dh_jax.models import decoder  # noqa: E402
from dh_jax.step import make_schedule  # noqa: E402
from dh_torch_bridge.data import get_loader  # noqa: E402
from dh_torch_bridge.labels import IGNORED  # noqa: E402
from dh_torch_bridge.losses import token_losses  # noqa: E402
from dh_torch_bridge.train import build_llama, main, make_optimizer  # noqa: E402
from tests.dh_torch_bridge.launch import torchrun, written  # noqa: E402

HERE = Path(__file__).parent
STEPS = 20
SHAPE = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, mlp_width=48)


# --- documents -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return build_llama(SHAPE, 512)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.data())
def test_a_document_leaves_no_trace_in_the_losses_of_its_neighbours(
    llama: Any, lengths: list[int], data: st.DataObject
) -> None:
    tokens = sum(lengths) + 3  # three of padding
    batch = {
        "input_ids": torch.randint(0, 64, (1, tokens), dtype=torch.int32),
        "shift_labels": torch.randint(0, 64, (1, tokens)),
        "position_ids": torch.zeros(1, tokens, dtype=torch.int32),
        "segment_ids": torch.zeros(1, tokens, dtype=torch.int32),
    }
    ends = np.cumsum(lengths)
    for i, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        batch["position_ids"][0, end - length : end] = torch.arange(length)
        batch["segment_ids"][0, end - length : end] = i + 1
    batch["shift_labels"][0, ends - 1] = IGNORED
    batch["shift_labels"][0, ends[-1] :] = IGNORED
    changed = data.draw(st.integers(0, len(lengths) - 1))
    inside = batch["segment_ids"][0] == changed + 1
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["input_ids"][0, inside] = (other["input_ids"][0, inside] + 1) % 64
    with torch.no_grad():
        a, b = token_losses(llama, batch), token_losses(llama, other)
    assert torch.equal(a[0, ~inside], b[0, ~inside])
    if lengths[changed] > 1:  # else nothing is learnt in it
        assert not torch.equal(a[0, inside], b[0, inside])


def test_losses_in_a_packed_row_are_those_of_each_document_alone(
    llama: Any, make_config: Any, store: Path
) -> None:
    """Against transformers' own causal attention, given no mask and one document at a time."""
    with get_loader(make_config(store=str(store)), batch_size=2) as loader:
        batch = next(loader)
    with torch.no_grad():
        packed = token_losses(llama, batch)
        for row in range(2):
            for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
                inside = batch["segment_ids"][row] == segment
                logits = llama(input_ids=batch["input_ids"][row, inside][None]).logits[0]
                labels = batch["shift_labels"][row, inside]
                alone = torch.nn.functional.cross_entropy(
                    logits, labels, ignore_index=IGNORED, reduction="none"
                )
                torch.testing.assert_close(packed[row, inside], alone, atol=2e-6, rtol=0)


# --- like the JAX trainer ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in list_configs()["model"] if name != "pretrained"])
def test_every_model_config_has_as_many_parameters_as_in_jax(name: str) -> None:
    config = typed(ModelConfig, OmegaConf.load(folder_of_configs() / "model" / f"{name}.yaml"))
    vocab_size = config.vocab_size or 4096
    with torch.device("meta"):
        ours = sum(p.numel() for p in build_llama(config, vocab_size).parameters())
    assert ours == decoder.count_parameters(decoder.abstract_params(config, vocab_size))


@pytest.mark.parametrize("change", [{"qkv_bias": True}, {"linear": "ternary"}])
def test_what_a_plain_llama_has_not_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"model.{next(iter(change))} is .*dh train"):
        build_llama(dataclasses.replace(SHAPE, **change), 64)


def test_the_optimizer_follows_the_schedule_of_dh_train() -> None:
    training = TrainingConfig(steps=30, warmup=7, learning_rate=2e-3)
    optimizer, schedule = make_optimizer(build_llama(SHAPE, 64), training)
    theirs: optax.Schedule = make_schedule(training)
    for step in range(35):
        assert schedule.get_last_lr()[0] == pytest.approx(float(theirs(step)), rel=1e-5, abs=1e-9)
        optimizer.step()
        schedule.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


# --- ranks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overrides(make_config: Any, store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = written(make_config(store=str(store)), tmp_path_factory.mktemp("config"))
    shape = {k: getattr(SHAPE, k) for k in ("width", "layers", "heads", "kv_heads", "mlp_width")}
    return [
        f"data={path}",
        *(f"model.{key}={value}" for key, value in shape.items()),
        f"training.steps={STEPS}",
        "training.batch_size=8",
        "training.warmup=2",
    ]


@pytest.fixture(scope="module")
def alone(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main([*overrides, f"out={folder}"]) == 0
    return records(folder)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder: Path, alone: list[dict[str, Any]]) -> None:
    ours = records(folder)
    assert [r["step"] for r in ours] == list(range(1, STEPS + 1))
    for key, tolerance in (("loss", 2e-5), ("grad_norm", 1e-5), ("tokens", 0)):
        np.testing.assert_allclose(
            [r[key] for r in ours], [r[key] for r in alone], atol=tolerance, rtol=0
        )


def test_two_ranks_read_and_train_as_one_process_does(
    overrides: list[str],
    alone: list[dict[str, Any]],
    make_config: Any,
    store: Path,
    tmp_path: Path,
) -> None:
    assert alone[-1]["loss"] < alone[0]["loss"] - 0.1  # it learns, so equality says something
    run = compose("torch_train", TorchRunConfig, overrides)
    torch.manual_seed(run.training.seed)
    vocab_size = TokenizerWrapper.load(run.data.tokenizer).vocab_size
    build_llama(run.model, vocab_size).save_pretrained(tmp_path / "start")
    done = torchrun(str(HERE / "ranks.py"), str(tmp_path), *overrides)
    assert done.returncode == 0, done.stderr
    with get_loader(make_config(store=str(store)), batch_size=8) as loader:
        rows = torch.stack([next(loader)["input_ids"] for _ in range(5)])
    for name in ("ddp", "fsdp2", "tp", "pretrained"):
        first, second = (torch.load(tmp_path / f"{name}-rank{r}.pt") for r in (0, 1))
        if name == "tp":  # both are one data-parallel rank
            assert torch.equal(first, rows) and torch.equal(second, rows)
        else:
            assert torch.equal(torch.cat([first, second], dim=1), rows)  # steps, rows, tokens
            assert first.shape == second.shape and not torch.equal(first, second)
        assert_same_run(tmp_path / name, alone)


@pytest.mark.slow
def test_the_command_trains_on_two_ranks(
    overrides: list[str], alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    command = ["-m", "dh_torch_bridge.train", *overrides, f"out={tmp_path / 'run'}"]
    done = torchrun(*command, "distributed=fsdp2")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", alone)
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").distributed.strategy == "fsdp2"


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("distributed=fsdp2", "needs ranks; start with torchrun"),
        ("distributed=fspd2", "did you mean 'fsdp2'"),
        ("distributed.shrad=2", "shrad"),
        ("model.heads=3", "model.heads 3 is not a multiple of model.kv_heads 2"),
        ("model.vocab_size=8", "is below the tokenizer's"),
        ("training.steps=0", "training.steps is 0; the least is 1"),
    ],
)
def test_a_mistake_is_one_line(
    override: str, said: str, overrides: list[str], tmp_path: Path, capsys: Any
) -> None:
    assert main([*overrides, f"out={tmp_path / 'run'}", override]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_written_over(overrides: list[str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.yaml").write_text("kept")
    assert main([*overrides, f"out={tmp_path}"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "kept"


MISTAKES = {
    "heads": (["distributed=tp"], "tensor=2 does not divide the model's 1 (key-value heads)"),
    "sizes": (["distributed=fsdp2", "distributed.shard=3"], "does not fit 2 ranks; start torchrun"),
    "microbatches": (
        ["distributed=pipeline", "distributed.microbatches=1"],
        "microbatches is 1, fewer than the 2 stages",
    ),
    "rows": (
        ["distributed=pipeline", "distributed.microbatches=3"],
        "8 rows do not make 3 microbatches",
    ),
    "layers": (["distributed=pipeline", "model.layers=1"], "1 layers are too few for 2 pipeline"),
    "cuda": (["distributed=fsdp2", "distributed.backend=nccl"], "2 ranks need 2 GPUs"),
}


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(name, marks=() if name == "heads" else pytest.mark.slow)
        for name in MISTAKES
        if not (name == "cuda" and torch.cuda.is_available())
    ],
)
def test_a_layout_that_cannot_be_stops_all_ranks(
    mistake: str, overrides: list[str], tmp_path: Path
) -> None:
    """torchrun ends with an error before the time-out of `torchrun` here: no rank waits."""
    changes, said = MISTAKES[mistake]
    command = ["-m", "dh_torch_bridge.train", *overrides, f"out={tmp_path / 'run'}"]
    if mistake == "heads":
        changes = [*changes, "model.kv_heads=1"]
    done = torchrun(*command, *changes)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    told = [line for line in done.stderr.splitlines() if "dh_torch_bridge.train (rank" in line]
    assert len(told) == 1 and "(rank 0)" in told[0] and said in told[0], done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
def test_ranks_do_not_wait_for_ever(tmp_path: Path) -> None:
    """One rank stands still: the other gives up after ``timeout``, and torchrun ends both."""
    script = tmp_path / "still.py"
    script.write_text(
        "import time\n"
        "from dh_torch_bridge import load_distributed_config, make_mesh\n"
        "from dh_torch_bridge.distributed.mesh import sum_over_data\n"
        "import torch, torch.distributed as dist\n"
        "mesh = make_mesh(load_distributed_config('fsdp2', ['timeout=5', 'backend=gloo']))\n"
        "if dist.get_rank():\n"
        "    time.sleep(3600)\n"
        "sum_over_data(torch.ones(()), mesh)\n"
    )
    done = torchrun(str(script), timeout=200)
    assert done.returncode != 0 and "imed out" in done.stderr, done.stderr[-3000:]
