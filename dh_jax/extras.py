"""The command that installs an extra of this library, the way the library itself came here."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

DISTRIBUTION = "data-handler"


def install_command(extra: str) -> str:
    """For an editable clone ``pip install -c .../constraints.txt -e '...[extra]'``; for a wheel or
    archive its address; else the distribution's name."""
    try:
        told = distribution(DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:  # run from a folder that was never installed
        told = None
    origin = json.loads(told) if told else {}
    address = origin.get("url", "")
    if origin.get("dir_info", {}).get("editable"):
        folder = Path(url2pathname(urlsplit(address).path))
        pins = folder / "constraints.txt"
        pinned = f"-c '{pins}' " if pins.exists() else ""
        return f"pip install {pinned}-e '{folder}[{extra}]'"
    return f"pip install '{DISTRIBUTION}[{extra}]{' @ ' + address if address else ''}'"
