"""What a model or a loss must look like to be trained, judged or distilled here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import jax

    from dh_jax.batch import Batch

Params = Any  # any pytree of arrays


class LossFn(Protocol):
    """The one rule of the house: every loss is ``(params, batch, key) -> loss_BT``.

    Returns float32 nats a target, unreduced; 0 where ``batch.loss_mask_BT`` is False. ``key``
    serves dropout and sampled estimators; a deterministic loss ignores it.
    """

    def __call__(self, params: Params, batch: Batch, key: jax.Array) -> jax.Array: ...


class LogitsFn(Protocol):
    """A model seen from outside: ``(params, batch) -> logits_BTV`` in float32."""

    def __call__(self, params: Params, batch: Batch) -> jax.Array: ...


def masked_mean(loss_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean loss over valid targets, a float32 scalar; 0 (never NaN) where none is valid.

    On a mesh the sums run over the global batch, so the mean is over the *global* count.
    """
    total = (loss_BT * mask_BT).sum()
    count = mask_BT.sum()
    return total / count.clip(min=1)
