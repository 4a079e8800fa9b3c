"""A run that is killed anywhere continues with the same bits; a wrong config is one line."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from omegaconf import OmegaConf

from dh_jax.config import (
    InfluenceConfig,
    LoraConfig,
    MixingConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from dh_jax.errors import ConfigError, StateError
from dh_jax.models import decoder
from dh_jax.models.pretrained import save_pretrained
from dh_jax.train import check, train

STEPS = 20


@pytest.fixture(scope="module")
def data_file(make_config: Any, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(make_config(store=str(store)))), path)
    return path


@pytest.fixture(scope="module")
def command(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The command line of a small steered run; compiled code is shared between processes."""
    cache = tmp_path_factory.mktemp("compiled")
    environment = os.environ | {
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(out: Path, *extra: str) -> subprocess.Popen[bytes]:
        arguments = [
            f"data={data_file}", "model.width=32", "model.layers=1", "model.heads=2",
            "model.kv_heads=1", "model.mlp_width=64", "mixing=influence", "mixing.interval=6",
            "influence.rows_per_source=2", "influence.probe_rows=4", "influence.targets={sums: 1}",
            f"training.steps={STEPS}", "training.batch_size=4", "training.eval_interval=5",
            "training.eval_rows=8", "training.checkpoint_interval=3", f"out={out}", *extra,
        ]  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "dh_jax.cli", "train", *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def finish(process: subprocess.Popen[bytes], code: int = 0) -> str:
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def reference(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("reference") / "run"
    finish(command(out))
    return out


def last_step(out: Path) -> int:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(x)["step"] for x in lines if x.endswith("}")), default=-1)


def parameters(out: Path) -> dict[str, np.ndarray]:
    manager = ocp.CheckpointManager((out / "checkpoints").absolute())
    read = manager.restore(STEPS, args=ocp.args.Composite(arrays=ocp.args.StandardRestore()))
    leaves, _ = __import__("jax").tree_util.tree_flatten_with_path(read["arrays"])
    return {str(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("random_steps", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_killed_at_several_moments_continues_with_the_same_bits(
    random_steps: int, command: Any, reference: Path, tmp_path: Path
) -> None:
    """kill -9 once while a checkpoint is being written, and at random steps."""
    out = tmp_path / "run"
    steps = sorted(random.Random(0).sample(range(4, STEPS), random_steps))
    moments: list[int | str] = ["writing", *steps]
    for moment in moments:
        process = command(out, "resume=true")
        while process.poll() is None:
            if moment == "writing":
                now = any((out / "checkpoints").glob("*tmp*"))
            else:
                now = last_step(out) >= int(moment)
            if now:
                break
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()[0].decode()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(command(out, "resume=true"))
    assert (out / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    ours, theirs = parameters(out), parameters(reference)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


@pytest.mark.slow
def test_sigterm_leaves_a_run_that_can_be_resumed(
    command: Any, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = command(out)
    while last_step(out) < 7 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert "resume=true" in finish(process, code=130)
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    finish(command(out, "resume=true"))
    assert (out / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


def test_the_log_shows_training_judging_and_moving_weights(reference: Path) -> None:
    records = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    kinds = [record["kind"] for record in records]
    assert kinds.count("train") == STEPS and kinds.count("eval") == 5
    moves = [record for record in records if record["kind"] == "reweight"]
    assert [move["step"] for move in moves] == [6, 12, 18]
    after = next(r for r in records if r["kind"] == "train" and r["step"] == 7)
    assert after["weights"] == moves[0]["weights"] != records[1]["weights"]
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.3
    assert json.loads((reference / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow  # test_mistakes.py and a test below make these mistakes in one process
def test_another_config_or_an_occupied_folder_is_refused_in_one_line(
    command: Any, reference: Path
) -> None:
    assert "already holds a run" in finish(command(reference), code=2)
    said = finish(command(reference, "resume=true", "training.batch_size=8"), code=2)
    assert "training.batch_size (was 4, now 8)" in said and "Traceback" not in said


@pytest.mark.slow  # tests/dh_jax/distributed/test_training.py trains on meshes in the suite
@pytest.mark.parametrize(
    "mesh", [{"fsdp": -1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "sequence": 2}]
)
def test_a_mesh_of_eight_devices_gives_the_losses_of_one(
    mesh: dict[str, int], make_config: Any, store: Path, tmp_path: Path
) -> None:
    from dh_jax.config import MeshConfig

    def losses(mesh: dict[str, int]) -> list[float]:
        config = RunConfig(
            data=make_config(store=str(store)),
            model=ModelConfig(
                vocab_size=768, width=128, layers=1, heads=2, kv_heads=2, mlp_width=128
            ),
            mesh=MeshConfig(**mesh),
            mixing=MixingConfig(policy="influence", interval=3),
            influence=InfluenceConfig(targets={"sums": 1.0}, rows_per_source=8, probe_rows=8),
            training=TrainingConfig(steps=6, batch_size=8, eval_interval=3, eval_rows=8),
            out=str(tmp_path / "-".join(map(str, mesh.values()))),
        )
        train(config)
        lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
        return [r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"]

    np.testing.assert_allclose(losses(mesh), losses({}), atol=5e-5)


def test_resuming_with_other_values_that_matter_is_refused(
    make_config: Any, store: Path, tmp_path: Path
) -> None:
    def config(**changes: Any) -> RunConfig:
        return RunConfig(
            data=make_config(store=str(store)),
            model=ModelConfig(width=32, layers=1, heads=2, kv_heads=1, mlp_width=32),
            training=TrainingConfig(steps=2, batch_size=2, eval_rows=2),
            out=str(tmp_path / "run"),
            **changes,
        )

    train(config())
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config())
    with pytest.raises(StateError, match=r"mixing\.policy"):
        train(config(mixing=MixingConfig(policy="uniform"), resume=True))
    written = (tmp_path / "run" / "timing.jsonl").read_bytes()
    assert train(config(resume=True))["status"] == "finished"  # and nothing is done
    assert (tmp_path / "run" / "timing.jsonl").read_bytes() == written
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")  # then it is trained again
    assert train(config(resume=True))["status"] == "finished"
    assert (tmp_path / "run" / "checkpoints" / "2").exists()


def test_all_weights_of_a_trained_model_at_a_high_rate_are_warned_of(
    make_config: Any, store: Path, tmp_path: Path
) -> None:
    shape = ModelConfig(width=32, layers=1, heads=2, kv_heads=1, mlp_width=32)
    save_pretrained(tmp_path / "base", shape, decoder.build(shape, 600, jax.random.key(0))[1])

    def checked(rate: float, rank: int) -> RunConfig:
        model = ModelConfig(pretrained=str(tmp_path / "base"), lora=LoraConfig(rank=rank))
        training = TrainingConfig(steps=2, learning_rate=rate)
        return check(RunConfig(data=make_config(store=str(store)), model=model, training=training))

    with pytest.warns(UserWarning, match=r"learning_rate is 0\.003.*0\.0001 is usual"):
        checked(3e-3, 0)
    checked(1e-4, 0)
    checked(3e-3, 8)
