"""GGUF files (llama.cpp's) as folders of Hugging Face's layout, without torch.

The `gguf` package reads and dequantises; the numbers are those that `transformers` gets from the
same file. Keys and tensor names are those of the specification in ggml's ``docs/gguf.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dh_jax.config import ModelConfig, suggest
from dh_jax.data.text.gguf_tokenizer import read_gguf_metadata
from dh_jax.data.text.tokenizer_files import PYPI_PREFIX, file_in_package
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, DataError
from dh_jax.models.hf_config import FAMILIES, to_hf
from dh_jax.models.naming import hf_module
from dh_jax.models.pretrained import DTYPES, write_folder

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODULES = {  # of ``blk.0.``, and ours
    "attn_norm": "attention_norm",
    "attn_q": "attention/query",
    "attn_k": "attention/key",
    "attn_v": "attention/value",
    "attn_output": "attention/out",
    "attn_q_norm": "attention/query_norm",
    "attn_k_norm": "attention/key_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp/gate",
    "ffn_up": "mlp/up",
    "ffn_down": "mlp/down",
}


def convert_gguf(
    path: str | Path,
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    dtype: str = "float32",
) -> Path:
    """Turn a GGUF file into a folder that `load_pretrained` and `transformers` read.

    Args:
        path: a Llama, SmolLM2, Qwen2 or Qwen3 model of any quantisation that `gguf` dequantises;
            or ``pypi:PACKAGE``, the one file of an installed package.
        folder: must not exist yet, or be empty.
        tokenizer: where to take the tokenizer from; None: the file's own.
        dtype: of the weights on disk. In float32 they are what the file means, to the last bit.

    Raises:
        ConfigError: the package is missing, the folder occupied, or the model not built here.
        DataError: the file is damaged or lacks a tensor.
    """
    if str(path).startswith(PYPI_PREFIX):
        path = file_in_package(str(path).removeprefix(PYPI_PREFIX))
    path = Path(path)
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("reading a GGUF file needs gguf: pip install gguf") from error
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    metadata = read_gguf_metadata(path)
    try:
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    except ValueError as error:  # what it raises for a file that is cut short
        raise DataError(f"{path}: damaged or cut short ({error}); fetch it again") from error
    config = _config(path, metadata, tensors)
    wrapper = TokenizerWrapper.load(tokenizer or path, add_eos=False)
    values = to_hf(config, int(tensors["token_embd.weight"].shape[1]), dtype)
    return write_folder(folder, values, _read(path, config, tensors, dtype), wrapper)


def _config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> ModelConfig:
    family = metadata.get("general.architecture", "")
    if family not in FAMILIES:
        raise ConfigError(
            f"{path}: architecture {family!r}{suggest(family, FAMILIES)} is not built here; "
            f"known: {', '.join(FAMILIES)}"
        )
    scaling = metadata.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise ConfigError(
            f"{path}: scaled rotary positions ({scaling}) are not read from GGUF; "
            "take the model's Hugging Face folder"
        )
    missing = {"token_embd.weight", "output_norm.weight"} - tensors.keys()
    if missing:
        raise DataError(f"{path}: no tensor {min(missing)!r}")

    def key(name: str) -> Any:
        if f"{family}.{name}" not in metadata:
            raise DataError(f"{path}: no {family}.{name} in its header")
        return metadata[f"{family}.{name}"]

    heads, width = key("attention.head_count"), key("embedding_length")
    return ModelConfig(
        width=width,
        layers=key("block_count"),
        heads=heads,
        kv_heads=metadata.get(f"{family}.attention.head_count_kv", heads),
        head_width=metadata.get(f"{family}.attention.key_length", width // heads),
        mlp_width=key("feed_forward_length"),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=_short(metadata.get(f"{family}.rope.freq_base", 10_000.0)),
        max_positions=key("context_length"),
        norm_epsilon=_short(key("attention.layer_norm_rms_epsilon")),
        tied="output.weight" not in tensors,
    )


def _short(value: float) -> float:
    """GGUF keeps numbers in float32; 9.999999747378752e-06 was 1e-5."""
    return float(str(np.float32(value)))


def _read(
    path: Path, config: ModelConfig, tensors: Mapping[str, Any], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name in Hugging Face's layout, dequantised one at a time."""
    import gguf

    for name, tensor in tensors.items():
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ConfigError(f"{path}: {name} is quantised in a way gguf cannot undo") from error
        array = array.reshape(tensor.shape[::-1].tolist())  # GGUF lists the quickest axis first
        yield (
            _hf_name(path, name),
            np.ascontiguousarray(_halves(config, name, array), DTYPES[dtype]),
        )


def _hf_name(path: Path, name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    place, _, rest = name.removeprefix("blk.").partition(".")
    module, _, leaf = rest.rpartition(".")
    if not (name.startswith("blk.") and place.isdigit() and module in _MODULES):
        raise DataError(f"{path}: tensor {name!r} belongs to no model that is built here")
    return f"{hf_module(f'layers/{place}/{_MODULES[module]}')}.{leaf}"


def _halves(config: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
    """Undo llama.cpp's order of a Llama's rotary pairs: neighbours there, halves of a head here.

    Its Qwen models rotate halves, and are stored as they are.
    """
    if config.qkv_bias or config.qk_norm or (".attn_q." not in name and ".attn_k." not in name):
        return array
    heads = config.heads if ".attn_q." in name else config.kv_heads
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
