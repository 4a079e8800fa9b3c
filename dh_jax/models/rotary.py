"""Rotary positions (Su et al. 2021) and the ways to stretch them to longer documents.

Rotation follows the half-split convention of Hugging Face's checkpoints: element ``i`` of a head
turns against element ``i + head_width/2``. Frequencies are constants of the program, worked out
in NumPy from the config.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.errors import ConfigError

if TYPE_CHECKING:
    from dh_jax.config import ModelConfig

Array: TypeAlias = jax.Array

KINDS = ("default", "linear", "llama3", "yarn", "dynamic")


class Rotary(NamedTuple):
    """How fast each pair of a head turns; static, so a tuple rather than an array."""

    frequencies: tuple[float, ...]  # radians a position, head_width/2 of them
    scale: float = 1.0  # of queries and keys alike (YaRN's temperature)
    longest: int | None = None  # more tokens than this would need other frequencies


def rotary(config: ModelConfig) -> Rotary:
    """The frequencies that a config asks for.

    ``rope_scaling`` is the object of that name (or ``rope_parameters``) in a config.json:
    ``linear`` (Chen et al. 2023), ``llama3`` (Llama 3.1), ``yarn`` (Peng et al. 2023,
    arXiv:2309.00071, equations 17 to 25). ``dynamic`` changes nothing up to ``max_positions``
    tokens, and longer rows are refused: there its frequencies depend on the longest document of
    the batch, so that documents would change one another.

    Raises:
        ConfigError: another kind, or one of its numbers is missing.
    """
    scaling = config.rope_scaling
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in KINDS:
        raise ConfigError(f"model.rope_scaling {kind!r} is not read; known: {', '.join(KINDS)}")
    head_width = config.width // config.heads if config.head_width is None else config.head_width
    # Rounded to float32 where checkpoints were: exact frequencies differ from those by 7e-8, which
    # at position 2,000 turns a pair by 1e-4 and moves SmolLM2's logits by as much.
    exponents = (np.arange(0, head_width, 2) / head_width).astype(np.float32)
    powers = (config.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    plain = (np.float32(1) / powers).astype(np.float64)
    if kind == "default":
        return _static(plain)
    if kind == "dynamic":
        return _static(plain)._replace(longest=config.max_positions)
    factor = _number(scaling, "factor", kind)
    if kind == "linear":
        return _static(plain / factor)
    original = scaling.get("original_max_position_embeddings") or config.max_positions
    if not original:
        raise ConfigError(
            f"model.rope_scaling {kind!r} needs original_max_position_embeddings (or "
            "model.max_positions): the tokens it was stretched from"
        )
    if kind == "llama3":
        low, high = (_number(scaling, f"{end}_freq_factor", kind) for end in ("low", "high"))
        turns = original * plain / (2 * math.pi)  # of a whole original document
        share = np.clip((turns - low) / (high - low), 0, 1)  # 1: quick, left alone
        return _static(plain / factor * (1 - share) + plain * share)
    return _yarn(config, plain, factor, float(original))


def _yarn(config: ModelConfig, plain: np.ndarray, factor: float, original: float) -> Rotary:
    scaling, pairs = config.rope_scaling, len(plain)

    def pair_that_turns(turns: float) -> float:
        return pairs * math.log(original / (turns * 2 * math.pi)) / math.log(config.rope_theta)

    fast, slow = (
        pair_that_turns(float(scaling.get(f"beta_{name}") or usual))
        for name, usual in (("fast", 32), ("slow", 1))
    )
    if scaling.get("truncate", True):
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, 2 * pairs - 1)
    share = 1 - np.clip((np.arange(pairs) - fast) / max(slow - fast, 0.001), 0, 1)

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = scaling.get("attention_factor")
    if scale is None:
        one, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
        scale = temperature(1.0)
        if one and all_dims:
            scale = temperature(one) / temperature(all_dims)
    return _static(plain / factor * (1 - share) + plain * share, float(scale))


def _static(frequencies: np.ndarray, scale: float = 1.0) -> Rotary:
    return Rotary(tuple(frequencies.astype(np.float32).tolist()), scale)


def _number(scaling: dict[str, object], key: str, kind: str) -> float:
    value = scaling.get(key)
    if not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"model.rope_scaling.{key} is {value!r}; {kind!r} needs a number above 0")
    return float(value)


def rotary_angles(rotary: Rotary, positions_BT: Array) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles, ``[B, T, head_width/2]`` float32.

    Raises:
        ConfigError: rows are longer than these frequencies are meant for.
    """
    tokens = positions_BT.shape[-1]
    if rotary.longest is not None and tokens > rotary.longest:
        raise ConfigError(
            f"rows of {tokens} tokens: above model.max_positions {rotary.longest} rope_scaling "
            "'dynamic' lets documents change one another; take shorter rows, or 'yarn'"
        )
    frequencies = jnp.asarray(rotary.frequencies, jnp.float32)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rotary.scale, jnp.sin(angles) * rotary.scale


def rotate(x_BTHh: Array, angles: tuple[Array, Array]) -> Array:
    """Turn every head by its position's angles, in float32."""
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHh.dtype)
