"""Where parameters and activations live on a mesh: one table for each.

Shapes are spelt in the letters of the house (see `dh_jax.batch`), the rank of an adapter is R,
and a letter stands for a logical axis. So a rule reads "the query kernel is DH", and the axes of
the mesh are named once for each letter.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dh_jax.config import ModelConfig
from dh_jax.errors import ConfigError
from dh_jax.functions import Params

# --- the tables ------------------------------------------------------------------------------

# What is searched for in a parameter's path -> its shape. Leading dimensions beyond the letters
# (the layers of a scanned model) are never split.
PARAMETERS = (
    (r"embed/embedding$", "VD"),
    (r"head/kernel$", "DV"),
    (r"query/kernel$", "DH"),
    (r"(key|value)/kernel$", "DK"),
    (r"out/kernel$", "HD"),
    (r"(gate|up)/kernel$", "DF"),
    (r"down/kernel$", "FD"),
    (r"query/bias$", "H"),
    (r"(key|value)/bias$", "K"),
    (r"(query|key|value|gate|up|head)\b.*/lora_a$", "DR"),
    (r"out\b.*/lora_a$", "HR"),
    (r"down\b.*/lora_a$", "FR"),
    (r"query\b.*/lora_b$", "RH"),
    (r"(key|value)\b.*/lora_b$", "RK"),
    (r"(gate|up)\b.*/lora_b$", "RF"),
    (r"(out|down)\b.*/lora_b$", "RD"),
    (r"head\b.*/lora_b$", "RV"),
)
# Letter -> axes of the mesh; letters that are missing are split over none.
PARAMETER_AXES = {"D": "fsdp", "V": "tensor", "H": "tensor", "K": "tensor", "F": "tensor"}
# Of one array an axis splits the first dimension whose letter names it. So hidden states "BTD" and
# queries "BTHh" are split along T, and queries "BtHh", whole rows of a share of the heads, along H:
# between the two XLA exchanges tokens for heads (Ulysses, Jacobs et al. 2023, arXiv:2309.14509).
ACTIVATION_AXES = {
    "B": ("data", "fsdp"), "T": ("sequence",), "V": ("tensor",), "F": ("tensor",),
    "H": ("sequence", "tensor"), "K": ("sequence", "tensor"),
    # What comes out of the embedding, whose columns are split over fsdp. Said before "BTD" it
    # makes the way between the two an exchange of columns for rows; on a mesh of data and fsdp
    # XLA otherwise gathers the rows of all devices on each.
    "b": ("data",), "d": ("fsdp",),
}  # fmt: skip

SHARDED_FROM = 2**14  # elements; smaller arrays are repeated rather than split

AnyMesh = Mesh | AbstractMesh
P = ParamSpec("P")
R = TypeVar("R")


# --- parameters ------------------------------------------------------------------------------


def param_shardings(params: Params, mesh: AnyMesh) -> Params:
    """The sharding of every array of a pytree: parameters, or an optimizer's state of them.

    By `PARAMETERS`, whose patterns find an optimizer's moments too. An axis that does not divide
    its dimension leaves it whole, except that ``fsdp`` then takes the longest dimension it
    divides; so does it where no rule fits (a model of one's own). See `unsplit`.

    Args:
        params: arrays or `jax.ShapeDtypeStruct`.
        mesh: of `dh_jax.distributed.mesh.make_mesh`, or an abstract one with its axes.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, _spec(_spell(path), x.shape, mesh.shape)), params
    )


def placed_shapes(tree: Params, mesh: AnyMesh) -> Any:
    """Arrays or shapes as `jax.ShapeDtypeStruct`, each with its sharding by `param_shardings`."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        param_shardings(tree, mesh),
    )


class Unsplit(NamedTuple):
    """A dimension that stays whole though its rule would split it."""

    path: str
    shape: tuple[int, ...]
    dimension: int
    axis: str


def unsplit(params: Params, mesh: AnyMesh) -> list[Unsplit]:
    """Dimensions of large parameters that an axis should split but does not divide."""
    found = []
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        spelt = _spell(path)
        for dimension, axis in _wanted(spelt, x.shape).items():
            if x.size >= SHARDED_FROM and x.shape[dimension] % mesh.shape[axis]:
                found.append(Unsplit(spelt, x.shape, dimension, axis))
    return found


def warn_unsplit(params: Params, mesh: AnyMesh) -> None:
    """Warn of what `unsplit` finds, in one line."""
    if found := unsplit(params, mesh):
        named = ", ".join(f"{x.path} {x.shape} over {x.axis}" for x in found[:3])
        warnings.warn(
            f"mesh {dict(mesh.shape)} does not divide {len(found)} dimensions of parameters, which "
            f"stay whole along them: {named}; other sizes would save memory",
            stacklevel=2,
        )


def check_heads(config: ModelConfig, mesh: AnyMesh) -> None:
    """Refuse axes that would cut through heads, which sequence and tensor share.

    Raises:
        ConfigError: they divide the query heads or the key-value heads unevenly.
    """
    sizes = {axis: mesh.shape.get(axis, 1) for axis in ("sequence", "tensor")}
    ways = math.prod(sizes.values())
    said = " x ".join(f"mesh.{axis} {n}" for axis, n in sizes.items() if n > 1)
    for name in ("heads", "kv_heads"):
        if (heads := getattr(config, name)) % ways:
            fitting = [n for n in range(1, config.kv_heads + 1) if _divides(n, config)]
            raise ConfigError(
                f"{said} does not divide model.{name} {heads}; for this model it may "
                f"be {', '.join(map(str, fitting))}"
            )


def _divides(ways: int, config: ModelConfig) -> bool:
    return config.heads % ways == 0 and config.kv_heads % ways == 0


def _spell(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _letters(path: str, shape: tuple[int, ...]) -> str:
    """The letters of a path, one for each dimension, those of stacked layers blank."""
    letters = next((x for pattern, x in PARAMETERS if re.search(pattern, path)), "?" * len(shape))
    return letters.rjust(len(shape)) if len(letters) <= len(shape) else "?" * len(shape)


def _wanted(path: str, shape: tuple[int, ...]) -> dict[int, str]:
    """Dimension -> axis, as the table has it."""
    return {
        i: PARAMETER_AXES[letter]
        for i, letter in enumerate(_letters(path, shape))
        if letter in PARAMETER_AXES
    }


def _spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    if math.prod(shape) < SHARDED_FROM:
        return PartitionSpec()
    wanted = _wanted(path, shape).items()
    split = {i: axis for i, axis in wanted if shape[i] % sizes[axis] == 0}
    if "fsdp" not in split.values():
        letters = _letters(path, shape)
        free = [i for i, letter in enumerate(letters) if letter != " " and i not in split]
        fitting = [i for i in free if shape[i] % sizes["fsdp"] == 0]
        if fitting:
            split[max(fitting, key=lambda i: shape[i])] = "fsdp"
    axes = [split.get(i) if sizes[split.get(i, "data")] > 1 else None for i in range(len(shape))]
    while axes and axes[-1] is None:  # jit's own spelling has no trailing None
        axes.pop()
    return PartitionSpec(*axes)


# --- activations -----------------------------------------------------------------------------


def on_mesh(function: Callable[P, R], mesh: AnyMesh) -> Callable[P, R]:
    """The same function with every `constrain` in it meaning this mesh.

    Without it they mean nothing, so models need know of no mesh.
    """
    if mesh.size == 1:
        return function
    if isinstance(function, jax.tree_util.Partial):  # keep what it carries an argument
        inner = on_mesh(function.func, mesh)
        return jax.tree_util.Partial(inner, *function.args, **function.keywords)

    def constrained(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return constrained


def constrain(x: jax.Array, shape: str) -> jax.Array:
    """Say how an activation is split over the mesh, if there is one: ``constrain(x, "BTD")``.

    XLA finds the rest from the parameters, but not always well: it may split the width of hidden
    states because kernels are split over their inputs, and then add up every product over the
    network. Values are not changed, and derivatives of all kinds pass.

    Args:
        x: an array of as many dimensions as ``shape`` has letters.
        shape: letters of `ACTIVATION_AXES`, others for dimensions that are whole. A dimension
            that its axes do not divide is left to XLA. An axis splits one dimension, the first
            that names it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec: list[Any] = []
    free = set(mesh.shape)
    for letter, n in zip(shape, x.shape, strict=True):
        axes = tuple(axis for axis in ACTIVATION_AXES.get(letter, ()) if axis in free)
        free -= set(axes)
        fits = n % math.prod(mesh.shape[axis] for axis in axes) == 0
        spec.append((axes or None) if fits else PartitionSpec.UNCONSTRAINED)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
