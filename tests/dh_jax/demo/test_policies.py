"""Every policy that ships steers a run on the demo's real text; `make slow`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from dh_jax import cli
from dh_jax.config import list_configs
from dh_jax.demo.study import FOLDER_VARIABLE, build_data

STEPS = {"odm": 14}  # its first M ln M moves leave the weights uniform
FEW = 4
NEEDS = {  # what a policy cannot do without
    "schedule": ["mixing.stages=[{step: 2, weights: {maths: 0.5, docs: 0.5}}]"],
    "doremi": ["mixing.reference_run=REFERENCE"],
}
SMALL = (
    "model.width=16", "model.layers=1", "model.heads=2", "model.kv_heads=1", "model.mlp_width=16",
    f"training.steps={FEW}", "training.batch_size=4", "training.eval_rows=2", "training.warmup=1",
    "influence=demo", "influence.rows_per_source=1", "influence.probe_rows=1",
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo's data (those that DH_DEMO names, if it does), and a static run on it."""
    folder = tmp_path_factory.mktemp("demo")
    kept = os.environ.get(FOLDER_VARIABLE)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    build_data(Path(kept) if kept else folder)
    out = folder / "static"
    assert cli.main(["train", "data=demo", *SMALL, f"out={out}"]) == 0
    yield out
    jax.config.update("jax_compilation_cache_dir", None)
    if kept is None:
        os.environ.pop(FOLDER_VARIABLE)


@pytest.mark.parametrize("name", list_configs()["mixing"])
def test_dh_train_takes_every_policy_by_name_on_the_demos_text(
    name: str, reference: Path, tmp_path: Path
) -> None:
    more = [words.replace("REFERENCE", str(reference)) for words in NEEDS.get(name, [])]
    interval = [] if name in ("odm", "ado", "doremi") else ["mixing.interval=1"]
    out = tmp_path / "run"
    steps = STEPS.get(name, FEW)
    more += [*interval, f"training.steps={steps}", f"out={out}"]
    words = ["train", "data=demo", f"mixing={name}", *SMALL, *more]
    assert cli.main(words) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = [record["weights"] for record in records if record["kind"] == "train"]
    assert len(weights) == steps
    for each in weights:
        assert sum(each.values()) == pytest.approx(1, abs=1e-5) and min(each.values()) >= 0
    still = name in ("static", "uniform", "temperature", "proportional")
    assert (weights[0] == weights[-1]) == still
