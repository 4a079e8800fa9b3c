"""Arrays between torch and JAX: by DLPack without a copy where that is safe, else by a counted one.

A JAX array is never written to, and torch tensors may be. So a tensor may look into a JAX array
only where nobody else does any longer; what JAX reads of a tensor, it reads before torch goes on.
"""

from __future__ import annotations

from typing import Any

import jax
import torch
from torch.distributed.tensor import DTensor

from dh_jax.errors import ConfigError
from dh_torch_bridge.copies import COPIED


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """A JAX array of a tensor's values, in the tensor's own memory where that is possible.

    JAX wants contiguous memory that begins at a multiple of 64 bytes, which torch's own
    allocations do; of other tensors a copy is made and counted under ``to_jax``. Do not write to
    the tensor while the array is used.

    Args:
        tensor: any device that JAX knows, any type that JAX has; gradients do not flow.

    Raises:
        ConfigError: it is spread over ranks, or of 64 bits, which JAX would cut in half.
    """
    if isinstance(tensor, DTensor):
        raise ConfigError(
            f"a tensor of shape {tuple(tensor.shape)} is spread over {tensor.device_mesh}; give "
            "JAX the whole (tensor.full_tensor()) or this rank's part (tensor.to_local())"
        )
    if tensor.dtype.itemsize == 8 and not jax.config.read("jax_enable_x64"):
        raise ConfigError(
            f"a tensor of {tensor.dtype} goes to JAX, which has 32 bits here; convert it, or set "
            "jax_enable_x64"
        )
    tensor = tensor.detach()
    array: jax.Array = jax.dlpack.from_dlpack(tensor.contiguous())
    if tensor.numel() and array.unsafe_buffer_pointer() != tensor.data_ptr():
        COPIED["to_jax"] += tensor.nbytes
    return array


def to_torch(array: jax.Array, *, owned: bool = False) -> torch.Tensor:
    """A tensor of a JAX array's values, on its device.

    Args:
        array: on one device.
        owned: nobody else will use the array, so the tensor may have its memory. Otherwise the
            values are copied and counted under ``to_torch``.
    """
    tensor: torch.Tensor = torch.from_dlpack(jax.block_until_ready(array))
    if owned:
        return tensor
    COPIED["to_torch"] += tensor.nbytes
    return tensor.clone()


def tree_to_jax(tree: Any) -> Any:
    """`to_jax` of every tensor of a pytree; other leaves are left alone."""
    return jax.tree.map(lambda x: to_jax(x) if isinstance(x, torch.Tensor) else x, tree)
