"""Folders of Hugging Face's layout: config.json, safetensors, tokenizer; read and written.

Weights are read lazily, each device's part of a tensor straight from the file. Nothing is
unpickled: a checkpoint that has only ``pytorch_model.bin`` is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dh_jax.config import ModelConfig
from dh_jax.errors import ConfigError, DataError
from dh_jax.models.decoder import Graph, Params, abstract_graph, abstract_params, unstack_layers
from dh_jax.models.hf_config import from_hf, to_hf
from dh_jax.models.naming import flatten, hf_name, unflatten

if TYPE_CHECKING:
    from dh_jax.data.tokenization import TokenizerWrapper

Shardings: TypeAlias = "Params | Callable[[Params], Params] | None"

WEIGHTS = "model.safetensors"
SHARD_BYTES = 5 << 30  # of a weights file
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja")
ROLES = ("bos", "eos", "pad")
_BUFFERS = ("rotary_emb.inv_freq",)  # in old checkpoints; worked out from the config


class Pretrained(NamedTuple):
    """A model read from a folder."""

    graph: Graph
    params: Params
    config: ModelConfig  # with its vocab_size
    folder: Path


# --- reading ---------------------------------------------------------------------------------


def load_pretrained(
    name: str | Path, config: ModelConfig | None = None, *, shardings: Shardings = None
) -> Pretrained:
    """Read a Llama, SmolLM2 or Qwen checkpoint.

    Args:
        name: a folder with config.json and safetensors (one file, or several by an index), or a
            name on the hub (``HF_ENDPOINT`` names a mirror, ``HF_TOKEN`` a login).
        config: how to compute (dtype, kernels, scanned layers, ...); its shape is ignored.
        shardings: where parameters go: a pytree of ``jax.sharding.Sharding`` like them, or a
            function from their shapes to one. Each device reads its own part. None: whole, on
            the default device.

    Returns:
        Graph, float32 parameters, the config with the checkpoint's shape, and the folder, which
        `TokenizerWrapper.load` reads too.

    Raises:
        ConfigError: there is no such folder, or a model that is not built here.
        DataError: weights are missing, of another shape, damaged, or there is one too many.
    """
    folder = find_folder(name)
    config = read_config(folder, config)
    vocab_size = config.vocab_size or 0
    shapes = abstract_params(config, vocab_size)
    places = flatten(shardings(shapes) if callable(shardings) else shardings or {})
    with _Weights(folder) as weights:
        found = {
            path: _read(weights, path, shape, places.get(path), config)
            for path, shape in flatten(shapes).items()
        }
        weights.refuse_leftovers(tied=config.tied)
    return Pretrained(abstract_graph(config, vocab_size), unflatten(found), config, folder)


def read_config(folder: Path, base: ModelConfig | None = None) -> ModelConfig:
    """The config.json of a folder; see `from_hf`.

    Raises:
        ConfigError: config.json cannot be read, or is of no model that is known here.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error})") from error
    try:
        return from_hf(values, base)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error


def find_folder(name: str | Path) -> Path:
    """The folder itself, or what the hub has under this name, downloaded into its cache.

    Raises:
        ConfigError: there is no such folder, and the hub has none of this name.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or not isinstance(name, str) or len(folder.parts) > 2:
        cure = (
            "`dh convert` makes a folder of one"
            if folder.suffix == ".gguf"
            else ("give a folder with config.json and safetensors, or a hub name")
        )
        raise ConfigError(f"no model at {folder}: no config.json there; {cure}")
    from huggingface_hub import snapshot_download  # a second to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model {name!r} is no folder with config.json, and the hub gave none ({reason})"
        ) from error


class _Weights:
    """The tensors of a folder's safetensors files, opened when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.used = folder, set[str]()
        self._files: dict[str, Any] = {}
        index = folder / f"{WEIGHTS}.index.json"
        if index.is_file():
            try:
                self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise DataError(f"{index} is no index of safetensors ({error!r})") from error
        elif (folder / WEIGHTS).is_file():
            self.files = dict.fromkeys(self._open(WEIGHTS).keys(), WEIGHTS)
        else:
            raise ConfigError(
                f"{folder} has neither {WEIGHTS} nor {index.name}; other formats are not read"
            )

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)

    def _open(self, name: str) -> Any:
        if name not in self._files:
            path = self.folder / name
            try:
                self._files[name] = safe_open(path, framework="numpy").__enter__()
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} cannot be read as safetensors ({error})") from error
        return self._files[name]

    def slice(self, name: str) -> Any:
        """A tensor that reads only what it is indexed for."""
        if name not in self.files:
            raise DataError(f"{self.folder}: no tensor {name!r} among {len(self.files)}")
        self.used.add(name)
        try:
            return self._open(self.files[name]).get_slice(name)
        except SafetensorError as error:
            raise DataError(f"{self.folder / self.files[name]}: {error}") from error

    def refuse_leftovers(self, *, tied: bool) -> None:
        """A tensor that nothing reads would be a model computed otherwise than it was made."""
        spare = {"lm_head.weight"} if tied else set[str]()
        left = {n for n in self.files if not n.endswith(_BUFFERS)} - self.used - spare
        if left:
            raise DataError(
                f"{self.folder}: {len(left)} tensors that its config.json does not explain, "
                f"for example {min(left)!r}"
            )


def _read(
    weights: _Weights,
    path: str,
    shape: jax.ShapeDtypeStruct,
    place: jax.sharding.Sharding | None,
    config: ModelConfig,
) -> jax.Array:
    """One parameter: whole, or each device's part of it."""
    transposed = path.endswith("/kernel")
    stacked = config.scan_layers and path.startswith("layers/")
    paths = [path]
    if stacked:
        paths = [path.replace("layers/", f"layers/{i}/", 1) for i in range(config.layers)]
    slices = [weights.slice(hf_name(p)) for p in paths]
    wanted = tuple(shape.shape[1:] if stacked else shape.shape)
    for p, part in zip(paths, slices, strict=True):
        stored = tuple(part.get_shape())
        if (stored[::-1] if transposed else stored) != wanted:
            raise DataError(
                f"{weights.folder}: {hf_name(p)} is {list(stored)}, but config.json asks for "
                f"{list(wanted[::-1] if transposed else wanted)}"
            )

    def part_of(index: Any) -> np.ndarray:  # a slice for each dimension
        inner = index[1:] if stacked else index
        chosen = slices[index[0]] if stacked else slices
        inner = inner[::-1] if transposed else inner
        parts = [np.asarray(x[inner], shape.dtype) for x in chosen]
        parts = [x.T for x in parts] if transposed else parts
        return np.stack(parts) if stacked else parts[0]

    if place is None:
        return jax.numpy.asarray(part_of((slice(None),) * len(shape.shape)))
    return jax.make_array_from_callback(shape.shape, place, part_of)


# --- writing ---------------------------------------------------------------------------------


def save_pretrained(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: TokenizerWrapper | None = None,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a folder that `transformers`, vLLM, lm-eval and `load_pretrained` read.

    Args:
        folder: must not exist yet, or be empty. It appears when everything is written.
        config: of the parameters; merge adapters first (`dh_jax.models.lora.merge`).
        params: in either layout of layers; on one host.
        tokenizer: saved beside the weights.
        dtype: of the weights on disk: float32, bfloat16 or float16.
        shard_bytes: the most a weights file holds; more makes several and an index.

    Raises:
        ConfigError: the folder is occupied, or transformers knows no such model.
    """
    if config.scan_layers:
        params = unstack_layers(params)
    flat = flatten(params)
    if extra := [path for path in flat if path.endswith(("lora_a", "lora_b"))]:
        raise ConfigError(f"params hold adapters ({extra[0]}); merge them first, by lora.merge")
    values = to_hf(config, flat["embed/embedding"].shape[0], dtype)
    tensors = ((hf_name(path), _stored(path, x, dtype)) for path, x in flat.items())
    return write_folder(folder, values, tensors, tokenizer, shard_bytes=shard_bytes)


def _stored(path: str, array: jax.Array, dtype: str) -> np.ndarray:
    host = np.asarray(array)
    return np.ascontiguousarray(host.T if path.endswith("/kernel") else host, DTYPES[dtype])


def write_folder(
    folder: str | Path,
    values: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer: TokenizerWrapper | None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write config.json, weights (``tensors``: name and array, in the checkpoint's shapes) and
    tokenizer beside the folder, then rename it into place.

    Raises:
        ConfigError: the folder is occupied, or the tokenizer has more tokens than there are rows.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} already exists; choose another folder, or remove it")
    if tokenizer is not None and tokenizer.vocab_size > values["vocab_size"]:
        raise ConfigError(
            f"the embedding has {values['vocab_size']} rows, fewer than the tokenizer's "
            f"{tokenizer.vocab_size} tokens; give the model's own tokenizer"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    files = [
        _save_shard(partial, number, shard)
        for number, shard in enumerate(_shards(tensors, shard_bytes), start=1)
    ]
    _name_shards(partial, files)
    ids: dict[str, int | None] = {}
    if tokenizer is not None:
        tokenizer.save(partial)
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ROLES}
    (partial / "config.json").write_text(json.dumps({**values, **ids}, indent=2) + "\n")
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return folder


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _save_shard(folder: Path, number: int, shard: dict[str, np.ndarray]) -> tuple[Path, Any]:
    path = folder / f"{number}.safetensors"
    save_file(shard, path, metadata={"format": "pt"})  # without it transformers refuses the file
    path.chmod(0o644)  # safetensors makes files that their owner alone may read
    return path, {name: array.nbytes for name, array in shard.items()}


def _name_shards(folder: Path, files: list[tuple[Path, dict[str, int]]]) -> None:
    """Their final names, which hold their number; and the index, if there are several."""
    if len(files) == 1:
        files[0][0].rename(folder / WEIGHTS)
        return
    where: dict[str, str] = {}
    for number, (path, sizes) in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / name)
        where |= dict.fromkeys(sizes, name)
    total = sum(sum(sizes.values()) for _, sizes in files)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
