"""Pytrees of arrays as one self-checking file: what an estimator has fitted, a shard of scores.

A file is safetensors. Its metadata holds the tree's shape as JSON, where arrays are numbered, and
an XXH3-128 over shape and arrays, so that a changed byte is noticed whenever the file is read.
Dictionaries, lists, tuples, NamedTuples of this library, numbers, strings and None are kept; a
file can name no other class, and nothing is unpickled.
"""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from dh_jax.data.stores.shards import replacing
from dh_jax.distributed.mesh import to_host
from dh_jax.errors import DataError

SCHEMA = 1
ROOT = "dh_jax."  # NamedTuples are looked up below it alone
CODES = {
    "bool": "BOOL", "int8": "I8", "uint8": "U8", "int16": "I16", "uint16": "U16", "int32": "I32",
    "uint32": "U32", "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64",
}  # fmt: skip


def write_tree(path: Path, tree: Any) -> None:
    """Write a pytree; the file appears whole or not at all.

    Args:
        path: the file; its folder is there.
        tree: of JAX or NumPy arrays in the containers named above.

    Raises:
        TypeError: the tree holds something else.
        DataError: the disk is full.
    """
    arrays: list[np.ndarray] = []
    shape = json.dumps(_shape(tree, arrays))
    entries: dict[str, Any] = {
        "__metadata__": {
            "schema": str(SCHEMA),
            "tree": shape,
            "xxh3_128": _digest(shape, arrays),
        }
    }
    at = 0
    for i, array in enumerate(arrays):
        entries[_name(i)] = {
            "dtype": CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    # By hand, since safetensors' own writer copies every array once more.
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for array in arrays:
            file.write(_bytes(array))


def read_tree(path: Path) -> Any:
    """What `write_tree` wrote, with NumPy arrays.

    Raises:
        DataError: the file is missing, damaged or of another schema.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            names = sorted(file.keys())
            arrays = [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(
            f"{path} is missing or damaged ({error}); delete it: it is then made again"
        ) from error
    shape = metadata.get("tree", "")
    intact = (
        metadata.get("schema") == str(SCHEMA)
        and metadata.get("xxh3_128") == _digest(shape, arrays)
        and names == [_name(i) for i in range(len(arrays))]
    )
    if not intact:
        raise DataError(
            f"{path} is damaged: its bytes are not those that were written; delete it: it is then "
            "made again"
        )
    return _tree(json.loads(shape), arrays)


def fingerprint(tree: Any) -> str:
    """An XXH3-128 in hex over names, shapes, dtypes and bytes of a pytree of arrays."""
    digest = xxhash.xxh3_128()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(to_host(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def _name(index: int) -> str:
    return f"{index:06d}"


def _digest(shape: str, arrays: list[np.ndarray]) -> str:
    digest = xxhash.xxh3_128(shape.encode())
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> Any:
    flat: Any = np.ascontiguousarray(array).reshape(-1)
    return memoryview(flat.view(np.uint8))


def _shape(tree: Any, arrays: list[np.ndarray]) -> Any:
    """JSON of the tree; its arrays are appended to ``arrays``."""
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    if isinstance(tree, jax.Array | np.ndarray | np.generic):
        array = np.asarray(to_host(tree))
        if array.dtype.name not in CODES:
            raise TypeError(f"an array of {array.dtype} cannot be kept")
        arrays.append(array)
        return {"array": len(arrays) - 1}
    if isinstance(tree, dict):
        return {"dict": [[key, _shape(value, arrays)] for key, value in tree.items()]}
    kind = type(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        if not kind.__module__.startswith(ROOT):
            raise TypeError(f"{kind.__module__}.{kind.__qualname__} is no NamedTuple of {ROOT}")
        fields = [[name, _shape(getattr(tree, name), arrays)] for name in tree._fields]
        return {"named": [kind.__module__, kind.__qualname__], "fields": fields}
    if kind in (list, tuple):
        return {kind.__name__: [_shape(value, arrays) for value in tree]}
    raise TypeError(f"a {kind.__name__} cannot be kept; see the head of {__name__}")


def _tree(shape: dict[str, Any], arrays: list[np.ndarray]) -> Any:
    if "value" in shape:
        return shape["value"]
    if "array" in shape:
        return arrays[shape["array"]]
    if "dict" in shape:
        return {key: _tree(value, arrays) for key, value in shape["dict"]}
    if "named" in shape:
        module, name = shape["named"]
        kind = getattr(importlib.import_module(module), name) if module.startswith(ROOT) else None
        if not (isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")):
            raise DataError(f"{module}.{name} is no NamedTuple of this library")
        return kind(**{field: _tree(value, arrays) for field, value in shape["fields"]})
    kind_name, values = next(iter(shape.items()))
    return {"list": list, "tuple": tuple}[kind_name](_tree(value, arrays) for value in values)
