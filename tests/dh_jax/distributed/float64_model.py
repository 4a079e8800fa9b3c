"""A small language model in float64, with the paths of the library's decoder.

The decoder works in float32 or less by design (norms, angles, logits), so whether a mesh computes
the same as one device to 1e-9 is asked of this one. What is under test is the real step, the real
optimizer, the real placement.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch
from dh_jax.distributed.placement import constrain

HEADS = 4


def build(vocab_size: int, width: int, mlp_width: int, layers: int, key: jax.Array) -> Any:
    """Parameters in float64."""

    def draw(*shape: int) -> jax.Array:
        nonlocal key
        key, drawn = jax.random.split(key)
        return 0.1 * jax.random.normal(drawn, shape, jnp.float64)

    def layer() -> dict[str, Any]:
        names = ("query", "key", "value", "out")
        return {
            "attention": {name: {"kernel": draw(width, width)} for name in names},
            "mlp": {
                "up": {"kernel": draw(width, mlp_width)},
                "down": {"kernel": draw(mlp_width, width)},
            },
        }

    return {
        "embed": {"embedding": draw(vocab_size, width)},
        "layers": {str(i): layer() for i in range(layers)},
    }


def loss_fn(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
    """``loss_BT`` in float64 nats."""
    del key
    table_VD = params["embed"]["embedding"]
    x_BTD = constrain(constrain(table_VD[batch.tokens_BT], "bTd"), "BTD")
    segments_BT = batch.segment_ids_BT
    T = segments_BT.shape[1]
    sees_BTT = (segments_BT[:, :, None] == segments_BT[:, None]) & jnp.tri(T, dtype=bool)
    for layer in params["layers"].values():
        a = layer["attention"]
        q, k, v = (
            constrain((x_BTD @ a[name]["kernel"]).reshape(*x_BTD.shape[:2], HEADS, -1), "BTHh")
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(sees_BTT[:, None], scores, -1e30), axis=-1)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x_BTD.shape)
        x_BTD = constrain(x_BTD + mixed @ a["out"]["kernel"], "BTD")
        hidden = constrain(jnp.tanh(x_BTD @ layer["mlp"]["up"]["kernel"]), "BTF")
        x_BTD = constrain(x_BTD + hidden @ layer["mlp"]["down"]["kernel"], "BTD")
    logits_BTV = constrain(x_BTD @ table_VD.T, "BTV")
    at_target = jnp.take_along_axis(logits_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
    loss_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - at_target
    return jnp.where(batch.loss_mask_BT, loss_BT, 0)
