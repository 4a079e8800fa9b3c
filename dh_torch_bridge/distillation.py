"""The distillation losses of `dh_jax.distillation` for torch: the same kernels, as autograd nodes.

Value and gradient are made by one compiled JAX function; tensors cross by DLPack. A teacher is a
table of logits, a `TeacherHead`, or `TopKLogits` (from `CachedTeacher.join` or of your own), all
of torch tensors. No gradient reaches it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import torch

from dh_jax.batch import TopKLogits
from dh_jax.distillation import losses
from dh_jax.distillation.losses import CHUNK, KIND, MIX, Kind, Mix, TeacherHead
from dh_jax.errors import ConfigError
from dh_jax.functions import Head
from dh_torch_bridge.exchange import to_jax, to_torch, tree_to_jax
from dh_torch_bridge.labels import IGNORED

__all__ = ["Kind", "Mix", "TeacherHead", "TopKLogits", "loss_from_hidden", "loss_from_logits"]

Teacher: TypeAlias = "torch.Tensor | TeacherHead | TopKLogits"


def loss_from_logits(
    logits_BTV: torch.Tensor,
    teacher: Teacher,
    shift_labels_BT: torch.Tensor,
    mix: Mix = MIX,
    kind: Kind = KIND,
) -> torch.Tensor:
    """Losses where the student's logits are at hand.

    Args:
        logits_BTV: of the student, float32, bfloat16 or float16.
        teacher: see above; of any floating type.
        shift_labels_BT: int64 ids as the loader gives them; -100 where nothing is learnt.
        mix: weights and temperature; numbers may change from call to call.
        kind: divergence, estimator and common vocabulary (`dh_jax.distillation.losses.Kind`).

    Returns:
        ``loss_BT``, float32 nats, 0 where nothing is learnt. Divide its sum by the global count.

    Raises:
        ConfigError: the divergence or estimator is unknown, or a tensor is spread over ranks.
    """
    loss = _of_logits(kind, mix.cross_entropy is None, mix.temperature is None)
    return _Loss.apply(loss, _constants(teacher, shift_labels_BT, mix), logits_BTV)


def loss_from_hidden(
    hidden_BTD: torch.Tensor,
    head: torch.nn.Linear | torch.Tensor,
    teacher: Teacher,
    shift_labels_BT: torch.Tensor,
    mix: Mix = MIX,
    kind: Kind = KIND,
    *,
    cap: float | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """The same losses from hidden states, without a table of all tokens by the vocabulary.

    Args:
        hidden_BTD: of the student, behind its last norm.
        head: the layer that makes logits of them, or its weight ``[V, D]``. Whole on this rank.
        teacher, shift_labels_BT, mix, kind: as in `loss_from_logits`.
        cap: logits become ``cap * tanh(logits / cap)`` (Gemma 2).
        chunk: tokens (of all rows together) whose logits exist at one time.

    Returns:
        ``loss_BT``, as `loss_from_logits`; its gradients reach hidden states and head.

    Raises:
        ConfigError: as `loss_from_logits`.
    """
    weight, bias = (head, None) if isinstance(head, torch.Tensor) else (head.weight, head.bias)
    loss = _of_hidden(kind, mix.cross_entropy is None, mix.temperature is None, cap, chunk)
    tables = [weight] if bias is None else [weight, bias]
    constants = _constants(teacher, shift_labels_BT, mix)
    return _Loss.apply(loss, constants, hidden_BTD, *tables)


class _Loss(torch.autograd.Function):
    """``loss(constants, *tensors)`` by JAX; the backward pass is JAX's too."""

    @staticmethod
    def forward(ctx: Any, loss: Any, constants: Any, *tensors: torch.Tensor) -> torch.Tensor:
        loss_BT, ctx.pull = _forward(loss, constants, *map(to_jax, tensors))
        ctx.save_for_backward(*tensors)  # what pull holds may be their memory
        return to_torch(loss_BT, owned=True)

    @staticmethod
    def backward(ctx: Any, weight_BT: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph: a second derivative would silently be 0
            raise ConfigError(
                "the distillation losses have first derivatives alone; call backward without "
                "create_graph, or take the penalty's gradient from a loss of your own"
            )
        _ = ctx.saved_tensors  # torch raises here if one was written to since
        gradients = _backward(ctx.pull, to_jax(weight_BT))
        return None, None, *(to_torch(x, owned=True) for x in gradients)


@partial(jax.jit, static_argnums=0)
def _forward(loss: Any, constants: Any, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    loss_BT, pull = jax.vjp(partial(loss, constants), *arrays)
    return loss_BT, pull


@jax.jit
def _backward(pull: Any, weight_BT: jax.Array) -> tuple[jax.Array, ...]:
    gradients: tuple[jax.Array, ...] = pull(weight_BT)
    return gradients


def _constants(teacher: Teacher, shift_labels_BT: torch.Tensor, mix: Mix) -> Any:
    """Teacher, targets, mask and weights as arrays."""
    learnt_BT = shift_labels_BT != IGNORED
    targets_BT = shift_labels_BT.clamp(min=0).to(torch.int32)
    teacher = jax.tree.map(_narrow, teacher)
    numbers = Mix(*(jnp.float32(0 if x is None else x) for x in mix))
    return *tree_to_jax((teacher, targets_BT, learnt_BT)), numbers


def _narrow(x: Any) -> Any:
    """Ids from int64 to int32; a table of ids has no others."""
    is_wide = isinstance(x, torch.Tensor) and x.dtype == torch.int64
    return x.to(torch.int32) if is_wide else x


# Made once for each kind, so that jit finds what it compiled. What a mix leaves out is left out of
# the program, not multiplied by 0.


def _given(mix: Mix, soft: bool, cold: bool) -> Mix:
    cross_entropy = None if soft else mix.cross_entropy
    return Mix(mix.weight, cross_entropy, None if cold else mix.temperature)


@cache
def _of_logits(kind: Kind, soft: bool, cold: bool) -> Callable[..., jax.Array]:
    def loss(constants: Any, logits_BTV: jax.Array) -> jax.Array:
        teacher, targets_BT, mask_BT, mix = constants
        mix = _given(mix, soft, cold)
        return losses.loss_from_logits(logits_BTV, teacher, targets_BT, mask_BT, mix, kind)

    return loss


@cache
def _of_hidden(
    kind: Kind, soft: bool, cold: bool, cap: float | None, chunk: int
) -> Callable[..., jax.Array]:
    def loss(
        constants: Any, hidden_BTD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None = None
    ) -> jax.Array:
        teacher, targets_BT, mask_BT, mix = constants
        mix = _given(mix, soft, cold)
        head = Head(embedding_VD=table_VD, bias_V=bias_V, cap=cap)
        return losses.loss_from_hidden(
            hidden_BTD, head, teacher, targets_BT, mask_BT, mix, kind, chunk=chunk
        )

    return loss
