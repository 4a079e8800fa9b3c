"""The parts of a decoder that know nothing of sequences: norms, linear layers, feed-forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dh_jax.distributed.placement import constrain
from dh_jax.models.taps import Tape
from dh_jax.models.ternary import int8_rows, ternary

if TYPE_CHECKING:
    from dh_jax.config import ModelConfig

Array: TypeAlias = jax.Array


PIECE = 192  # terms that `product` sums along one chain where precision is highest


def product(
    x_BTI: Array, kernel_IO: Array, precision: str = "default", dtype: DTypeLike | None = None
) -> Array:
    """``x @ kernel``, ``[B, T, O]``.

    As one matrix of rows: behind a product with two leading axes XLA copies both operands of the
    kernel's gradient into another order first, a tenth of a training step on a CPU.

    Args:
        x_BTI: activations.
        kernel_IO: of the same dtype.
        precision: ``default`` is the platform's own product: TPUs round float32 inputs to
            bfloat16, and XLA's product on CPUs sums all I terms along one chain. ``highest``
            is float32 throughout, summed in pieces: an error 1.7 (I = 576) to 2.8 times
            (1,536) smaller on a CPU.
        dtype: of sums and result; None: that of ``x_BTI``.
    """
    x = x_BTI
    if jax.sharding.get_abstract_mesh().shape.get("sequence", 1) == 1:  # else split along T, too
        x = x.reshape(-1, x.shape[-1])
    if precision == "default":
        y = jnp.matmul(x, kernel_IO, preferred_element_type=dtype)
    else:
        y = _in_pieces(x, kernel_IO).astype(dtype or x.dtype)
    return y.reshape(*x_BTI.shape[:-1], -1)


def _in_pieces(x: Array, kernel_IO: Array) -> Array:
    pieces = [slice(start, start + PIECE) for start in range(0, len(kernel_IO), PIECE)]
    parts = [
        jnp.matmul(
            x[..., piece], kernel_IO[piece], precision="highest", preferred_element_type="float32"
        )
        for piece in pieces
    ]
    while len(parts) > 1:  # in pairs, for the same reason
        parts = [sum(parts[i + 1 : i + 2], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale``, in float32 whatever the type of ``x``."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x_BTD: Array, tape: Tape) -> Array:
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return tape(x, (x * self.scale[...]).astype(x_BTD.dtype))


class Linear(nnx.Module):
    """``x @ kernel + bias``; the hook for other forms of linear layers.

    Where `dh_jax.models.lora` has given it ``lora_a`` and ``lora_b``, it adds
    ``lora_scale * x @ lora_a @ lora_b``.

    Args:
        scale: standard deviation of the initial kernel.
        bias: whether there is one; it starts at 0.
    """

    lora_a: nnx.Param[Array]  # [I, R]
    lora_b: nnx.Param[Array]  # [R, O]

    def __init__(
        self,
        config: ModelConfig,
        inputs: int,
        outputs: int,
        *,
        scale: float | None = None,
        bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        normal = nnx.initializers.normal(config.init_scale if scale is None else scale)
        self.kernel = nnx.Param(normal(rngs.params(), (inputs, outputs), jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))
        self.has_bias, self.form, self.dtype = bias, config.linear, config.dtype
        self.precision = config.precision
        self.lora_scale = 0.0  # no adapters

    def __call__(self, x_BTI: Array, tape: Tape) -> Array:
        kernel_IO = self.kernel[...]
        given = x_BTI = x_BTI.astype(self.dtype)
        if self.form == "ternary":
            kernel_IO, given = ternary(kernel_IO), int8_rows(x_BTI)
        y_BTO = product(given, kernel_IO.astype(self.dtype), self.precision)
        if self.has_bias:
            y_BTO = y_BTO + self.bias[...].astype(self.dtype)
        y_BTO = tape(given, y_BTO)
        if not self.lora_scale:
            return y_BTO
        low_BTR = product(x_BTI, self.lora_a[...].astype(self.dtype), self.precision)
        low_BTR = tape.inside("lora_a")(x_BTI, low_BTR)
        # Scaled before the second product, so that its activation is what meets lora_b.
        low_BTR = low_BTR * self.lora_scale
        high_BTO = product(low_BTR, self.lora_b[...].astype(self.dtype), self.precision)
        return y_BTO + tape.inside("lora_b")(low_BTR, high_BTO)


def residual_scale(config: ModelConfig) -> float:
    """Layers that write to the residual stream start smaller (GPT-2, section 2.3)."""
    return config.init_scale / (2 * config.layers) ** 0.5


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        width, inner = config.width, config.mlp_width
        self.gate = Linear(config, width, inner, rngs=rngs)
        self.up = Linear(config, width, inner, rngs=rngs)
        self.down = Linear(config, inner, width, scale=residual_scale(config), rngs=rngs)

    def __call__(self, x_BTD: Array, tape: Tape) -> Array:
        gate_BTF = self.gate(x_BTD, tape.inside("gate"))
        up_BTF = self.up(x_BTD, tape.inside("up"))
        hidden_BTF = constrain(jax.nn.silu(gate_BTF) * up_BTF, "BTF")
        return self.down(hidden_BTF, tape.inside("down"))
