"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): a few trained numbers beside frozen ones.

An adapted linear layer computes ``x W + (alpha / rank) (x A) B`` (equation 3); ``A`` is drawn and
``B`` begins at 0, so that nothing changes at first. Adapters are a nested dictionary of their own
with the paths of the layers they belong to (``layers/0/attention/query/lora_a``), and are what is
trained; the weights they are beside are never touched until `merge`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dh_jax.config import LoraConfig
from dh_jax.errors import ConfigError, DataError
from dh_jax.models import decoder, states
from dh_jax.models.decoder import Graph, Params
from dh_jax.models.layers import Linear
from dh_jax.models.naming import flatten, hf_module, unflatten

if TYPE_CHECKING:
    from dh_jax.batch import Batch
    from dh_jax.functions import HiddenFn, LossFn, StatesFn

Array: TypeAlias = jax.Array

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_PREFIX = "base_model.model."


def adapt(graph: Graph, params: Params, config: LoraConfig, key: Array) -> tuple[Graph, Params]:
    """Add adapters to the linear layers whose path matches ``config.targets``.

    Args:
        graph: from `decoder.build` or `load_pretrained`.
        params: its parameters, or their shapes; left as they are.
        config: rank, alpha and the regular expression, searched for in paths such as
            ``layers/3/mlp/up`` (``layers/mlp/up`` where layers are scanned).
        key: draws ``A``, uniformly between plus and minus ``1 / sqrt(inputs)``, as PEFT does.

    Returns:
        The graph with adapters, and the adapters, float32. `combine` puts both halves together
        for the functions of that graph.

    Raises:
        ConfigError: the rank is below 1, or the pattern is wrong or matches no linear layer.
    """
    if config.rank < 1:
        raise ConfigError(f"model.lora.rank is {config.rank}; the least for adapters is 1")
    try:
        search = re.compile(config.targets).search
    except re.error as error:
        raise ConfigError(f"model.lora.targets {config.targets!r}: {error}") from error
    model: Any = nnx.merge(graph, params)
    linear = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and module is not model.head
    }
    chosen = sorted(name for name in linear if search(name))
    if not chosen:
        raise ConfigError(
            f"model.lora.targets {config.targets!r} matches none of {len(linear)} linear layers, "
            f"for example {', '.join(list(linear)[:3])}"
        )
    found: dict[str, Array] = {}
    for name, name_key in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        module = linear[name]
        *layers, inputs, outputs = module.kernel.shape  # of all layers, where they are scanned
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(
            name_key, (*layers, inputs, config.rank), minval=-bound, maxval=bound
        )
        b = jnp.zeros((*layers, config.rank, outputs))
        module.lora_a, module.lora_b = nnx.Param(a), nnx.Param(b)
        module.lora_scale = config.alpha / config.rank
        found |= {f"{name}/lora_a": a, f"{name}/lora_b": b}
    return nnx.graphdef(model), unflatten(found)


def combine(base: Params, adapters: Params) -> Params:
    """Both halves as the parameters of the adapted graph."""
    return unflatten(flatten(base) | flatten(adapters))


def split(params: Params) -> tuple[Params, Params]:
    """`combine` undone: base and adapters."""
    flat = flatten(params)
    ours = {path: x for path, x in flat.items() if path.endswith(("lora_a", "lora_b"))}
    return unflatten({path: x for path, x in flat.items() if path not in ours}), unflatten(ours)


def loss_fn(graph: Graph, base: Params, chunk: int | None = None) -> LossFn:
    """The loss of adapters beside a frozen base: ``(adapters, batch, key) -> loss_BT``.

    A `jax.tree_util.Partial`, whose leaves are the base: see `dh_jax.functions.as_argument`.

    Args:
        graph: from `adapt`.
        base: frozen parameters; no gradient is taken with respect to them.
        chunk: as in `decoder.loss_fn`.
    """
    return jax.tree_util.Partial(partial(_loss, decoder.loss_fn(graph, chunk)), base)


def _loss(loss: LossFn, base: Params, adapters: Params, batch: Batch, key: Array) -> Array:
    return loss(combine(base, adapters), batch, key)


def hidden_fn(graph: Graph, base: Params) -> HiddenFn:
    """`decoder.hidden_fn` of adapters beside a frozen base; a `Partial`, as `loss_fn`."""
    return jax.tree_util.Partial(partial(_hidden, decoder.hidden_fn(graph)), base)


def states_fn(graph: Graph, base: Params, layers: Mapping[str, int]) -> StatesFn:
    """`states.states_fn` of adapters beside a frozen base; a `Partial`, as `loss_fn`."""
    return jax.tree_util.Partial(partial(_hidden, states.states_fn(graph, layers)), base)


def _hidden(function: Any, base: Params, adapters: Params, batch: Batch) -> Any:
    return function(combine(base, adapters), batch)


# --- merging ---------------------------------------------------------------------------------


def merge(base: Params, adapters: Params, config: LoraConfig, *, sign: int = 1) -> Params:
    """The base with ``(alpha / rank) A B`` added to its kernels, for the graph without adapters.

    Args:
        sign: -1 takes merged adapters out again (to rounding).
    """
    flat, low = flatten(base), flatten(adapters)
    scale = sign * config.alpha / config.rank
    for path, a in low.items():
        module, _, leaf = path.rpartition("/")
        if leaf == "lora_a":
            kernel, b = flat[f"{module}/kernel"], low[f"{module}/lora_b"]
            product = jnp.matmul(a, b, precision="highest")
            flat[f"{module}/kernel"] = (kernel + scale * product).astype(kernel.dtype)
    return unflatten(flat)


# --- files -----------------------------------------------------------------------------------


def save_adapters(
    folder: str | Path, adapters: Params, config: LoraConfig, *, base: str | None = None
) -> Path:
    """Write adapters in PEFT's format: ``PeftModel.from_pretrained(model, folder)`` reads them.

    Args:
        folder: made if missing; files there are replaced.
        adapters: of layers that are not scanned or scanned.
        config: what they were made with.
        base: where the base model is, for the record.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, array in flatten(_per_layer(adapters)).items():
        module, _, leaf = path.rpartition("/")
        name = f"{_PEFT_PREFIX}{hf_module(module)}.lora_{leaf[-1].upper()}.weight"
        tensors[name] = np.ascontiguousarray(np.asarray(array, np.float32).T)
    partial_weights = folder / f".{PEFT_WEIGHTS}.partial"
    save_file(tensors, partial_weights, metadata={"format": "pt"})
    partial_weights.chmod(0o644)
    modules = {name.removeprefix(_PEFT_PREFIX).rsplit(".lora_", 1)[0] for name in tensors}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    partial_weights.replace(folder / PEFT_WEIGHTS)
    return folder


def load_adapters(folder: str | Path, like: Params, config: LoraConfig) -> Params:
    """Read what `save_adapters` or PEFT wrote.

    Args:
        like: adapters or their shapes, from `adapt` with the same targets and rank.
        config: what ``like`` was made with.

    Raises:
        DataError: a file is missing or damaged, or its tensors are others than ``like``.
        ConfigError: the adapters count for more or less there than ``config`` has them count.
    """
    path = Path(folder) / PEFT_WEIGHTS
    _refuse_other_scale(Path(folder) / PEFT_CONFIG, config)
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as safetensors ({error})") from error
    scanned = "0" not in like["layers"]
    count = len(jax.tree.leaves(like)[0]) if scanned else 0
    used: set[str] = set()

    def read(where: str, shape: tuple[int, ...]) -> np.ndarray:
        module, _, leaf = where.rpartition("/")
        name = f"{_PEFT_PREFIX}{hf_module(module)}.lora_{leaf[-1].upper()}.weight"
        if name not in stored or stored[name].shape[::-1] != shape:
            held = list(stored[name].shape) if name in stored else "missing"
            raise DataError(f"{path}: {name} is {held}, not {list(shape[::-1])}")
        used.add(name)
        return np.asarray(stored[name].T, np.float32)

    found: dict[str, Array] = {}
    for where, leaf in flatten(like).items():
        if scanned:
            inner = [where.replace("layers/", f"layers/{i}/", 1) for i in range(count)]
            found[where] = jnp.stack([jnp.asarray(read(w, leaf.shape[1:])) for w in inner])
        else:
            found[where] = jnp.asarray(read(where, leaf.shape))
    if left := stored.keys() - used:
        raise DataError(f"{path}: {len(left)} tensors more than asked for, as {min(left)!r}")
    return unflatten(found)


def _refuse_other_scale(path: Path, config: LoraConfig) -> None:
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error})") from error
    wanted: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha}
    wanted |= dict.fromkeys(("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"))
    for key, ours in wanted.items():
        if (found := there.get(key) or None) != (ours or None):
            cure = f"take model.lora.alpha={found}" if key == "lora_alpha" else "take others"
            raise ConfigError(f"{path}: {key} is {found}, not {ours}; {cure}")


def _per_layer(adapters: Mapping[str, Any]) -> Params:
    scanned = not all(name.isdigit() for name in adapters["layers"])
    return decoder.unstack_layers(dict(adapters)) if scanned else dict(adapters)
