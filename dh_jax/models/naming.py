"""Names of tensors: ours, and those of Hugging Face's Llama and Qwen checkpoints.

Linear layers are stored ``[outputs, inputs]`` there and ``[inputs, outputs]`` here; every other
array is the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OUTER = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_MODULES = {
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def hf_name(path: str) -> str:
    """``layers/0/mlp/up/kernel`` -> ``model.layers.0.mlp.up_proj.weight``."""
    if path in _OUTER:
        return _OUTER[path]
    module, _, leaf = path.rpartition("/")
    return f"{hf_module(module)}.{_LEAVES[leaf]}"


def hf_module(module: str) -> str:
    """``layers/0/mlp/up`` -> ``model.layers.0.mlp.up_proj``."""
    _, layer, inner = module.split("/", 2)
    return f"model.layers.{layer}.{_MODULES[inner]}"


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dictionary by ``/``-joined paths."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{path}": leaf for path, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`flatten` undone."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = leaf
    return nested
