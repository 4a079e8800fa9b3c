"""A replayed batch is bit by bit the one that the run trained on, or there is an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from dh_jax import cli, runconfig
from dh_jax.batch import Batch, Origins
from dh_jax.config import InfluenceConfig, MixingConfig, ModelConfig, RunConfig, TrainingConfig
from dh_jax.data.loader import Loader
from dh_jax.data.prepare import prepare
from dh_jax.errors import ConfigError, DataError, StateError
from dh_jax.inspection.replay import replay
from dh_jax.train import train

STEPS, INTERVAL, CHECKPOINT = 11, 3, 4


class Trained(NamedTuple):
    """What really went into a training step, seen at the loader's mouth."""

    batch: Batch
    origins: Origins
    weights: dict[str, float]


class Recorded(NamedTuple):
    folder: Path
    corpus: Path
    store: Path | None
    batches: list[Trained]


def record(config: RunConfig) -> list[Trained]:
    """Train, and keep every batch that the training loader hands out (not the samplers')."""
    batches: list[Trained] = []
    opened: list[Loader] = []
    genuine_open, genuine_next = runconfig.get_loader, Loader.__next__

    def opening(*arguments: Any, **settings: Any) -> Loader:
        opened.append(genuine_open(*arguments, **settings))
        return opened[-1]

    def watched(loader: Loader) -> Batch:
        batch = genuine_next(loader)
        if loader in opened:
            copy = Batch(*(None if x is None else np.array(x) for x in batch))
            batches.append(Trained(copy, loader.origins, loader.weights))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runconfig, "get_loader", opening)
        patch.setattr(Loader, "__next__", watched)
        train(config)
    assert len(opened) == 1 and len(batches) == STEPS
    return batches


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile in haste, and only once for both runs: here the data is of interest."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module", params=["store", "stream"])
def run(
    request: pytest.FixtureRequest,
    compiled: None,
    make_config: Any,
    corpora: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recorded:
    """A steered run whose text and store are its own, so that tests may damage them."""
    folder = tmp_path_factory.mktemp(request.param)
    corpus = folder / "corpus"
    corpus.mkdir()
    weights = {"code": 0.5, "mail": 0.2, "sums": 0.3}
    for name in weights:
        shutil.copy(corpora[name], corpus / f"{name}.jsonl")
    data = make_config(
        sources={
            name: {"kind": "files", "paths": [str(corpus / f"{name}.jsonl")], "weight": weight}
            for name, weight in weights.items()
        },
        store=str(folder / "store") if request.param == "store" else None,
    )
    if data.store is not None:
        prepare(data)
    config = RunConfig(
        data=data,
        model=ModelConfig(width=32, layers=1, heads=2, kv_heads=1, mlp_width=32),
        mixing=MixingConfig(policy="influence", interval=INTERVAL, min_weight=0.25),
        influence=InfluenceConfig(targets={"sums": 1.0}, rows_per_source=2, probe_rows=2),
        training=TrainingConfig(
            steps=STEPS, batch_size=4, eval_rows=4, eval_interval=STEPS, seed=3,
            checkpoint_interval=CHECKPOINT, keep=9, log_interval=5,
        ),
        out=str(folder / "run"),
    )  # fmt: skip
    batches = record(config)
    return Recorded(folder / "run", corpus, Path(data.store) if data.store else None, batches)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    found = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in found}


def test_every_batch_of_a_steered_run_comes_back_with_the_same_bits(run: Recorded) -> None:
    """Before the first checkpoint, between two, behind the last, and after every move."""
    before = files(run.folder)
    moves = [
        json.loads(x)["step"] for x in (run.folder / "metrics.jsonl").read_text().splitlines()
        if json.loads(x)["kind"] == "reweight"
    ]  # fmt: skip
    assert moves == [3, 6, 9]
    # The policy's bounds move the weights away from the configured ones before the first step.
    assert run.batches[0].weights["mail"] == pytest.approx(0.25)  # 0.2 in the config
    assert len({tuple(b.weights.values()) for b in run.batches}) == 4
    for step, (batch, origins, weights) in enumerate(run.batches, start=1):
        found = replay(run.folder, step)
        assert found.weights == weights, step
        for ours, theirs in zip((*found.batch, *found.origins), (*batch, *origins), strict=True):
            if theirs is not None:
                np.testing.assert_array_equal(ours, theirs, err_msg=f"step {step}", strict=True)
        assert found.since == (step - 1) // CHECKPOINT * CHECKPOINT
        texts = ["".join(s.text for s in segment.spans) for segment in found.rows[0].segments]
        assert all(texts) and len(found.rows) == 4
    assert files(run.folder) == before


def test_the_log_is_compared_on_the_way(run: Recorded) -> None:
    assert replay(run.folder, 4).compared == 1  # step 1; then 5, 10 and 11 are logged
    assert replay(run.folder, 11).compared == 2
    assert replay(run.folder, 9).compared == 0
    log = run.folder / "metrics.jsonl"
    genuine = log.read_text()
    records = [json.loads(line) for line in genuine.splitlines()]
    (fifth,) = (r for r in records if r["kind"] == "train" and r["step"] == 5)
    genuine_sum, fifth["batch"] = fifth["batch"], "0" * 16
    try:
        log.write_text("".join(json.dumps(r) + "\n" for r in records))
        with pytest.raises(StateError, match=f"at step 5 .*{'0' * 16}.*{genuine_sum}"):
            replay(run.folder, 6)
        # Weights before the first move that no record tells of are not guessed.
        fifth["batch"] = None  # as several hosts leave it
        kept = [r for r in records if r["kind"] != "train" or r["step"] > 5]
        log.write_text("".join(json.dumps(r) + "\n" for r in kept))
        with pytest.raises(StateError, match="says nothing of the weights up to step 3"):
            replay(run.folder, 2)
        assert replay(run.folder, 10).since == 8
    finally:
        log.write_text(genuine)


def test_only_the_rows_asked_for_are_decoded(run: Recorded) -> None:
    (row,) = replay(run.folder, 2, rows=[3]).rows
    assert row == replay(run.folder, 2).rows[3]


def test_the_command_prints_a_batch_for_people_or_machines(
    run: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", str(run.folder), "--step", "10", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["step"], said["since"], said["compared"]) == (10, 8, 1)
    assert said["weights"] == run.batches[9].weights and "batch" not in said
    for row, trained in zip(said["rows"], run.batches[9].batch.tokens_BT, strict=True):
        tokens = [token for segment in row["segments"] for token in segment["token_ids"]]
        assert tokens == trained[: len(tokens)].tolist()
    assert cli.main(["replay", str(run.folder), "--step", "10", "--row", "1"]) == 0
    shown = capsys.readouterr().out
    assert "agree with their checksums in the log: 1" in " ".join(shown.split())
    for number, row in enumerate(said["rows"]):
        for segment in row["segments"]:
            label = f"{segment['document']}  from token {segment['offset']:,}"
            text = "".join(span["text"] for span in segment["spans"])
            assert (label in shown and text in shown) == (number == 1)
    assert cli.main(["replay", str(run.folder), "--step", "12"]) == 2
    assert "no step 12" in capsys.readouterr().err


def test_what_the_run_does_not_have_is_one_line(run: Recorded, tmp_path: Path) -> None:
    for step in (0, -1, 12):
        with pytest.raises(DataError, match=f"no step {step}; it has logged steps 1 to 11"):
            replay(run.folder, step)
    with pytest.raises(DataError, match="no row 4; rows are 0 to 3"):
        replay(run.folder, 1, rows=[4])
    with pytest.raises(DataError, match="missing; a run folder holds"):
        replay(tmp_path, 1)


def test_data_that_is_gone_or_moved_or_changed_is_noticed(run: Recorded, tmp_path: Path) -> None:
    """Last, since it leaves nothing of the run's data in place."""
    lines = (run.corpus / "code.jsonl").read_text().splitlines(keepends=True)
    swapped = "".join([*lines[1::2], *lines[::2]])  # the same size, another order
    if run.store is None:
        (run.corpus / "code.jsonl").write_text(swapped + '{"text": "new"}\n')
        with pytest.raises(StateError, match=r"no longer there as the run read it.*has files"):
            replay(run.folder, 7)
        (run.corpus / "code.jsonl").write_text(swapped)
        with pytest.raises(StateError, match="the data is not what the run read"):
            replay(run.folder, 5)
        shutil.rmtree(run.corpus)
        with pytest.raises(ConfigError, match=r"no longer there as the run read it.*no file"):
            replay(run.folder, 7)
    else:
        shutil.rmtree(run.corpus)
        moved = tmp_path / "elsewhere"
        run.store.rename(moved)
        with pytest.raises(DataError, match=r"no longer there as the run read it.*--store"):
            replay(run.folder, 7)
        found = replay(run.folder, 7, store=str(moved))
        np.testing.assert_array_equal(found.batch.tokens_BT, run.batches[6].batch.tokens_BT)
