"""Batches from an S3 bucket: the rows of local files, and exact resume when the server dies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from dh_jax.data.loader import get_loader
from dh_jax.data.reading import storage
from dh_jax.errors import DataError

QUICK = {"attempts": 2, "first": 0.01, "longest": 0.05}


def test_a_bucket_gives_the_rows_of_local_files_and_a_run_goes_on_after_its_death(
    corpora: dict[str, Path], make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "REMOTE_BLOCK", 4096)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:{port}"}
    bucket = fsspec.filesystem("s3", **options)
    bucket.mkdir("texts")
    for name, path in corpora.items():
        bucket.put(str(path), f"texts/{name}.jsonl")

    def config(where: str, **extra: Any) -> Any:
        sources = {
            name: {"kind": "files", "paths": [where.format(name=name)], "weight": weight} | extra
            for name, weight in (("code", 0.5), ("mail", 0.2), ("sums", 0.3))
        }
        return make_config(sources=sources)

    local = config(f"{corpora['code'].parent}/{{name}}.jsonl")
    remote = config("s3://texts/{name}.jsonl", storage_options=options, retry=QUICK)
    with get_loader(local, batch_size=4) as ours, get_loader(remote, batch_size=4) as theirs:
        for _ in range(20):
            np.testing.assert_array_equal(next(theirs).tokens_BT, next(ours).tokens_BT)
        state = json.loads(json.dumps(theirs.get_state()))
        expected = [next(ours).tokens_BT for _ in range(60)]
        server.stop()
        with pytest.raises(DataError, match=r"s3://texts/.*no connection") as caught:
            for _ in range(2000):
                next(theirs)
    assert "\n" not in str(caught.value)
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    with get_loader(remote, batch_size=4) as again:
        again.set_state(state)
        for tokens_BT in expected:
            np.testing.assert_array_equal(next(again).tokens_BT, tokens_BT)
    server.stop()
