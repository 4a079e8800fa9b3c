"""Sources behind fsspec: a web server, an S3 bucket (moto), memory; and what may go wrong there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from moto.server import ThreadedMotoServer

from dh_jax.config import public_spec, source_config
from dh_jax.data.reading import storage
from dh_jax.data.sources import DocumentSource
from dh_jax.errors import ConfigError, DataError
from tests.document_files import GOOD, TEXTS, THIRDS, lines, texts_of, write_every_format
from tests.file_server import FileServer, serve_files

QUICK = {"attempts": 4, "first": 0.01, "longest": 0.05}


def remote(path: str, **options: Any) -> DocumentSource:
    spec_keys = ("format", "include", "storage_options", "retry", "interleave")
    spec = {k: options.pop(k) for k in spec_keys if k in options}
    files = source_config("s", {"kind": "files", "paths": [path], "retry": QUICK} | spec)
    return DocumentSource("s", files, split=None, splits=THIRDS, **options)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "REMOTE_BLOCK", 256)


# --- a web server ----------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FileServer]:
    write_every_format(tmp_path)
    with serve_files(tmp_path) as server:
        yield server


def test_a_web_server_gives_the_same_documents_as_the_disk(web: FileServer) -> None:
    names = ["a.jsonl", "b.jsonl.gz", "c.ndjson.zst", "d.parquet", "e.json"]
    for name in names:
        local = list(remote(f"{web.root}/{name}"))
        assert len(local) == 10
        there = list(remote(f"{web.url}/{name}"))
        assert [(d.text, d.id) for d in there] == [(d.text, d.id) for d in local]
        assert there[3].where == local[3].where.replace(f"{web.root}", web.url)
    assert texts_of(remote(f"{web.url}/*.json*", shuffle=False)) == TEXTS[:20] + TEXTS[40:50]


def test_arrow_and_array_record_files_come_over_the_web_too(
    web: FileServer, small_blocks: None
) -> None:
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_stream(f"{web.root}/s.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    with pa.ipc.new_file(f"{web.root}/f.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=7)
    writer = ArrayRecordWriter(f"{web.root}/r.array_record", "group_size:4")
    for text in TEXTS:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()
    for name in ("s.arrow", "f.arrow", "r.array_record"):
        web.orders[:] = ["cut", (502, {})]
        documents: Any = iter(remote(f"{web.url}/{name}"))
        first = [next(documents).text for _ in range(23)]
        again: Any = iter(remote(f"{web.url}/{name}"))
        again.set_state(documents.get_state())
        assert first + [d.text for d in again] == TEXTS


def test_a_file_is_read_in_blocks_and_a_resume_asks_for_no_earlier_byte(
    web: FileServer, small_blocks: None
) -> None:
    documents: Any = iter(remote(f"{web.url}/a.jsonl"))
    first = [next(documents).text for _ in range(7)]
    state = json.loads(json.dumps(documents.get_state()))
    begins = [begin for _, begin, _ in web.ranges]
    assert begins == list(range(0, begins[-1] + 1, 256))
    web.ranges.clear()
    again: Any = iter(remote(f"{web.url}/a.jsonl"))
    again.set_state(state)
    assert first + [d.text for d in again] == TEXTS[:10]
    offset = json.loads(state["cursor"])[2][0][1][0]
    assert min(begin for _, begin, _ in web.ranges) == offset > 0


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.ndjson.zst", "d.parquet"])
def test_faults_that_pass_leave_no_trace(web: FileServer, small_blocks: None, name: str) -> None:
    texts = texts_of(remote(f"{web.root}/{name}"))
    web.orders[:] = ["cut", (503, {}), (429, {"Retry-After": "1"}), "cut"] * 2
    documents: Any = iter(remote(f"{web.url}/{name}", retry=QUICK | {"attempts": 9}))
    assert [d.text for d in documents] == texts
    assert documents.skipped == {}
    assert not web.orders


def test_a_server_that_stays_broken_is_one_line_or_counted(web: FileServer) -> None:
    web.orders[:] = [(500, {})] * 4
    with pytest.raises(DataError, match=r"answer 500 after 4 attempts.*retry\.attempts") as caught:
        list(remote(f"{web.url}/a.jsonl"))
    assert "\n" not in str(caught.value)
    web.orders[:] = [(500, {})] * 4
    documents: Any = iter(remote(f"{web.url}/[ad].*", shuffle=False, on_error="skip"))
    assert [d.text for d in documents] == TEXTS[30:40]
    assert documents.skipped == {"unreadable_file": 1}


@pytest.mark.parametrize(("name", "requests_before"), [("d.parquet", 0), ("d.parquet", 2)])
def test_a_table_whose_server_fails_is_unreadable_not_damaged(
    web: FileServer, name: str, requests_before: int
) -> None:
    class Failing(list):  # type: ignore[type-arg]
        """Lets some requests through and refuses all others."""

        def __bool__(self) -> bool:
            return True

        def pop(self, index: int = 0) -> Any:  # type: ignore[override]
            return super().pop(index) if len(self) else (500, {})

    web.orders = Failing([""] * requests_before)
    with pytest.raises(DataError, match=r"cannot be read \(.*answer 500 after 4 attempts"):
        list(remote(f"{web.url}/{name}"))


def test_an_answer_that_will_not_change_is_not_asked_for_again(web: FileServer) -> None:
    for status, words in ((403, "access denied .403.*credentials"), (404, "not found .404")):
        web.orders[:] = [(status, {}), (200, {})]
        with pytest.raises(DataError, match=words):
            list(remote(f"{web.url}/a.jsonl"))
        assert len(web.orders) == 1
    with pytest.raises(DataError, match=r"absent\.jsonl: not found"):
        list(remote(f"{web.url}/absent.jsonl"))


def test_a_server_without_ranges_is_refused(web: FileServer, small_blocks: None) -> None:
    web.with_ranges = False
    with pytest.raises(DataError, match=r"ignores byte ranges.*download the file"):
        list(remote(f"{web.url}/a.jsonl"))


def test_a_server_killed_under_way_is_an_error_and_the_state_goes_on_where_it_was(
    tmp_path: Path, small_blocks: None
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    with serve_files(tmp_path) as server:
        port = server.server_port
        documents: Any = iter(remote(f"{server.url}/a.jsonl"))
        read = []
        for _ in range(20):
            state = json.loads(json.dumps(documents.get_state()))
            read.append(next(documents).text)
        state = documents.get_state()
    with pytest.raises(DataError, match=r"no connection after 4 attempts.*resume"):
        read.extend(d.text for d in documents)
    with serve_files(tmp_path, port):
        again: Any = iter(remote(f"http://127.0.0.1:{port}/a.jsonl"))
        again.set_state(state)
        assert read[:20] + [d.text for d in again] == TEXTS


# --- a bucket --------------------------------------------------------------------------------


class Bucket(NamedTuple):
    """An S3 bucket and how to reach it."""

    server: ThreadedMotoServer
    options: dict[str, Any]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    folder = tmp_path_factory.mktemp("bucket")
    write_every_format(folder)
    pq.write_table(pa.table({"text": TEXTS}), folder / "whole.parquet", row_group_size=7)
    (folder / "whole.jsonl").write_bytes(lines(TEXTS))
    (folder / "whole.jsonl.zst").write_bytes(zstandard.compress(lines(TEXTS)))
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s3cret", "endpoint_url": f"http://{host}:{port}"}
    fs = fsspec.filesystem("s3", **options)
    fs.mkdir("corpus")
    fs.put(f"{folder}/", "corpus/all/", recursive=True)
    yield Bucket(server, {**options, "local": folder})
    server.stop()


def from_bucket(bucket: Bucket, path: str, **options: Any) -> DocumentSource:
    keys = {k: v for k, v in bucket.options.items() if k != "local"}
    return remote(f"s3://corpus/all/{path}", storage_options=keys, **options)


@pytest.mark.parametrize("name", ["whole.jsonl", "whole.jsonl.zst", "whole.parquet", "*.json*"])
def test_a_bucket_gives_the_same_documents_as_the_disk(bucket: Bucket, name: str) -> None:
    local = list(remote(f"{bucket.options['local']}/{name}"))
    there = list(from_bucket(bucket, name))
    assert [(d.text, d.id) for d in there] == [(d.text, d.id) for d in local]
    for i in range(3):
        part, whole = (
            [d.text for d in opened]
            for opened in (
                from_bucket(bucket, name, shard=(i, 3)),
                remote(f"{bucket.options['local']}/{name}", shard=(i, 3)),
            )
        )
        assert part == whole


def test_a_folder_of_a_bucket_is_listed(bucket: Bucket) -> None:
    tree = texts_of(from_bucket(bucket, "tree", shuffle=False))
    assert sorted(tree) == sorted(TEXTS[50:])
    assert len(texts_of(from_bucket(bucket, "tree", include="deep/*"))) == 5
    with pytest.raises(ConfigError, match=re.escape("s3://corpus/all/*.none")):
        list(from_bucket(bucket, "*.none"))


def test_a_denied_bucket_is_one_line(bucket: Bucket) -> None:
    keys = {k: v for k, v in bucket.options.items() if k != "local"}
    fs = fsspec.filesystem("s3", **keys)
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject"}
    policy = {"Version": "2012-10-17", "Statement": [deny | {"Resource": "arn:aws:s3:::corpus/*"}]}
    fs.call_s3("put_bucket_policy", Bucket="corpus", Policy=json.dumps(policy))
    try:
        with pytest.raises(DataError, match=r"access denied .403.*storage_options") as caught:
            list(from_bucket(bucket, "a.jsonl"))
    finally:
        fs.call_s3("delete_bucket_policy", Bucket="corpus")
    message = str(caught.value)
    assert "\n" not in message and "s3cret" not in message


def test_a_bucket_without_credentials_says_so(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    keys = {"endpoint_url": bucket.options["endpoint_url"]}
    with pytest.raises(DataError, match=r"no credentials; set storage_options.*anon"):
        list(remote("s3://corpus/all/a.jsonl", storage_options=keys))


def test_a_bucket_killed_under_way_gives_exactly_the_rest_after_a_restart(
    bucket: Bucket, small_blocks: None
) -> None:
    def open_at(port: int, **options: Any) -> Any:
        keys = bucket.options | {"endpoint_url": f"http://127.0.0.1:{port}"}
        changed = bucket._replace(options=keys)
        return iter(from_bucket(changed, "whole.*", seed=2, **options))

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)  # moto's buckets are its process's
    server.start()
    _, port = server.get_host_and_port()
    documents = open_at(port)
    read = [next(documents).text for _ in range(50)]
    state = json.loads(json.dumps(documents.get_state()))
    server.stop()
    with pytest.raises(DataError, match=r"no connection after 4 attempts.*resume"):
        list(documents)
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    again = open_at(port)
    again.set_state(state)
    read += [d.text for d in again]
    server.stop()
    assert sorted(read) == sorted(TEXTS * 3)


# --- anything else ---------------------------------------------------------------------------


def test_secrets_and_options_stay_out_of_what_is_written(bucket: Bucket) -> None:
    dataset = from_bucket(bucket, "a.jsonl")
    before = dict(dataset.spec.storage_options)  # type: ignore[attr-defined]
    documents: Any = iter(dataset)
    next(documents)
    assert dataset.spec.storage_options == before  # type: ignore[attr-defined]
    for text in (repr(dataset.spec), json.dumps(documents.get_state()), public_spec(dataset.spec)):
        assert "s3cret" not in str(text)


def test_other_file_systems_and_packages_that_are_missing() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/x/a.jsonl", lines(TEXTS[:5]))
    memory.pipe("/corpus/x/.hidden.jsonl", GOOD)
    try:
        assert texts_of(remote("memory://corpus")) == TEXTS[:5]
        assert texts_of(remote("memory://corpus/*/*.jsonl")) == TEXTS[:5]
    finally:
        memory.rm("/corpus", recursive=True)
    for path in ("nosuch://x/a.jsonl", "gs://bucket/a.jsonl"):
        with pytest.raises(ConfigError, match="cannot be opened"):
            list(remote(path))
