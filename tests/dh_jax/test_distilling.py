"""A student trained from a teacher: schedules, refusals, and whole runs, live and cached."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from omegaconf import OmegaConf

from dh_jax import cli
from dh_jax.config import DistillationConfig, ModelConfig, RunConfig
from dh_jax.distilling import check_distillation, schedule_of
from dh_jax.errors import ConfigError
from dh_jax.models import decoder
from dh_jax.models.pretrained import save_pretrained

STEPS, K = 8, 32


def config(**keys):
    return RunConfig(distillation=DistillationConfig(**{"teacher": "somewhere"} | keys))


def test_schedules_go_in_a_straight_line_and_leave_out_what_is_not_needed():
    plain = schedule_of(DistillationConfig(), 10)
    assert [tuple(plain(s)) for s in (1, 10)] == [(1.0, None, None)] * 2
    mixed = schedule_of(DistillationConfig(alpha_end=0.5, temperature=2, temperature_end=1), 11)
    assert tuple(mixed(1)) == (1.0, 0.0, 2.0)
    assert tuple(mixed(6)) == (0.75, 0.25, 1.5)
    assert tuple(mixed(11)) == (0.5, 0.5, 1.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"divergence": "reverse"}, "'reverse'"),
        ({"alpha": 1.5}, r"distillation\.alpha is 1\.5; it must be from 0 to 1"),
        ({"temperature_end": 0.0}, r"temperature_end is 0\.0; it must be above 0"),
        ({"cache": "c", "estimator": "tial"}, r"'tial' .did you mean 'tail'"),
        ({"chunk": 0}, "at least 1"),
        ({"dtype": "float16"}, "allowed: float32, bfloat16"),
    ],
)
def test_keys_that_make_no_loss_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        check_distillation(config(**keys))
    check_distillation(RunConfig())


def test_distill_without_a_teacher_is_one_line(capsys):
    assert cli.main(["distill", "data=demo"]) == 2
    assert "needs distillation.teacher=MODEL" in capsys.readouterr().err
    assert cli.main(["distill", "cache", "data=demo"]) == 2
    assert "distillation.cache=FOLDER" in capsys.readouterr().err


# --- whole runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_file(make_config, store, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(make_config(store=str(store)))), path)
    return path


@pytest.fixture(scope="module")
def teacher_folder(tokenizer, tmp_path_factory):
    model = ModelConfig(width=32, layers=1, heads=2, kv_heads=1, mlp_width=48, init_scale=0.4)
    _, params = decoder.build(model, tokenizer.vocab_size, jax.random.key(1))
    model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    return save_pretrained(tmp_path_factory.mktemp("teacher") / "model", model, params, tokenizer)


def arguments(data_file, *more):
    return [
        f"data={data_file}", "model.width=32", "model.layers=1", "model.heads=2",
        "model.kv_heads=1", "model.mlp_width=48", "training.batch_size=4",
        f"training.steps={STEPS}", "training.warmup=2", "training.eval_interval=4",
        "training.eval_rows=4", "training.checkpoint_interval=4", *more,
    ]  # fmt: skip


def records(out: Path, kind: str) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


@pytest.mark.slow
def test_a_cached_teacher_trains_as_the_live_one_does(data_file, teacher_folder, tmp_path, capsys):
    cache = tmp_path / "cache"
    named = [f"distillation.teacher={teacher_folder}"]
    kept = [f"distillation.cache={cache}", f"distillation.entries={K}"]
    assert cli.main(["distill", "cache", *arguments(data_file), *named, *kept]) == 0
    assert "bytes a token" in capsys.readouterr().out
    mixed = ["distillation=mixed"]
    live, stored = tmp_path / "live", tmp_path / "stored"
    assert cli.main(["distill", *arguments(data_file), *mixed, *named, f"out={live}"]) == 0
    assert cli.main(["distill", *arguments(data_file), *mixed, *kept, f"out={stored}"]) == 0
    curves = [[r["loss"] for r in records(out, "train")] for out in (live, stored)]
    # What the tail leaves out of the divergence: all below the full one, and not by much.
    gap = np.subtract(*curves)
    assert (gap > -2e-3).all() and (gap < 0.35).all()
    tokens = [[r["batch"] for r in records(out, "train")] for out in (live, stored)]
    assert tokens[0] == tokens[1]  # the same order of the same rows
    full, sparse = (records(out, "distillation")[-1] for out in (live, stored))
    assert full["step"] == sparse["step"] == STEPS
    assert full["alpha"] == sparse["alpha"] == 0.5
    assert full["tail_mass"] == 0 and 0 < sparse["tail_mass"] < 0.5
    assert sparse["teacher_entropy"] < full["teacher_entropy"] < np.log(512)
    assert abs(full["cross_entropy"] - sparse["cross_entropy"]) < 0.05
    # Resumed from the middle, the log is the same bytes.
    half = tmp_path / "half"
    run = ["distill", *arguments(data_file), *mixed, *kept, f"out={half}"]
    import dh_jax.train as training

    whole = training.stop_signals
    try:
        training.stop_signals = lambda: _stopping_behind(4, half)
        assert cli.main(run) == 130
    finally:
        training.stop_signals = whole
    assert cli.main([*run, "resume=true"]) == 0
    assert (half / "metrics.jsonl").read_bytes() == (stored / "metrics.jsonl").read_bytes()
    page = tmp_path / "report.html"
    assert cli.main(["report", str(stored), "--out", str(page)]) == 0
    text = page.read_text()
    assert "static, distilled" in text and "unknown kind" not in text
    assert f"{sparse['divergence']:.3f}" in text.partition('id="teacher"')[2]


class _stopping_behind:
    """As if Ctrl-C came in a step."""

    def __init__(self, step, out):
        self.step, self.out = step, out

    def __enter__(self):
        return self

    def __bool__(self):
        return records(self.out, "train")[-1]["step"] >= self.step

    def __exit__(self, *error):
        return None


@pytest.mark.slow
def test_another_teacher_tokenizer_or_temperature_is_refused(
    data_file, teacher_folder, tokenizer, tmp_path, capsys
):
    cache = tmp_path / "cache"
    one = [*arguments(data_file), f"distillation.cache={cache}", "distillation.entries=4"]
    assert cli.main(["distill", "cache", *one, f"distillation.teacher={teacher_folder}"]) == 0
    other = tmp_path / "other"
    model = ModelConfig(width=32, layers=1, heads=2, kv_heads=1, vocab_size=tokenizer.vocab_size)
    _, params = decoder.build(model, tokenizer.vocab_size, jax.random.key(2))
    save_pretrained(other, model, params, tokenizer)
    for more, message in (
        ([f"distillation.teacher={other}"], "is of teacher"),
        (["distillation.temperature=2"], "temperature is 2.0, but the teacher's"),
        (["distillation.estimator=sampled"], "holds the most probable ids"),
        (["data.max_length=32"], "row_length 64, this run has 32"),
        (["data.packing.strategy=concat"], "concat cuts documents"),
    ):
        capsys.readouterr()
        assert cli.main(["distill", *one, *more, f"out={tmp_path / 'run'}"]) == 2
        assert message in capsys.readouterr().err
