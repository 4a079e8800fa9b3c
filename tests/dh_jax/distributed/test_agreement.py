"""Two real processes agree on the weights that the first one has."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from dh_jax.distributed.agreement import from_first_host

PROGRAM = """
import sys
import jax
index, address = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(address, num_processes=2, process_id=index)
from dh_jax.distributed.agreement import from_first_host
mine = {"b": 0.1 + index, "a": 1 / 3 - index}
with open(sys.argv[3], "w") as file:  # the collectives' library writes to standard output
    file.write(repr(from_first_host(mine)))
from dh_jax.distributed.processes import leave
leave(0, together=True)  # an ordinary exit aborts now and then, and leaves the other waiting
"""


def test_one_process_keeps_its_weights() -> None:
    assert from_first_host({"b": 0.1, "a": 0.2}) == {"b": 0.1, "a": 0.2}


def test_two_processes_get_the_weights_of_the_first(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    files = [tmp_path / "0", tmp_path / "1"]
    running = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(i), address, str(file)])
        for i, file in enumerate(files)
    ]
    codes = [process.wait(timeout=120) for process in running]
    assert codes == [0, 0]
    assert {file.read_text() for file in files} == {repr({"b": 0.1, "a": 1 / 3})}
