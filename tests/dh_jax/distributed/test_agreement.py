"""Two real processes agree on the weights that the first one has."""

from __future__ import annotations

import socket
import subprocess
import sys

from dh_jax.distributed.agreement import from_first_host

PROGRAM = """
import sys
import jax
index, address = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(address, num_processes=2, process_id=index)
from dh_jax.distributed.agreement import from_first_host
mine = {"b": 0.1 + index, "a": 1 / 3 - index}
print(repr(from_first_host(mine)))
"""


def test_one_process_keeps_its_weights() -> None:
    assert from_first_host({"b": 0.1, "a": 0.2}) == {"b": 0.1, "a": 0.2}


def test_two_processes_get_the_weights_of_the_first() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), address],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    for process in running:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert repr({"b": 0.1, "a": 1 / 3}) in out.splitlines()
