"""The command line: what it prints, and that a mistake is one line with the cure."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dh_jax import cli
from dh_jax.config import describe_configs, list_configs


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
    for command in (
        "train", "influence", "prepare", "inspect", "show", "replay", "report", "configs", "demo",
    ):  # fmt: skip
        assert f"dh {command}" in said


def test_configs_lists_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs"]) == 0
    said = capsys.readouterr().out
    for name in ("mixed_pretrain", "fineweb", "downstream", "demo", "smollm2_135m", "influence"):
        assert name in said
    for group, configs in describe_configs().items():
        assert list(configs) == list_configs()[group]
        for name, about in configs.items():  # a sentence, not cut at "et al."
            assert len(about) > 8 and about.count("(") == about.count(")"), (group, name, about)


def test_inspect_shows_shares_packing_and_rows(
    data_file: Path, corpora: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", f"data={data_file}", "--batches", "3"]) == 0
    said = capsys.readouterr().out
    efficiency = re.search(r"packing efficiency ([\d.]+)%", said)
    assert efficiency and float(efficiency[1]) > 95 and said.count(" padding") == 3
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
        (["data.store=elsewhere"], "run `dh prepare data=...`"),
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


# --- looking at data -------------------------------------------------------------------------


def test_inspect_writes_a_page_or_json(
    data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "new" / "page.html"
    arguments = ["inspect", "--batches", "1", f"data={data_file}", "--rows", "1"]
    assert cli.main([*arguments, "--html", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert page.read_text().rstrip().endswith("</html>")
    assert cli.main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert 0.95 < said["packing_efficiency"] <= 1 and len(said["rows"]) == 1
    assert set(said["sources"]) == {"code", "mail", "sums"}


def test_show_finds_a_document_that_inspect_named(
    data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", f"data={data_file}", "--batches", "1", "--json"]) == 0
    segment = json.loads(capsys.readouterr().out)["rows"][0]["segments"][0]
    assert cli.main(["show", segment["document"], f"data={data_file}"]) == 0
    said = capsys.readouterr().out
    assert segment["document"] in said and ".jsonl:" in said.replace("\n", "")
    assert cli.main(["show", f"0x{segment['document']}", f"data={data_file}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    offset = segment["offset"]
    piece = found["token_ids"][offset : offset + len(segment["token_ids"])]
    assert piece == segment["token_ids"] and ".jsonl:" in found["where"]
    assert cli.main(["show", segment["document"], f"data={data_file}", "--no-record"]) == 0
    assert ".jsonl:" not in capsys.readouterr().out


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    program = (
        "import sys; from dh_jax import cli\n"
        "for words in [[], ['inspect'], ['show'], ['replay'], ['train']]:\n"
        "    try: cli.main([*words, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = 'jax numpy grain hydra omegaconf rich numba tokenizers datasets pyarrow'\n"
        "print('imported:', [m for m in heavy.split() if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip().endswith("imported: []")
