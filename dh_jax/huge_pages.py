"""Memory in huge pages. A step's tables are new memory every time, and to be handed it in pages of
4 KiB takes a tenth of a step and more on a CPU.

Linux gives huge pages to those who ask (its mode ``madvise``, most distributions' default). The C
library asks where ``GLIBC_TUNABLES`` says so (glibc 2.35), which it reads only as a process begins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb"
SETTING = f"{TUNABLE}=1"
MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SINCE = (2, 35)  # glibc


def lacking() -> bool:
    """Whether huge pages are to be had here, and this process was not started to ask for them.

    False where the variable names the tunable, whatever it says: ``=0`` is a user's choice.
    """
    try:
        offered = "[madvise]" in MODE.read_text()
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "none 0").split()
    except (OSError, ValueError):  # another system, or another C library
        return False
    able = library == "glibc" and tuple(map(int, version.split(".")[:2])) >= SINCE
    return offered and able and TUNABLE not in os.environ.get(VARIABLE, "")


def asking(environment: Mapping[str, str]) -> dict[str, str]:
    """A process's environment with huge pages asked for, beside what its tunables say already."""
    others = environment.get(VARIABLE)
    return dict(environment) | {VARIABLE: f"{others}:{SETTING}" if others else SETTING}


def restart() -> None:
    """Begin this process anew with huge pages, by the same arguments and under the same number.

    Returns where nothing would be gained. To be called first: what was computed is lost.
    """
    if lacking():
        sys.stdout.flush()
        sys.stderr.flush()
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, asking(os.environ))
