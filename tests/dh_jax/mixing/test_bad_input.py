"""What a mixture cannot be made of: one line that names the source, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dh_jax import cli
from dh_jax.config import load_data_config
from dh_jax.errors import ConfigError
from tests.dh_jax.distributed.running import write_data

TINY = (
    "model.width=16", "model.layers=1", "model.heads=2", "model.kv_heads=1", "model.mlp_width=16",
    "training.steps=2", "training.batch_size=2", "training.eval_rows=2",
)  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sources.mail.weight=-0.2"], "source 'mail': weight -0.2 must be finite and >= 0"),
        (["sources.mail.weight=.nan"], "source 'mail': weight nan must be finite"),
        (["sources.mail.weight=.inf"], "source 'mail': weight inf must be finite"),
        ([f"sources.{name}.weight=0" for name in ("code", "mail", "sums")],
         "source weights sum to 0, not 1; give at least one source a positive weight"),
        (["sources.mial.weight=0.2"], "source 'mial' has no kind.*misspelt"),
        (["probes.target=smus"], "probe 'target' names source 'smus' .did you mean 'sums'"),
    ],
)  # fmt: skip
def test_weights_that_are_no_mixture(overrides: list[str], message: str, make_config: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        load_data_config(make_config(), overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["mixing=influence", "mixing.min_weight=0.4"], "min_weight over 3 sources sums to 1.2"),
        (["mixing=odm", "mixing.bounds={mial: [0.1, 0.5]}"], "'mial' (did you mean 'mail'?)"),
        (["mixing=influence", "influence.targets={smus: 1}"], "'smus' (did you mean 'sums'?)"),
        (["mixing=influence", "mixing.budget=5"], "mixing.budget is 5.0; it is a share"),
        (["mixing=influence", "mixing.budget=0.05", "mixing.longest=3"], "mixing.longest is 3"),
        (["mixing=proportional", "mixing.sizes={code: 1, mail: -1, sums: 1}"], "above 0"),
    ],
)
def test_a_run_that_cannot_be_steered_is_refused_in_one_line(
    overrides: list[str], said: str, make_config: Any, store: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = write_data(make_config(store=str(store)), tmp_path)
    words = ["train", f"data={data}", *TINY, f"out={tmp_path / 'run'}", *overrides]
    assert cli.main(words) == cli.EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith("dh train: ") and captured.err.count("\n") == 1
    assert said in captured.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_probe_without_a_document_is_named(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    nothing = {"kind": "files", "paths": [str(tmp_path / "empty.jsonl")], "split": "probe"}
    data = write_data(make_config(probes={"nothing": nothing}), tmp_path)
    words = ["train", f"data={data}", *TINY, "mixing=influence", f"out={tmp_path / 'run'}"]
    assert cli.main(words) == cli.EXIT_USER_ERROR
    assert "'nothing'" in capsys.readouterr().err
