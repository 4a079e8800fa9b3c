"""Attention within segments, by the kernel that a config names.

=========  =========  ============================================================================
kernel     platforms  what it is
=========  =========  ============================================================================
xla        all        `blocked`; the only one with a forward mode (jvp), which influence needs
pallas     tpu, gpu   JAX's own flash attention (Dao et al. 2022) in Pallas: `splash` on a TPU,
                      `triton` on an NVIDIA GPU. No table of T by T scores is ever held.
=========  =========  ============================================================================

All take the same arrays and give the same numbers, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dh_jax.distributed.placement import ACTIVATION_AXES
from dh_jax.errors import ConfigError

Array: TypeAlias = jax.Array
Kernel: TypeAlias = Callable[[Array, Array, Array, Array], Array]
"""Queries ``[B, T, H, h]``, keys and values ``[B, T, K, h]``, segment ids ``[B, T]`` to
``[B, T, H, h]``: softmax attention to earlier tokens of the same segment. Padding is segment 0 and
sees padding only, so no row of scores is empty."""

PALLAS_PLATFORMS = ("tpu", "gpu", "cuda")
TILE = 128  # Pallas kernels work on so many tokens at a time


def blocked(q_BTHh: Array, k_BTKh: Array, v_BTKh: Array, segment_ids_BT: Array) -> Array:
    """The `Kernel` by XLA.

    Queries go in four blocks (of at least 128), each against the keys up to its own end: the
    upper triangle is mostly skipped, which is worth 1.4 to 1.8 times on a CPU. Masked scores
    become exact zeros after the softmax, so other documents leave no trace, not even in
    rounding.
    """
    tokens = q_BTHh.shape[1]
    block = max(128, -(-tokens // 4))
    blocks = []
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        same = segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
        causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        blocks.append(
            jax.nn.dot_product_attention(
                q_BTHh[:, start:end],
                k_BTKh[:, :end],
                v_BTKh[:, :end],
                mask=(same & causal)[:, None],
                implementation="xla",
            )
        )
    return jnp.concatenate(blocks, axis=1)


def splash(
    q_BTHh: Array, k_BTKh: Array, v_BTKh: Array, segment_ids_BT: Array, *, interpret: bool = False
) -> Array:
    """The `Kernel` for a TPU; T is a multiple of `TILE`."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    _, tokens, heads, head_width = q_BTHh.shape
    mask = library.MultiHeadMask([library.CausalMask((tokens, tokens))] * heads)
    kernel = library.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=interpret)

    def one_row(q_HTh: Array, k_KTh: Array, v_KTh: Array, segment_ids_T: Array) -> Array:
        ids = library.SegmentIds(segment_ids_T, segment_ids_T)
        return jnp.asarray(kernel(q_HTh, k_KTh, v_KTh, segment_ids=ids))

    q_BHTh, k_BKTh, v_BKTh = (x.swapaxes(1, 2) for x in (q_BTHh, k_BTKh, v_BTKh))
    mixed_BHTh = jax.vmap(one_row)(q_BHTh * head_width**-0.5, k_BKTh, v_BKTh, segment_ids_BT)
    return mixed_BHTh.swapaxes(1, 2)


def triton(
    q_BTHh: Array, k_BTKh: Array, v_BTKh: Array, segment_ids_BT: Array, *, interpret: bool = False
) -> Array:
    """The `Kernel` for an NVIDIA GPU; T is a multiple of `TILE`."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    _, _, heads, head_width = q_BTHh.shape
    groups = heads // k_BTKh.shape[2]  # it knows no grouped queries
    k_BTHh, v_BTHh = (jnp.repeat(x, groups, axis=2) for x in (k_BTKh, v_BTKh))
    return jnp.asarray(
        mha(
            q_BTHh, k_BTHh, v_BTHh, segment_ids_BT,
            sm_scale=head_width**-0.5, causal=True, interpret=interpret,
        )
    )  # fmt: skip


def tiled(kernel: Kernel) -> Kernel:
    """A kernel for rows of any length, each device of a mesh computing its own rows and heads."""

    def attend(q_BTHh: Array, k_BTKh: Array, v_BTKh: Array, segment_ids_BT: Array) -> Array:
        tokens = q_BTHh.shape[1]
        rest = -tokens % TILE
        arrays = [
            jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2))
            for x in (q_BTHh, k_BTKh, v_BTKh, segment_ids_BT)
        ]
        inner, mesh = kernel, jax.sharding.get_abstract_mesh()
        if not mesh.empty:  # XLA cannot split a kernel by itself
            rows, heads = ACTIVATION_AXES["B"], ACTIVATION_AXES["H"]
            spec = PartitionSpec(rows, None, heads)
            inner = jax.shard_map(
                kernel, in_specs=(spec, spec, spec, PartitionSpec(rows)), out_specs=spec,
                check_vma=False,
            )  # fmt: skip
        return inner(*arrays)[:, :tokens]

    return attend


pallas: Kernel = tiled(partial(jax.lax.platform_dependent, tpu=splash, cuda=triton))
KERNELS: dict[str, Kernel] = {"xla": blocked, "pallas": pallas}


def check_kernel(name: str, platform: str, *, forward_mode: bool = False) -> None:
    """Refuse a kernel that this run cannot use.

    Args:
        name: ``model.attention``.
        platform: as `jax.default_backend` names it.
        forward_mode: whether losses are differentiated forwards.

    Raises:
        ConfigError: it does not run there, or has no forward mode.
    """
    if name == "pallas" and platform not in PALLAS_PLATFORMS:
        raise ConfigError(
            f"model.attention 'pallas' has no kernel for {platform}, only for tpu and gpu; take "
            "model.attention=xla"
        )
    if name != "xla" and forward_mode:
        raise ConfigError(
            f"model.attention {name!r} has no forward mode, by which influence is measured; take "
            "model.attention=xla, or a policy that measures none"
        )
