"""A process begins anew with its memory in huge pages, once, where that gains something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dh_jax import cli, doctor, huge_pages

# 64 MiB that are written to, and how much of it lies in huge pages.
PROGRAM = """
import sys
from dh_jax import huge_pages
huge_pages.restart()
table = b"x" * (64 << 20)  # NumPy would ask for huge pages itself
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(x.split()[1] for x in lines if x.startswith("AnonHugePages:")), *sys.argv[1:])
print(sys.stdin.read(), end="")
sys.exit(7)
"""


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)


def restarted(environment: dict[str, str]) -> tuple[int, list[str]]:
    """KiB in huge pages, and the rest of what the program says of its arguments and input."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "two words", "--three"],
        env=os.environ | environment, input="typed\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    found, *rest = done.stdout.split(maxsplit=1)
    return int(found), rest


def test_a_restarted_process_has_huge_pages_and_all_it_was_given() -> None:
    if not huge_pages.lacking():
        pytest.skip("this system has no huge pages for those who ask")
    assert restarted({})[0] > 50 * 1024
    assert restarted({})[1] == ["two words --three\ntyped\n"]
    assert restarted({huge_pages.VARIABLE: "glibc.malloc.hugetlb=0"})[0] < 16 * 1024


def test_what_the_variable_says_already_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"A": "b", huge_pages.VARIABLE: "glibc.malloc.check=0"}
    assert huge_pages.asking(given) == {
        "A": "b", huge_pages.VARIABLE: "glibc.malloc.check=0:glibc.malloc.hugetlb=1",
    }  # fmt: skip
    monkeypatch.setenv(huge_pages.VARIABLE, "glibc.malloc.hugetlb=0")
    assert not huge_pages.lacking()


@pytest.mark.parametrize(
    ("mode", "library", "lacking"),
    [
        ("always [madvise] never\n", "glibc 2.35", True),
        ("always [madvise] never\n", "glibc 2.34", False),
        ("always [madvise] never\n", None, False),
        ("[always] madvise never\n", "glibc 2.36", False),
        ("always madvise [never]\n", "glibc 2.36", False),
    ],
)
def test_only_who_would_gain_starts_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, library: str | None, lacking: bool
) -> None:
    (tmp_path / "enabled").write_text(mode)
    monkeypatch.setattr(huge_pages, "MODE", tmp_path / "enabled")
    monkeypatch.setattr("os.confstr", lambda name: library)
    assert huge_pages.lacking() is lacking
    hinted = [hint for hint in doctor.hints() if huge_pages.SETTING in hint]
    assert len(hinted) == lacking
    (tmp_path / "enabled").unlink()  # macOS has none
    assert not huge_pages.lacking()


def test_commands_that_step_begin_anew_and_called_functions_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, called = [], []
    monkeypatch.setattr(huge_pages, "restart", lambda: begun.append(sys.argv[1]))
    monkeypatch.setattr("dh_jax.commands.train", lambda options: called.append("train") or 2)
    monkeypatch.setattr("dh_jax.commands.configs", lambda options: called.append("configs") or 0)
    for command in ("train", "configs"):
        monkeypatch.setattr("sys.argv", ["dh", command, "--debug"])
        assert cli.main() == cli.entry()
    assert called == ["train", "train", "configs", "configs"] and begun == ["train"]


def test_the_command_of_a_shell_has_huge_pages() -> None:
    if not huge_pages.lacking():
        pytest.skip("this system has no huge pages for those who ask")
    program = (
        "import os, sys; from dh_jax import cli, commands\n"
        "commands.train = lambda options: print(os.environ.get('GLIBC_TUNABLES')) or 2\n"
        "sys.exit(cli.entry())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "train"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, huge_pages.SETTING + "\n"), done.stderr
