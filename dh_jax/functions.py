"""What a model or a loss must look like to be trained, judged or distilled here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from dh_jax.batch import Batch

Params = Any  # any pytree of arrays


VECTORS = ("bias", "scale")  # names of a layer's vectors, also where layers are stacked


class LossFn(Protocol):
    """The one rule of the house: every loss is ``(params, batch, key) -> loss_BT``.

    Returns float32 nats a target, unreduced; 0 where ``batch.loss_mask_BT`` is False. ``key``
    serves dropout and sampled estimators; a deterministic loss ignores it.

    A loss that carries arrays of its own (frozen weights) is a `jax.tree_util.Partial`, and who
    compiles it takes it as an argument; see `as_argument`.
    """

    def __call__(self, params: Params, batch: Batch, key: jax.Array) -> jax.Array: ...


class LogitsFn(Protocol):
    """A model seen from outside: ``(params, batch) -> logits_BTV`` in float32."""

    def __call__(self, params: Params, batch: Batch) -> jax.Array: ...


class Head(NamedTuple):
    """What turns hidden states into logits; exactly one of the two tables is given."""

    kernel_DV: jax.Array | None = None
    embedding_VD: jax.Array | None = None  # a tied table, as the look-up has it
    bias_V: jax.Array | None = None
    cap: jax.Array | float | None = None  # logits become cap * tanh(logits / cap) (Gemma 2)

    @property
    def vocabulary(self) -> int:
        """V."""
        table = self.embedding_VD
        if table is not None:
            return int(table.shape[0])
        assert self.kernel_DV is not None, "a head has a kernel or an embedding"
        return int(self.kernel_DV.shape[1])


class HiddenFn(Protocol):
    """A model before its last matrix product: ``(params, batch) -> (hidden_BTD, head)``.

    For losses that make logits themselves, a few tokens at a time.
    """

    def __call__(self, params: Params, batch: Batch) -> tuple[jax.Array, Head]: ...


class StatesFn(Protocol):
    """A `HiddenFn` that also shows states of chosen layers, by name (see `dh_jax.models.states`):
    ``(params, batch) -> (hidden_BTD, head, states)``."""

    def __call__(
        self, params: Params, batch: Batch
    ) -> tuple[jax.Array, Head, dict[str, jax.Array]]: ...


class TappedLayer(NamedTuple):
    """One parametrised operation of a model, as a `TappedLossFn` sees it.

    ==========  ====================================  =======================
    kind        activation: what met the weight       tap and cotangent
    ==========  ====================================  =======================
    linear      ``[B, T, I]``                         ``[B, T, O]``
    embedding   int32 ids, ``[B, T]``                 ``[B, T, D]``
    norm        the normalised input, ``[B, T, D]``   ``[B, T, D]``
    ==========  ====================================  =======================

    A norm of heads has ``[B, T, H, h]`` for ``[B, T, D]``, and a scale of ``[h]``. Summed over
    tokens, the gradient of a kernel ``[I, O]`` is the outer product of activation and cotangent,
    that of a bias the cotangent, that of a scale the elementwise product; a table's rows gather
    the cotangents of their ids.
    """

    kind: str
    weight: str  # path of the kernel, the table or the scale
    bias: str | None = None  # path of a linear operation's bias, if it has one
    layers: int | None = None  # L where layers are scanned: all arrays begin with an axis of L


class TappedLossFn(Protocol):
    """A loss seen through its layers: ``(params, taps, batch, key) -> (loss_BT, activations)``.

    ``taps`` are zeros by the names of operations (paths of modules, ``layers/0/attention/query``);
    each is added to its operation's output, so the gradient with respect to it is the cotangent
    there. ``activations`` holds what met each weight, by the same names. Only the names in
    ``taps`` are tapped, and nothing is kept for the others. A head's logits are never tapped: a
    tap would be a ``[B, T, V]`` table.
    """

    def __call__(
        self, params: Params, taps: dict[str, jax.Array], batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]: ...


def as_argument(loss_fn: LossFn) -> LossFn:
    """The loss as a pytree, to be an argument of a jitted function.

    Were it closed over, the arrays it carries would be copied into the program as constants::

        step = partial(jax.jit(step), as_argument(loss_fn))
    """
    if isinstance(loss_fn, jax.tree_util.Partial):
        return loss_fn
    return jax.tree_util.Partial(loss_fn)


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """``logsumexp(logits) - logits[target]``, (B, T) nats."""
    at_target = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - at_target


def masked_mean(loss_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean loss over valid targets, a float32 scalar; 0 (never NaN) where none is valid.

    On a mesh the sums run over the global batch, so the mean is over the *global* count.
    """
    total = (loss_BT * mask_BT).sum()
    count = mask_BT.sum()
    return total / count.clip(min=1)


def matrices(params: Params) -> Any:
    """Which parameters are matrices, as a tree of booleans: of vectors stacked over scanned layers
    the number of axes does not tell."""

    def is_matrix(path: Any, x: jax.Array) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return x.ndim > 1 and name not in VECTORS

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def round_matrices(params: Params, dtype: Any) -> Params:
    """Matrices in another type, vectors as they are."""
    return jax.tree.map(
        lambda x, is_one: x.astype(dtype) if is_one else x, params, matrices(params)
    )
