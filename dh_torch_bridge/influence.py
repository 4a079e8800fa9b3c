"""Torch modules for the estimators of `dh_jax.influence`: their losses, gradients and taps.

An `Objective` whose forward and backward passes run in torch, called by JAX on the host; all
else (documents, curvature, scores) is JAX's. Plain gradients come from autograd, taps from hooks
on linear layers, so that EK-FAC and the estimators by taps hold no gradient of a document of
more than one layer.

Forward mode is JAX's alone: `DataInfCalculator` works as long as the fitted gradients fit in its
``max_bytes``, and `Estimator.by_token` not at all. A model spread over ranks (FSDP2, tensor
parallel) is measured in `dh_torch_bridge.pieces`; estimators that look at documents with curvature
want it whole, as a twin (`fill_twin`).
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError
from dh_jax.functions import Params, TappedLayer
from dh_jax.influence.objective import Objective, Taps
from dh_torch_bridge.data import TorchBatch
from dh_torch_bridge.distributed.named import plain_name
from dh_torch_bridge.exchange import to_jax
from dh_torch_bridge.labels import IGNORED
from dh_torch_bridge.losses import token_losses

TorchLoss: TypeAlias = Callable[[nn.Module, TorchBatch], torch.Tensor]  # unreduced, [B, T]

Array: TypeAlias = jax.Array
Rows: TypeAlias = dict[str, Array]  # what of a batch the loss sees


def torch_params(model: nn.Module, parameters: str = ".*") -> dict[str, Array]:
    """The trained parameters that influence is measured on, by name.

    Kernels of linear layers are turned into JAX's layout, ``[inputs, outputs]`` (a copy); the
    others look into torch's own memory. Make them anew for every measurement, since an
    optimizer's step writes there.

    Args:
        model: whole on this rank.
        parameters: regular expression searched for in names such as
            ``model.layers.0.mlp.up_proj.weight``.

    Raises:
        ConfigError: it matches none that is trained, or the model is spread over ranks.
    """
    chosen = {n: p for n, p in _trained(model).items() if re.search(parameters, n)}
    if not chosen:
        raise ConfigError(f"parameters {parameters!r} matches none that is trained")
    kernels = _kernels(model)
    return {name: to_jax(p.T if name in kernels else p) for name, p in chosen.items()}


def torch_objective(model: nn.Module, loss: TorchLoss = token_losses) -> Objective:
    """A torch model's loss for any estimator that needs no forward mode.

    Its params are those of `torch_params`. They say which gradients are wanted; their values are
    not looked at, since the model has them. Linear layers and embeddings are tapped, but for
    those that share their weight.

    Args:
        model: whole on this rank; called in evaluation mode.
        loss: ``(model, batch) -> loss_BT`` of a batch as `get_loader` gives it.
    """
    tapped_modules = _tapped_modules(model)
    layers = {
        name: TappedLayer(
            "linear" if isinstance(module, nn.Linear) else "embedding",
            f"{name}.weight",
            f"{name}.bias" if getattr(module, "bias", None) is not None else None,
        )
        for name, module in tapped_modules.items()
    }

    def plain(params: Params, batch: Batch, key: Array) -> Array:
        del key  # nothing is drawn at random
        return _losses(model, loss, params, _arrays(batch))

    def tapped(
        params: Params, taps: Taps, batch: Batch, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        del params, key
        return _tapped_losses(model, loss, taps, _arrays(batch))

    def zero_taps(params: Params, batch: Batch) -> Taps:
        del params
        widths = {
            name: m.out_features if isinstance(m, nn.Linear) else m.embedding_dim
            for name, m in tapped_modules.items()
        }
        return {name: jnp.zeros((*batch.tokens_BT.shape, n)) for name, n in widths.items()}

    return Objective(loss=plain, tapped=tapped, layers=layers, zero_taps=zero_taps)


def fill_twin(twin: nn.Module, model: nn.Module) -> None:
    """Copy a spread model's parameters and buffers into one that is whole; all ranks call it."""
    source = {plain_name(name): value for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, tensor in twin.state_dict().items():
            value = source[name]
            tensor.copy_(value.full_tensor() if isinstance(value, DTensor) else value)


# --- what JAX sees ---------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(model: nn.Module, loss: TorchLoss, params: Params, rows: Rows) -> Array:
    del params
    return _on_host(partial(_host_losses, model, loss), _grid(rows), rows)


def _losses_forward(model: nn.Module, loss: TorchLoss, params: Params, rows: Rows) -> Any:
    return _losses(model, loss, params, rows), (params, rows)


def _losses_backward(model: nn.Module, loss: TorchLoss, kept: Any, weight_BT: Array) -> Any:
    params, rows = kept
    shapes = {name: jax.ShapeDtypeStruct(x.shape, np.float32) for name, x in params.items()}
    host = partial(_host_gradients, model, loss, tuple(params))
    found = _on_host(host, shapes, rows, weight_BT)
    return {name: g.astype(params[name].dtype) for name, g in found.items()}, None


_losses.defvjp(_losses_forward, _losses_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tapped_losses(
    model: nn.Module, loss: TorchLoss, taps: Taps, rows: Rows
) -> tuple[Array, dict[str, Array]]:
    modules = _tapped_modules(model)
    grid = _grid(rows)
    shapes = {
        name: jax.ShapeDtypeStruct((*grid.shape, m.in_features), np.float32)
        if isinstance(m := modules[name], nn.Linear)
        else jax.ShapeDtypeStruct(grid.shape, np.int32)
        for name in taps
    }
    host = partial(_host_activations, model, loss, tuple(taps))
    found: tuple[Array, dict[str, Array]] = _on_host(host, (grid, shapes), rows)
    return found


def _tapped_forward(model: nn.Module, loss: TorchLoss, taps: Taps, rows: Rows) -> Any:
    return _tapped_losses(model, loss, taps, rows), (taps, rows)


def _tapped_backward(model: nn.Module, loss: TorchLoss, kept: Any, weights: Any) -> Any:
    taps, rows = kept
    shapes = {name: jax.ShapeDtypeStruct(x.shape, np.float32) for name, x in taps.items()}
    host = partial(_host_cotangents, model, loss, tuple(taps))
    found = _on_host(host, shapes, rows, weights[0])
    return {name: d.astype(taps[name].dtype) for name, d in found.items()}, None


_tapped_losses.defvjp(_tapped_forward, _tapped_backward)


def _on_host(function: Any, shapes: Any, *arrays: Any) -> Any:
    return jax.pure_callback(function, shapes, *arrays, vmap_method="sequential")


def _grid(rows: Rows) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(rows["input_ids"].shape, np.float32)


def _arrays(batch: Batch) -> Rows:
    """A batch in the loader's names, for JAX to carry."""
    return {
        "input_ids": batch.tokens_BT,
        "position_ids": batch.positions_BT,
        "segment_ids": batch.segment_ids_BT,
        "shift_labels": jnp.where(batch.loss_mask_BT, batch.targets_BT, IGNORED),
    }


# --- what torch does, on the host ------------------------------------------------------------

# XLA may run two calls of one program at a time, and a model has one mode and one set of hooks.
_ONE_AT_A_TIME = threading.Lock()


def _host_losses(model: nn.Module, loss: TorchLoss, rows: Any) -> Any:
    with torch.no_grad(), evaluating(model):
        return _numpy(loss(model, _tensors(model, rows)))


def _host_gradients(
    model: nn.Module, loss: TorchLoss, names: tuple[str, ...], rows: Any, weight_BT: Any
) -> dict[str, np.ndarray]:
    kernels, trained = _kernels(model), _trained(model)
    chosen = [trained[name] for name in names]
    with torch.enable_grad(), evaluating(model):
        loss_BT = loss(model, _tensors(model, rows))
        weight = torch.from_numpy(np.array(weight_BT)).to(loss_BT)
        found = torch.autograd.grad(loss_BT, chosen, weight, materialize_grads=True)
    return {
        name: _numpy(g.T if name in kernels else g) for name, g in zip(names, found, strict=True)
    }


def _host_activations(
    model: nn.Module, loss: TorchLoss, names: tuple[str, ...], rows: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    with torch.no_grad(), evaluating(model), _watched(model, names) as seen:
        loss_BT = loss(model, _tensors(model, rows))
        return _numpy(loss_BT), {name: _numpy(seen[name][0]) for name in names}


def _host_cotangents(
    model: nn.Module, loss: TorchLoss, names: tuple[str, ...], rows: Any, weight_BT: Any
) -> dict[str, np.ndarray]:
    with torch.enable_grad(), evaluating(model), _watched(model, names) as seen:
        loss_BT = loss(model, _tensors(model, rows))
        weight = torch.from_numpy(np.array(weight_BT)).to(loss_BT)
        outputs = [seen[name][1] for name in names]
        found = torch.autograd.grad(loss_BT, outputs, weight, materialize_grads=True)
    return {name: _numpy(d) for name, d in zip(names, found, strict=True)}


@contextmanager
def _watched(
    model: nn.Module, names: tuple[str, ...]
) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Input and output of some layers, by name, while the model runs."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if name in seen:
                raise ConfigError(f"{name} is called twice in a pass, which taps cannot tell apart")
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_()  # all before it is frozen
            seen[name] = (given[0].detach(), output)

        return hook

    handles = [model.get_submodule(n).register_forward_hook(watch(n)) for n in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode, and nobody else measures."""
    with _ONE_AT_A_TIME:
        was = {module: module.training for module in model.modules()}  # parts may be frozen
        model.eval()
        try:
            yield
        finally:
            for module, training in was.items():
                module.training = training


def _tensors(model: nn.Module, rows: Any) -> TorchBatch:
    device = next(model.parameters()).device
    batch = {name: torch.from_numpy(np.array(x)).to(device) for name, x in rows.items()}
    return batch | {"shift_labels": batch["shift_labels"].long()}


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    whole = tensor.int() if not tensor.is_floating_point() else tensor.float()
    array: np.ndarray = whole.contiguous().numpy()
    return array


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if isinstance(parameter, DTensor):
            raise ConfigError(
                f"{name} is spread over ranks; measure its pieces (measure_pieces, "
                "score_documents), or a whole twin (fill_twin)"
            )
    return trained


def _tapped_modules(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """Layers whose taps say all of their gradient, but for a head: its tap would be [B, T, V]."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear and module is not head)
        or (type(module) is nn.Embedding and module.padding_idx is None)
        if uses[id(module.weight)] == 1
    }


def _kernels(model: nn.Module) -> set[str]:
    """Names of linear layers' weights."""
    return {f"{n}.weight" for n, m in model.named_modules() if type(m) is nn.Linear}
