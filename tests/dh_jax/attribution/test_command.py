"""`dh influence` from end to end on a tiny model: what it writes, resumes and refuses."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from dh_jax import cli
from dh_jax.attribution.config import AttributionConfig
from dh_jax.attribution.price import price_influence, refuse_too_large
from dh_jax.attribution.run import numbered, open_influence, piece_name, score_documents
from dh_jax.attribution.table import write_table
from dh_jax.compose import compose
from dh_jax.config import ModelConfig
from dh_jax.errors import ConfigError, DataError
from dh_jax.influence.score_store import Shard
from dh_jax.models import decoder
from dh_jax.models.pretrained import save_pretrained

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.filterwarnings("ignore::dh_jax.influence.estimator.CoverageWarning")

SMALL = [
    "model.width=16", "model.layers=1", "model.heads=2", "model.kv_heads=1", "model.mlp_width=24",
    "data.packing.max_segments=1", "documents=30", "batch_size=2", "queries.documents=3",
    "top=3", "tinted=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_file(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("influence") / "small.yaml"
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(make_config())), path)
    return path


@pytest.fixture(scope="module")
def finished(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main(["influence", f"data={data_file}", *SMALL, f"out={out}"]) == 0
    return out


def test_the_table_holds_every_document(finished: Path) -> None:
    table = pq.read_table(finished / "scores.parquet")
    assert table.num_rows == 30
    facts = json.loads((finished / "influence.json").read_text())
    assert facts["scored"] == 30 and facts["queries"] == ["code", "mail", "sums"]
    named = np.stack([table[f"score/{name}"].to_numpy() for name in facts["queries"]])
    np.testing.assert_allclose(table["score"].to_numpy(), named.mean(axis=0), atol=1e-7)
    assert np.ptp(named) > 0 and (np.abs(named) <= 1 + 1e-5).all()  # cosines
    assert set(table["source"].to_pylist()) <= {"code", "mail", "sums"}
    assert all(len(document) == 16 for document in table["document"].to_pylist())


def test_the_report_shows_the_extreme_documents_escaped(finished: Path) -> None:
    table = pq.read_table(finished / "scores.parquet").to_pylist()
    page = (finished / "report.html").read_text()
    best = min(table, key=lambda row: row["score"])
    worst = max(table, key=lambda row: row["score"])
    head, _, tail = page.partition("Most harmful")
    assert f"<code>{best['document']}</code>" in head
    assert f"<code>{worst['document']}</code>" in tail
    assert "drawn at random and never trained" in page and "dh influence" in page
    assert page.count("<script") == 1 and 'class="up"' in page


def test_other_inputs_are_refused_by_name(
    finished: Path, data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, named in (
        ("estimator=gradient_dot", "estimator.name"),
        ("model.init_scale=0.03", "model.params"),
        ("model.norm_epsilon=0.5", "model.config.norm_epsilon"),  # the same arrays, read otherwise
        ("model.dtype=bfloat16", "model.config.dtype"),
        ("data.sources.code.weight=0.4 data.sources.mail.weight=0.3", "data.weights.code"),
        ("data.max_length=48", "data.row_length"),
        ("queries.probes=[mail]", "queries.batches"),
    ):
        words = [f"data={data_file}", *SMALL, f"out={finished}", *change.split()]
        assert cli.main(["influence", *words]) == 2
        said = capsys.readouterr().err
        assert "holds scores of other inputs" in said and named in said


def test_adapters_are_known_with_their_base(data_file: Path, tmp_path: Path) -> None:
    """Fresh adapters are the same beside any base; what differs are the base's numbers."""
    shape = ModelConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=24)
    models = []
    for name in ("one", "two", "moved"):
        drawn = decoder.build(shape, 600, jax.random.key(name == "two"))[1]
        folder = save_pretrained(tmp_path / name, shape, drawn)
        words = [
            f"data={data_file}", "model=pretrained", f"model.pretrained={folder}",
            "model.lora.rank=2", "data.packing.max_segments=1", "queries.documents=1",
        ]  # fmt: skip
        config = compose("attribution", AttributionConfig, words)
        models.append(open_influence(config).identity["model"])
    one, two, moved = models
    assert one["params"] == two["params"] and one["frozen"] != two["frozen"]
    assert moved == one


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_scores(
    finished: Path, data_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    words = [f"data={data_file}", *SMALL, f"out={out}"]
    index = int(np.random.default_rng().integers(0, 8))
    program = (
        "import sys, os, signal\n"
        "from dh_jax.influence.score_store import ScoreStore\n"
        "from dh_jax import cli\n"
        "write = ScoreStore.write\n"
        "def dying(self, index, shard):\n"
        f"    if index == {index}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(self, index, shard)\n"
        "ScoreStore.write = dying\n"
        "cli.main(sys.argv[1:])\n"
    )
    died = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, "influence", *words],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not (out / "scores.parquet").exists()
    if index:
        (out / "scores" / "shards" / "000000.safetensors").unlink()  # scored again as well
    assert cli.main(["influence", *words]) == 0
    ours = pq.read_table(out / "scores.parquet")
    theirs = pq.read_table(finished / "scores.parquet")
    for name in ours.column_names:
        assert ours[name].to_pylist() == theirs[name].to_pylist(), name


@pytest.mark.slow
def test_ekfac_with_thin_queries_self_influence_and_texts(data_file: Path, tmp_path: Path) -> None:
    words = [
        f"data={data_file}", *SMALL, f"out={tmp_path}", "estimator=ekfac", "self_influence=true",
        "queries.low_rank=4", "queries.texts=['def mean(data): return sum(data)']",
        "queries.probes=[sums]", "estimator.fit_documents=20",
    ]  # fmt: skip
    assert cli.main(["influence", *words]) == 0
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.column_names[-3:] == ["score/sums", "score/text 1", "self_influence"]
    assert (table["self_influence"].to_numpy() > 0).all()
    page = (tmp_path / "report.html").read_text()
    assert "Queries are kept at rank 4" in page and "damping 0.1" in page


@pytest.mark.slow
def test_a_runs_checkpoint_is_what_is_measured(data_file: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    few = [
        "training.steps=2", "training.batch_size=2", "training.eval_rows=2",
        "training.eval_interval=2", "training.warmup=1",
    ]  # fmt: skip
    shape = [word for word in SMALL if word.startswith("model.")]
    assert cli.main(["train", f"data={data_file}", *shape, *few, f"out={run}"]) == 0
    others = [word for word in SMALL if not word.startswith("model.")]
    words = [f"data={data_file}", *others, "tinted=0", f"run={run}", f"out={out}"]
    assert cli.main(["influence", *words]) == 0
    facts = json.loads((out / "influence.json").read_text())
    assert facts["model"] == f"{run}, step 2" and facts["config"]["model"]["width"] == 16
    assert cli.main(["influence", *words[:-2], f"run={tmp_path}", f"out={out}"]) == 2


@pytest.mark.slow
def test_a_score_that_is_not_finite_names_batch_and_document(
    finished: Path, data_file: Path
) -> None:
    config = compose(
        "attribution", AttributionConfig, [f"data={data_file}", *SMALL, f"out={finished}"]
    )
    opened = open_influence(config)
    params = opened.model.params
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(np.nan)
    shard = finished / "scores" / "shards" / "000004.safetensors"
    kept = shard.read_bytes()
    shard.unlink()
    third = pq.read_table(finished / "scores.parquet")["document"][8].as_py()
    try:
        with pytest.raises(DataError, match=f"batch 4, row 0, .*it is document {third}"):
            score_documents(opened)
    finally:
        shard.write_bytes(kept)


@pytest.mark.slow
def test_a_dry_run_prices_and_a_limit_refuses(
    data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data={data_file}", *SMALL, f"out={tmp_path / 'run'}"]
    assert cli.main(["influence", "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert "3 queries take" in said and "GiB at the peak" in said
    assert not (tmp_path / "run").exists()
    assert cli.main(["influence", *words, "memory_limit=0.01"]) == 2
    assert "above memory_limit 0.01" in capsys.readouterr().err


@pytest.mark.slow
def test_more_queries_cost_more_memory(data_file: Path) -> None:
    few, many = (
        price_influence(
            compose("attribution", AttributionConfig, [f"data={data_file}", *SMALL, *more])
        )
        for more in ([], ["queries.average=false"])
    )
    assert many.queries == 9 and many.query_bytes == 3 * few.query_bytes
    assert many.bytes > few.bytes
    with pytest.raises(ConfigError, match=r"queries\.low_rank"):
        refuse_too_large(many, many.bytes / 2**30 / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("estimator.name=ekfacs", "did you mean 'ekfac'"),
        ("estimator.arguments={damp: 1}", "no argument 'damp'"),
        ("queries.probes=[mial]", "did you mean 'mail'"),
        ("documents=0", "the least is 1"),
    ],
)
def test_mistakes_are_named(
    data_file: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["influence", f"data={data_file}", *SMALL, change]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_every_piece_of_a_probe_document_has_a_column(data_file: Path, tmp_path: Path) -> None:
    """Rows of 8 tokens, so that documents come in pieces."""
    words = [
        f"data={data_file}", *SMALL, f"out={tmp_path}", "data.max_length=8", "documents=4",
        "queries.average=false", "queries.documents=12", "queries.probes=[code]", "tinted=0",
    ]  # fmt: skip
    assert cli.main(["influence", *words]) == 0
    facts = json.loads((tmp_path / "influence.json").read_text())
    names = facts["queries"]
    assert len(names) == len(set(names)) >= 12
    assert any("@8" in name for name in names) and any("@" not in name for name in names)
    table = pq.read_table(tmp_path / "scores.parquet")
    columns = [name for name in table.column_names if name.startswith("score/")]
    assert columns == [f"score/{name}" for name in names]
    each = np.stack([table[name].to_numpy() for name in columns])
    np.testing.assert_allclose(table["score"].to_numpy(), each.mean(axis=0), atol=1e-6)


def test_pieces_are_named_apart_and_a_table_refuses_names_given_twice(tmp_path: Path) -> None:
    assert piece_name(10, 0) == "000000000000000a" and piece_name(10, 64) == "000000000000000a@64"
    assert numbered(["a", "b", "a", "a"]) == ["a", "b", "a#2", "a#3"]
    columns = {
        "document": np.arange(2, dtype=np.uint64), "offset": np.zeros(2, np.int64),
        "tokens": np.ones(2, np.int32), "targets": np.ones(2, np.int32),
        "source": np.zeros(2, np.int32),
    }  # fmt: skip
    shard = Shard("x", np.array([[1, 1], [2, 2], [3, 3]], np.float32), columns)
    path = tmp_path / "scores.parquet"
    with pytest.raises(DataError, match="1 names of queries are given more than once, 'maths/a'"):
        write_table(path, [shard], ["maths/a", "maths/a", "maths/b"], ["maths"], {})
    assert not path.exists()
    write_table(path, [shard], numbered(["maths/a", "maths/a", "maths/b"]), ["maths"], {})
    table = pq.read_table(path).to_pydict()
    assert [table[f"score/maths/{name}"][0] for name in ("a", "a#2", "b")] == [1, 2, 3]
