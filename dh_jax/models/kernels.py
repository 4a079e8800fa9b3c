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

    Queries go in four blocks (of at least 64), each against the keys up to its own end, so the
    upper triangle is mostly skipped. Masked scores become exact zeros, so other documents leave
    no trace, not even in rounding.

    On a CPU this takes .4 to .65 of the time of `jax.nn.dot_product_attention` on the same blocks:
    batch and heads come first, so that no product copies its scores into another order; the query
    heads of one key head are one matrix; and h values are divided by the softmax's sum, not
    the scores of all keys.
    """
    B, T, H, h = q_BTHh.shape
    K = k_BTKh.shape[2]
    q_BKGTh = q_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)
    k_BKTh, v_BKTh = k_BTKh.swapaxes(1, 2), v_BTKh.swapaxes(1, 2)
    size = max(64, -(-T // 4))
    blocks = [
        _attend(
            q_BKGTh[:, :, :, start : start + size],
            k_BKTh[:, :, : start + size],
            v_BKTh[:, :, : start + size],
            segment_ids_BT,
            start,
        )
        for start in range(0, T, size)
    ]
    mixed_BKGTh = jnp.concatenate(blocks, axis=3)
    return mixed_BKGTh.transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)


def _attend(
    q_BKGNh: Array, k_BKSh: Array, v_BKSh: Array, segment_ids_BT: Array, start: int
) -> Array:
    """N queries from ``start`` on, G heads for each of K, to the first S = start + N keys."""
    B, K, G, N, h = q_BKGNh.shape
    S = start + N
    same_BNS = segment_ids_BT[:, start:S, None] == segment_ids_BT[:, None, :S]
    seen_BNS = same_BNS & (jnp.arange(start, S)[:, None] >= jnp.arange(S))
    rows_BKRh = q_BKGNh.reshape(B, K, G * N, h)
    scores = jnp.einsum("bkrh,bksh->bkrs", rows_BKRh, k_BKSh, preferred_element_type=jnp.float32)
    scores_BKGNS = scores.reshape(B, K, G, N, S) * h**-0.5
    scores_BKGNS = jnp.where(seen_BNS[:, None, None], scores_BKGNS, jnp.finfo(jnp.float32).min)
    # It cancels, so nothing flows through it; every token sees itself, so no sum is 0.
    highest_BKGN1 = jax.lax.stop_gradient(scores_BKGNS.max(-1, keepdims=True))
    weights_BKGNS = jnp.exp(scores_BKGNS - highest_BKGN1)
    weights_BKRS = weights_BKGNS.reshape(B, K, G * N, S).astype(v_BKSh.dtype)
    mixed_BKRh = jnp.einsum(
        "bkrs,bksh->bkrh", weights_BKRS, v_BKSh, preferred_element_type=jnp.float32
    )
    mixed_BKGNh = mixed_BKRh.reshape(B, K, G, N, h) / weights_BKGNS.sum(-1)[..., None]
    return mixed_BKGNh.astype(v_BKSh.dtype)


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
