"""The shipped hub configs, against a hub on loopback with the data sets' true layouts.

`datasets` reads HF_ENDPOINT when it is imported, so the reading is done by a subprocess.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import zstandard

from dh_jax.config import HubSource, load_data_config
from dh_jax.data.sources import document_id
from tests.hub_datasets import TEXTS, build_hub, parquet
from tests.hub_mirror import Mirror, serve

ROOT = Path(__file__).parents[4]


# Answers jobs, a line of JSON each, until its input ends.
DRIVER = """
import itertools, json, sys, time
kept = []
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))  # the hub's client waits up to 8 s
from dh_jax.config import SplitConfig, load_data_config, source_config
from dh_jax.data.sources import DocumentSource
from dh_jax.errors import UserError

def source(job):
    if "config" in job:
        spec = load_data_config(job["config"]).sources[job["source"]]
    else:
        spec = source_config("s", {"kind": "hub", "retry": {"attempts": 2}} | job["spec"])
    options = {k: job[k] for k in ("split", "shard", "shuffle", "seed", "on_error") if k in job}
    options.setdefault("split", None)
    return DocumentSource(job.get("source", "s"), spec, splits=SplitConfig(0.25, 0.25), **options)

def answer(job):
    if "take" in job:  # a pass that is kept open between jobs
        if "spec" in job:
            kept[:] = [iter(source(job))]
            if "state" in job:
                kept[0].set_state(job["state"])
        taken = list(itertools.islice(kept[0], job["take"]))
        return {"documents": taken, "state": kept[0].get_state(), "skipped": kept[0].skipped}
    dataset = source(job)
    first = iter(dataset)
    if "state" in job:
        first.set_state(job["state"])
        return {"documents": list(first)}
    documents, states = [], [first.get_state()]
    for document in first:
        documents.append(document)
        states.append(json.loads(json.dumps(first.get_state())))
    rests = []
    if job.get("resume"):
        again = iter(dataset)  # one iterator, sent to every state in turn
        for state in states[:-1]:
            again.set_state(state)
            assert again.get_state() == state
            rests.append(list(again))
    return {"documents": documents, "states": states, "rests": rests, "skipped": first.skipped}

for line in sys.stdin:
    try:
        result = answer(json.loads(line))
    except UserError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    print("ANSWER" + json.dumps(result), flush=True)
"""


@contextmanager
def driver(endpoint: str, home: Path) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """A fresh interpreter that knows only this hub; torch would only slow it down."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "USE_TORCH": "0"}
    log = home / "stderr"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], env=env | {"PYTHONPATH": str(ROOT)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    with process:

        def ask(job: dict[str, Any]) -> dict[str, Any]:
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("ANSWER"):
                    return json.loads(line.removeprefix("ANSWER"))
            raise AssertionError(log.read_text()[-2000:])

        yield ask


SHIPPED = {
    "mixed_pretrain": ["dclm", "fineweb_edu", "github_code", "finemath", "slimpajama"],
    "fineweb": ["fineweb_edu"],
    "downstream": ["sst2"],
}


class Hub(NamedTuple):
    """The mirror, the texts of the training splits on it, and an interpreter that reads it."""

    mirror: Mirror
    texts: dict[str, list[str]]
    ask: Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    texts = build_hub(root)
    with serve(root) as mirror, driver(mirror.endpoint, tmp_path_factory.mktemp("home")) as ask:
        yield Hub(mirror, texts, ask)


@pytest.mark.parametrize(("config", "name"), [(c, n) for c, ns in SHIPPED.items() for n in ns])
def test_a_shipped_source_streams_its_texts_with_ids_and_places(
    hub: Hub, config: str, name: str
) -> None:
    answer = hub.ask({"config": config, "source": name, "shuffle": False})
    assert "error" not in answer, answer
    documents = answer["documents"]
    assert [text for text, _, _ in documents] == hub.texts[name]
    assert [number for _, number, _ in documents] == [document_id(t) for t in hub.texts[name]]
    assert answer["skipped"] == {}
    for text, _, where in documents[:3] + documents[-3:]:
        file, row = where.rsplit(":row ", 1)
        assert text_at(hub.mirror.root / file, int(row)) in text


def text_at(path: Path, row: int) -> str:
    """The text of a row, read from the hub's folder by other means."""
    if path.suffix == ".zst":
        with zstandard.open(path, "rt", encoding="utf-8") as file:
            return json.loads(file.readlines()[row])["text"]
    table = pq.read_table(path).to_pydict()
    return next(table[name] for name in ("text", "content", "sentence") if name in table)[row]


def test_the_shipped_configs_say_what_they_are() -> None:
    mixed = load_data_config("mixed_pretrain")
    assert {n: s.weight for n, s in mixed.sources.items()} == {
        "dclm": 0.25, "fineweb_edu": 0.35, "github_code": 0.10, "finemath": 0.15,
        "slimpajama": 0.15,
    }  # fmt: skip
    assert set(mixed.probes.values()) == set(mixed.sources)  # each judged by its own probe split
    assert mixed.sources["github_code"].text.column == "content"
    assert (mixed.max_length, load_data_config("fineweb").max_length) == (2048, 2048)
    downstream = load_data_config("downstream")
    assert downstream.max_length == 512
    assert downstream.sources["sst2"].text.choices == {"label": ["negative", "positive"]}
    for name in SHIPPED:
        config = load_data_config(name)
        assert all(isinstance(s, HubSource) for s in config.sources.values())
        assert min(config.splits.probe, config.splits.eval) > 0
        assert config.tokenizer == "HuggingFaceTB/SmolLM2-135M"


def test_splits_and_shards_of_a_stream_are_disjoint_and_complete(hub: Hub) -> None:
    base = {"config": "fineweb", "source": "fineweb_edu", "seed": 3}
    jobs = [base | {"split": split} for split in ("train", "probe", "eval")]
    jobs += [base | {"shard": [i, 2]} for i in range(2)]
    answers = [[d[0] for d in a["documents"]] for a in map(hub.ask, jobs)]
    assert all(answers)
    everything = sorted(hub.texts["fineweb_edu"])
    assert sorted(answers[0] + answers[1] + answers[2]) == everything
    assert sorted(answers[3] + answers[4]) == everything


def test_resume_of_a_stream_is_exact_at_every_position_and_opens_no_earlier_file(hub: Hub) -> None:
    jobs = [
        {"config": "fineweb", "source": "fineweb_edu", "seed": 1, "resume": True},
        {"config": "mixed_pretrain", "source": "dclm", "shuffle": False, "resume": True},
        {"config": "downstream", "source": "sst2", "split": "train", "resume": True},
    ]
    answers = [hub.ask(job) for job in jobs]
    for answer in answers:
        documents = answer["documents"]
        assert answer["rests"][: len(documents)] == [documents[i:] for i in range(len(documents))]
    documents = answers[0]["documents"]
    assert [d[0] for d in documents] != hub.texts["fineweb_edu"]  # files in another order
    assert sorted(d[0] for d in documents) == sorted(hub.texts["fineweb_edu"])

    files = list(dict.fromkeys(d[2].split(":row ")[0] for d in documents))
    middle = next(i for i, d in enumerate(documents) if d[2].startswith(files[2])) + 2
    asked = len(hub.mirror.requests)
    fresh = {"config": "fineweb", "source": "fineweb_edu", "seed": 1}
    resumed = hub.ask(fresh | {"state": answers[0]["states"][middle]})
    assert resumed["documents"] == documents[middle:]
    read = {p.rsplit("/", 1)[1] for m, p in hub.mirror.requests[asked:] if p.endswith(".parquet")}
    schema = "000_00000.parquet"  # the first file of the listing, opened for its columns
    assert read <= {files[2].rsplit("/", 1)[1], schema}
    assert files[1].rsplit("/", 1)[1] not in read - {schema}


def test_a_state_is_refused_once_the_data_set_has_changed(hub: Hub) -> None:
    root = hub.mirror.root / "org" / "moving"
    parquet(root / "train.parquet", {"text": TEXTS[:5]})
    job: dict[str, Any] = {"spec": {"path": "org/moving"}}
    state = hub.ask(job)["states"][2]
    parquet(root / "train.parquet", {"text": TEXTS[1:6]})
    answer = hub.ask(job | {"state": state})
    assert answer["error"] == "StateError"
    assert "saved state has files" in answer["message"]


def test_what_a_hub_refuses_is_one_line_with_the_cure(hub: Hub) -> None:
    parquet(
        hub.mirror.root / "org" / "numbers" / "train.parquet", {"text": [1, 2], "s": ["a", "b"]}
    )
    broken = hub.mirror.root / "org" / "broken" / "train.parquet"
    parquet(broken, {"text": TEXTS[:5]})
    broken.write_bytes(broken.read_bytes()[:-30])
    fineweb = {"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT"}
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"path": "no/such"}, ["no/such", hub.mirror.endpoint, "not found", "check path"]),
        ({"path": "org/gated"}, ["gated", "HF_TOKEN"]),
        ({"path": "codeparrot/github-code"}, ["loading script", "path: parquet"]),
        (fineweb | {"revision": "v9"}, ["'v9'", "check path, name, revision"]),
        (fineweb | {"name": "sample-1BT"}, ["sample-1BT", "sample-10BT", "check name"]),
        (fineweb | {"hub_split": "dev"}, ["dev", "train", "hub_split"]),
        (fineweb | {"data_files": "absent/*"}, ["data_files"]),
        ({"path": "org/broken"}, ["org/broken", "cannot be read"]),
        ({"path": "org/numbers"}, ["org/numbers/train.parquet:row 0", "int '1', not text"]),
        ({"path": "org/numbers", "text": {"column": "t"}}, ["no column 't'; there are: text, s"]),
    ]
    for spec, words in cases:
        answer = hub.ask({"spec": spec})
        assert answer.get("error") == "DataError", (spec, answer)
        assert "\n" not in answer["message"]
        for word in words:
            assert word in answer["message"], (spec, word, answer["message"])


def faulty(mirror: Mirror) -> tuple[dict[str, Any], list[str]]:
    """A data set of three files of row groups, and its texts."""
    for k in range(3):
        texts = {"text": TEXTS[20 * k : 20 * k + 20]}
        parquet(mirror.root / "org" / "long" / f"train-{k}-of-3.parquet", texts, 5)
    return {"spec": {"path": "org/long"}, "shuffle": False}, TEXTS[:60]


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_answers_late_leaves_no_trace(hub: Hub, status: int) -> None:
    job, texts = faulty(hub.mirror)
    first = hub.ask(job | {"take": 15})
    hub.mirror.orders[:] = [status] * 8  # more than the hub's own client bears
    rest = hub.ask({"take": 100})
    assert [d[0] for d in first["documents"] + rest["documents"]] == texts
    assert hub.mirror.orders == []


def test_the_files_of_a_hub_are_read_by_their_addresses(hub: Hub) -> None:
    _, texts = faulty(hub.mirror)
    root = hub.mirror.root / "org" / "lines"
    root.mkdir(exist_ok=True)
    raw = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:30]).encode()
    (root / "a.jsonl").write_bytes(raw)
    (root / "b.jsonl.zst").write_bytes(zstandard.compress(raw))
    for paths, expected in (
        ("org/long/*.parquet", texts),
        ("org/lines", TEXTS[:30] * 2),
        ("org/lines/a.jsonl", TEXTS[:30]),
    ):
        spec = {"kind": "files", "paths": [f"hf://datasets/{paths}"]}
        answer = hub.ask({"spec": spec, "shuffle": False})
        assert [d[0] for d in answer["documents"]] == expected
        rest = hub.ask({"spec": spec, "shuffle": False, "state": answer["states"][7]})
        assert rest["documents"] == answer["documents"][7:]
    hub.mirror.orders[:] = [503] * 7
    assert len(hub.ask({"spec": spec, "take": 99})["documents"]) == 30
    missing = {"kind": "files", "paths": ["hf://datasets/org/lines/absent.jsonl"]}
    assert "not found" in hub.ask({"spec": missing})["message"]


@pytest.mark.parametrize(
    ("status", "words"), [(500, "answered 500 again and again"), (404, "not found")]
)
def test_a_hub_that_fails_for_good_is_one_line_and_its_state_goes_on_later(
    hub: Hub, status: int, words: str
) -> None:
    job, texts = faulty(hub.mirror)
    first = hub.ask(job | {"take": 25})
    hub.mirror.failing = status
    try:
        failed = hub.ask({"take": 100})
        asked = len(hub.mirror.requests)
        hub.ask({"take": 1})
        if status == 404:  # is not asked for again and again
            assert len(hub.mirror.requests) - asked < 6
    finally:
        hub.mirror.failing = None
    assert failed["error"] == "DataError"
    assert "on_error: skip" in failed["message"]
    assert words in failed["message"] and "\n" not in failed["message"]
    rest = hub.ask(job | {"take": 100, "state": first["state"]})
    assert [d[0] for d in first["documents"] + rest["documents"]] == texts


def test_a_file_of_a_hub_that_stays_unreadable_is_skipped_and_counted_on_request(hub: Hub) -> None:
    job, texts = faulty(hub.mirror)
    first = hub.ask(job | {"take": 38, "on_error": "skip"})["documents"]
    hub.mirror.failing = 500
    try:
        rest = hub.ask({"take": 100})
    finally:
        hub.mirror.failing = None
    assert [d[0] for d in first + rest["documents"]] == texts[:40]
    assert rest["skipped"] == {"unreadable_file": 1}


def test_a_hub_killed_under_way_is_an_error_and_the_state_goes_on_after_its_return(
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        with serve(tmp_path) as mirror:
            job, texts = faulty(mirror)
            ask = stack.enter_context(driver(mirror.endpoint, tmp_path))
            first = ask(job | {"take": 30})
        failed = ask({"take": 100})
        assert failed["error"] == "DataError"
        assert "cannot be reached; check the network" in failed["message"]
        files = "hf://datasets/org/name/*.parquet"
        absent = ask({"spec": {"path": "parquet", "data_files": files}})
        assert absent["error"] == "DataError"
        assert mirror.endpoint in absent["message"]
        assert "set HF_ENDPOINT to a reachable mirror" in absent["message"]
        with serve(tmp_path, mirror.server_port):
            rest = ask(job | {"take": 100, "state": first["state"]})
        assert [d[0] for d in first["documents"] + rest["documents"]] == texts
