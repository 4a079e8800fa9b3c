"""The command line: what it prints, and that a mistake is one line with the cure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dh_jax import cli


@pytest.fixture(scope="module")
def data_file(make_config: Any, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "small.yaml"
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(make_config(store=str(store)))), path)
    return path


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["--help"])
    assert exit_code.value.code == 0
    said = capsys.readouterr().out
    for command in ("train", "prepare", "inspect", "report", "configs", "demo"):
        assert f"dh {command}" in said


def test_configs_lists_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs"]) == 0
    said = capsys.readouterr().out
    for name in ("mixed_pretrain", "fineweb", "downstream", "demo", "smollm2_135m", "influence"):
        assert name in said


def test_inspect_shows_shares_packing_and_rows(
    data_file: Path, corpora: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", f"data={data_file}", "--batches", "3"]) == 0
    said = capsys.readouterr().out
    assert "packing efficiency 100.00%" in said and said.count("(64 tokens)") == 4
    texts = [
        json.loads(line)["text"] for p in corpora.values() for line in p.read_text().splitlines()
    ]
    decoded = [line for line in said.splitlines() if line.startswith("    ")]
    assert decoded and any(decoded[-1].strip() in text for text in texts)
    for name in ("code", "mail", "sums"):
        assert name in said


def test_prepare_writes_and_verifies(
    data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "store"
    assert cli.main(["prepare", f"data={data_file}", f"data.store={target}", "--verify"]) == 0
    assert "9 shards verified" in capsys.readouterr().out
    arguments = [f"data={data_file}", f"data.store={target}", "--json", "--verify"]
    assert cli.main(["prepare", *arguments]) == 0
    totals = json.loads(capsys.readouterr().out)
    assert totals["verified"] == 9 and totals["store"] == str(target)
    assert set(totals["sources"]) == {"code", "mail", "sums"}
    for counts in totals["sources"].values():
        assert counts["train"]["tokens"] > counts["probe"]["tokens"] > 0
    left_out = [counts["left_out"] for counts in totals["sources"].values()]
    assert sum(reasons.get("duplicate", 0) for reasons in left_out) > 0


def test_a_dry_run_prices_and_starts_nothing(
    data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [f"data={data_file}", "model.width=32", "model.layers=1", "model.mlp_width=32"]
    arguments += ["training.steps=1000", "training.batch_size=4", f"out={out}"]
    assert cli.main(["train", "--dry-run", *arguments]) == 0
    said = capsys.readouterr().out
    assert "256,000" in said  # 1000 steps of 4 rows of 64 tokens
    assert "epochs" in said and "MiB" in said and "minutes" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["training.stpes=3"], "did you mean 'steps'?"),
        (["data.max_lenght=3"], "did you mean 'max_length'?"),
        (["data=demmo"], "did you mean 'demo'?"),
        (["data.tokenizer=nowhere/tokenizer.json"], "nowhere"),
        (["data.sources.code.paths=[nothing/*.jsonl]", "data.store=null"], "nothing"),
        (["data.sources.code.weight=0.9"], "sum to 1.4"),
        (["training.steps=0"], "training.steps is 0"),
        (["model.heads=5"], "model.kv_heads"),
        (["model.heads=5", "model.kv_heads=1"], "model.width"),
        (["mesh.data=64"], "there are"),
        (["mixing.policy=infuence"], "known policies"),
        (["mixing=influence", "influence.targets={sum: 1}"], "did you mean 'sums'?"),
        (["mixing=influence", "mixing.min_weight=0.5"], "min_weight"),
        (["data.store=elsewhere"], "run `dh prepare`"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(
    data_file: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not arguments[0].startswith("data=demmo"):
        arguments = [f"data={data_file}", *arguments]
    assert cli.main(["train", *arguments, f"out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
