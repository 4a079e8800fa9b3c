"""The tokenizer inside a GGUF file, read without torch and without touching the weights.

A GGUF file opens with a table of typed key-value pairs; the vocabulary, the merges and the special
ids are among them under the keys ``tokenizer.ggml.*``. The format is that of the specification in
ggml's ``docs/gguf.md``. The `gguf` package's reader makes two NumPy views for each of a
vocabulary's strings and takes seconds; this one takes a tenth of a second.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dh_jax.errors import ConfigError, DataError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

# Pre-tokenizers (tokenizer.ggml.pre) that are known to mean GPT-2's. "smollm" is here because
# `transformers` reads it so, and ids must equal what it gives from the same file. SmolLM2 itself
# was trained with every digit cut off first, which only shows where white space precedes a digit.
_GPT2_SPLITS = ("gpt-2", "smollm")


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """Every key-value pair of a GGUF file's header; arrays become lists.

    Args:
        path: a little-endian GGUF file of version 2 or 3.

    Raises:
        DataError: the file is no such GGUF file, or is cut short.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise DataError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                version, _, count = struct.unpack_from("<IQQ", data, 4)
                if version not in _VERSIONS:
                    raise DataError(f"{path}: GGUF version {version} is not among {_VERSIONS}")
                offset = 4 + struct.calcsize("<IQQ")
                pairs = {}
                for _ in range(count):
                    key, offset = _read_string(data, offset)
                    (kind,) = struct.unpack_from("<I", data, offset)
                    pairs[key], offset = _read_value(data, offset + 4, kind)
                return pairs
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
            raise DataError(
                f"{path}: GGUF header is damaged or cut short ({error}); fetch the file again"
            ) from error


def _read_string(data: mmap.mmap, offset: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, offset)
    end = offset + 8 + length
    if end > len(data):
        raise struct.error(f"a string runs to byte {end} of {len(data)}")
    return data[offset + 8 : end].decode(), end


def _read_value(data: mmap.mmap, offset: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _read_string(data, offset)
    if kind != _ARRAY:
        scalar = struct.Struct("<" + _SCALARS[kind])
        return scalar.unpack_from(data, offset)[0], offset + scalar.size
    item, count = struct.unpack_from("<IQ", data, offset)
    offset += 12
    if item in _SCALARS:
        array = struct.Struct(f"<{count}{_SCALARS[item]}")
        return list(array.unpack_from(data, offset)), offset + array.size
    values = []
    for _ in range(count):
        value, offset = _read_value(data, offset, item)
        values.append(value)
    return values, offset


def gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, str], str | None]:
    """Build the byte-level BPE tokenizer that a GGUF file describes.

    Returns:
        The tokenizer; its named special tokens (``bos_token``, ...); its chat template, if any.

    Raises:
        ConfigError: the file describes a kind of tokenizer that is not read here.
        DataError: the file is damaged or contradicts itself.
    """
    metadata = read_gguf_metadata(path)
    ggml = {
        k.removeprefix("tokenizer.ggml."): v
        for k, v in metadata.items()
        if k.startswith("tokenizer.ggml.")
    }
    cure = "give a folder with tokenizer.json instead"
    if ggml.get("model") != "gpt2":
        raise ConfigError(
            f"{path}: tokenizer.ggml.model {ggml.get('model')!r} is not read; "
            f"only 'gpt2' (byte-level BPE) is; {cure}"
        )
    if ggml.get("pre") not in _GPT2_SPLITS:
        raise ConfigError(
            f"{path}: pre-tokenizer {ggml.get('pre')!r} is not among "
            f"{', '.join(_GPT2_SPLITS)}; {cure}"
        )
    missing = [key for key in ("tokens", "merges", "token_type") if key not in ggml]
    if missing:
        raise DataError(f"{path}: no tokenizer.ggml.{missing[0]} in the header; {cure}")
    tokens: list[str] = ggml["tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(ggml["token_type"]) != len(tokens):
        raise DataError(
            f"{path}: {len(tokens)} tokens, of which {len(vocab)} are distinct, and "
            f"{len(ggml['token_type'])} token types do not fit together; {cure}"
        )
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise DataError(f"{path}: merges do not fit the vocabulary ({error}); {cure}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # User-defined tokens are matched whole in text but are no control tokens.
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, its_kind in zip(tokens, ggml["token_type"], strict=True)
            if its_kind == kind
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special_tokens = {
        f"{name}_token": tokens[ggml[f"{key}_token_id"]]
        for name, key in names.items()
        if f"{key}_token_id" in ggml
    }
    return tokenizer, special_tokens, metadata.get("tokenizer.chat_template")
