"""What a Hugging Face config.json says, as a `ModelConfig`, and back.

A key that would change the numbers and is not read here is an error: a model that loads is
computed as `transformers` computes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dh_jax.config import ModelConfig, suggest
from dh_jax.errors import ConfigError

FAMILIES = ("llama", "qwen2", "qwen3")  # model_type

# Fields of a ModelConfig and their keys; what a missing key means is transformers' default.
_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Fields that describe the checkpoint; the others say how to compute with it.
SHAPE = (
    *_SIZES, "kv_heads", "head_width", "qkv_bias", "qk_norm", "rope_theta", "rope_scaling",
    "max_positions", "norm_epsilon", "tied",
)  # fmt: skip


def from_hf(values: Mapping[str, Any], base: ModelConfig | None = None) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        values: its content.
        base: where everything else comes from (dtype, kernels, adapters); None: the defaults.

    Raises:
        ConfigError: it describes a model that is not built here, naming the key.
    """
    family = values.get("model_type", "")
    if family not in FAMILIES:
        raise ConfigError(
            f"model_type {family!r}{suggest(str(family), FAMILIES)} is not built here; "
            f"known: {', '.join(FAMILIES)}"
        )
    missing = [key for key in _SIZES.values() if key not in values]
    if missing:
        raise ConfigError(f"config.json lacks {missing[0]!r}; a {family} model needs it")
    _refuse(values, family)
    sizes: dict[str, Any] = {field: int(values[key]) for field, key in _SIZES.items()}
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", values.get("rope_theta", 10_000.0))
    if rope.pop("partial_rotary_factor", values.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError("config.json: partial_rotary_factor other than 1 is not computed here")
    # Qwen3's heads have a width of their own even where config.json does not say so.
    head_width = values.get("head_dim") or (128 if family == "qwen3" else None)
    # What transformers takes for a key that is missing.
    kv_heads = values.get("num_key_value_heads", sizes["heads"] if family == "llama" else 32)
    return dataclasses.replace(
        base or ModelConfig(),
        **sizes,
        kv_heads=int(kv_heads or sizes["heads"]),
        head_width=head_width,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=float(theta),
        rope_scaling={} if kind == "default" else {"rope_type": kind, **rope},
        max_positions=values.get("max_position_embeddings"),
        norm_epsilon=float(values.get("rms_norm_eps", 1e-6)),
        tied=bool(values.get("tie_word_embeddings", False)),
    )


def _refuse(values: Mapping[str, Any], family: str) -> None:
    """Refuse what would be computed otherwise."""
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "mlp_bias": (False, None),
        "attention_bias": (False, None),
        "use_sliding_window": (False, None),
        "pretraining_tp": (1, None),
    }
    for key, fine in allowed.items():
        if values.get(key, fine[0]) not in fine:
            raise ConfigError(
                f"config.json: {key} {values[key]!r} is not computed here for {family}; "
                f"only {fine[0]!r} is"
            )
    kinds = set(values.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(
            f"config.json: layer_types {sorted(kinds)} are not computed here; only "
            "'full_attention' is"
        )


def to_hf(config: ModelConfig, vocab_size: int, dtype: str = "float32") -> dict[str, Any]:
    """The content of a config.json that `transformers` reads as this model.

    Args:
        config: ``linear`` and ``lora`` have no counterpart; merge adapters first.
        vocab_size: rows of the embedding.
        dtype: of the weights beside it.

    Raises:
        ConfigError: no model of transformers computes this.
    """
    if config.qkv_bias and config.qk_norm:
        raise ConfigError("model.qkv_bias and model.qk_norm together: no family has both")
    if config.linear != "dense":
        raise ConfigError(f"model.linear {config.linear!r} has no counterpart in transformers")
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    head_width = config.width // config.heads if config.head_width is None else config.head_width
    if family == "qwen2" and head_width != config.width // config.heads:
        raise ConfigError(f"model.head_width {head_width}: a Qwen2 model has width / heads")
    kind = config.rope_scaling.get("rope_type", "default")
    values = {field: getattr(config, field) for field in _SIZES} | {"vocab_size": vocab_size}
    return {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        **{key: values[field] for field, key in _SIZES.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": head_width,
        "hidden_act": "silu",
        "initializer_range": config.init_scale,
        "max_position_embeddings": config.max_positions or 2048,
        "rms_norm_eps": config.norm_epsilon,
        # Both spellings: rope_parameters is transformers 5's, the other two those before it.
        "rope_parameters": {
            **config.rope_scaling,
            "rope_type": kind,
            "rope_theta": config.rope_theta,
        },
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling or None,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
