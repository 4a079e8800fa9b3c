"""Which of Hugging Face's families the bridge computes as they do, and what it refuses by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from dh_jax.errors import ConfigError

# Their forward is table, layers, norm and head with nothing between, which pipeline stages repeat;
# others scale embeddings or logits on the way (Granite, Cohere). A test compares each.
STAGED = ("llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")


def config_of(model: nn.Module) -> Any:
    """The config of a model of transformers, also where it is wrapped; else None."""
    inside: Any = model
    for wrapper in ("module", "_orig_mod"):  # DDP's, torch.compile's
        inside = getattr(inside, wrapper, inside)
    return getattr(inside, "config", None)


def refuse_other_attention(config: Any, tokens: int) -> None:
    """Refuse a model whose attention the mask of a row's documents would replace by another.

    transformers takes a mask ``[B, 1, T, T]`` as it is, so a layer's window would be lost.

    Args:
        config: of a model of transformers, or None.
        tokens: of a row.

    Raises:
        ConfigError: a layer's window is shorter than a row, or a layer has no full attention.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"{text.model_type} has layers of {', '.join(sorted(other))}, which let a row's "
            "documents see one another; take a model of full attention"
        )
    window = getattr(text, "sliding_window", None)
    if "sliding_attention" in kinds and window is not None and window < tokens:
        raise ConfigError(
            f"{text.model_type} sees {window} tokens back (sliding_window), but rows have "
            f"{tokens}, and the mask of their documents knows no window; take "
            f"data.max_length={window} or less, or another model"
        )
