"""A teacher that is a torch model, for everything that takes a `TeacherWrapper`.

    python -m dh_torch_bridge.teacher distillation.teacher=FOLDER distillation.cache=OUT data=demo

writes a cache as `dh distill cache` does, with any causal model of transformers that has full
attention (or windows no shorter than a row).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

from dh_jax.batch import Batch
from dh_jax.compose import compose_run
from dh_jax.config import RunConfig
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distillation.cached import CachedTeacher
from dh_jax.distillation.caching import Progress, write_cache
from dh_jax.distillation.teacher import TeacherWrapper, fingerprint_of, wrap_teacher
from dh_jax.distilling import check_distillation, with_defaults
from dh_jax.distributed.mesh import make_mesh
from dh_jax.errors import ConfigError, UserError
from dh_jax.functions import Head
from dh_jax.models.pretrained import find_folder
from dh_jax.progress import CacheProgress
from dh_torch_bridge.data import document_mask
from dh_torch_bridge.exchange import to_jax
from dh_torch_bridge.families import refuse_other_attention


def wrap_torch_teacher(model: Any, *, fingerprint: str | None = None) -> TeacherWrapper:
    """A causal model of transformers as a teacher; it runs in torch, on the device it is on.

    Where the model's last layer is a plain matrix product (which is tried out), JAX makes the
    logits from hidden states, a few tokens at a time; else torch makes the whole table.

    Args:
        model: a `PreTrainedModel`; takes ids, positions and a boolean mask of ``[B, 1, T, T]``
            (``attn_implementation="sdpa"``). Put into evaluation mode; not changed otherwise.
        fingerprint: of the weights, for a cache.

    Raises:
        ConfigError: as `refuse_other_attention`, when it is first called.
    """
    model.eval()
    head = model.get_output_embeddings()
    if not _ends_in(model, head):
        vocabulary = model.config.get_text_config().vocab_size
        logits = partial(_call, partial(_logits, model), model.config, vocabulary)
        return wrap_teacher(None, logits_fn=logits, fingerprint=fingerprint)

    def hidden_fn(params: Head, batch: Batch) -> tuple[jax.Array, Head]:
        hidden_BTD = _call(partial(_hidden, model), model.config, head.in_features, params, batch)
        return hidden_BTD, params

    tables = [to_jax(x.float().cpu()) for x in (head.weight, head.bias) if x is not None]
    return wrap_teacher(
        Head(embedding_VD=tables[0], bias_V=tables[1] if len(tables) > 1 else None),
        hidden_fn=hidden_fn,
        fingerprint=fingerprint,
    )


def _call(function: Any, config: Any, width: int, params: Any, batch: Batch) -> jax.Array:
    """``function`` of tokens, positions and segments, on the host, from within a JAX program."""
    del params
    refuse_other_attention(config, batch.tokens_BT.shape[1])
    result = jax.ShapeDtypeStruct((*batch.tokens_BT.shape, width), np.float32)
    found: jax.Array = jax.pure_callback(
        lambda *given: function(*map(_tensor, given)).float().cpu().numpy(),
        result, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT,
    )  # fmt: skip
    return found


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))  # a copy: JAX's own memory is not to be written to


@torch.no_grad()
def _logits(model: Any, *rows: Any) -> torch.Tensor:
    logits: torch.Tensor = model(**_inputs(model, *rows)).logits
    return logits


@torch.no_grad()
def _hidden(model: Any, *rows: Any) -> torch.Tensor:
    hidden: torch.Tensor = model.base_model(**_inputs(model, *rows)).last_hidden_state
    return hidden


def _inputs(model: Any, tokens: Any, positions: Any, segments: Any) -> dict[str, Any]:
    device = model.device
    return {
        "input_ids": tokens.to(device),
        "position_ids": positions.to(device),
        "attention_mask": document_mask(segments.to(device)),
        "use_cache": False,
    }


def _ends_in(model: Any, head: Any) -> bool:
    """Whether logits are ``head(hidden)`` and nothing more: no scale, no cap."""
    if not isinstance(head, nn.Linear):
        return False
    positions = torch.arange(8, dtype=torch.int32)[None]
    given = positions + 1, positions, torch.ones_like(positions)
    with torch.no_grad():
        ours = head(_hidden(model, *given))
    return torch.equal(ours, _logits(model, *given))


def load_torch_teacher(name: str, dtype: str = "float32") -> TeacherWrapper:
    """A teacher from a Hugging Face folder or a hub name; its fingerprint is that of `dh`."""
    folder = find_folder(name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return wrap_torch_teacher(model.to(device), fingerprint=fingerprint_of(folder, dtype))


def make_cache(config: RunConfig, progress: Progress | None = None) -> CachedTeacher:
    """What `dh_jax.distilling.make_cache` does, with the teacher in torch.

    Raises:
        ConfigError: no teacher or no folder is named, or the tokenizers differ.
        DataError, StateError: as `dh_jax.distillation.caching.write_cache`.
    """
    d, data = config.distillation, config.data
    if not d.cache or not d.teacher:
        raise ConfigError("a cache needs distillation.teacher=MODEL and distillation.cache=FOLDER")
    check_distillation(config)
    bounds = {"add_bos": data.add_bos, "add_eos": data.add_eos}
    tokenizer = TokenizerWrapper.load(data.tokenizer, **bounds)
    own = TokenizerWrapper.load(find_folder(d.teacher), **bounds)
    if own.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"the teacher {d.teacher} has another tokenizer ({own.fingerprint}) than the data "
            f"({tokenizer.fingerprint}); take data.tokenizer={d.teacher}"
        )
    return write_cache(
        load_torch_teacher(d.teacher, d.dtype), data, d.cache, make_mesh(config.mesh),
        tokenizer=tokenizer, entries=d.entries, temperature=d.temperature, codec=d.codec,
        sampled=d.sampled, batch_size=d.batch_size, shard_entries=d.shard_entries,
        progress=progress,
    )  # fmt: skip


def main(overrides: Sequence[str]) -> int:
    """Compose, write the cache; 0 done, 2 the user's mistake."""
    try:
        with CacheProgress(Console()) as progress:
            cached = make_cache(compose_run(with_defaults(list(overrides))), progress)
    except UserError as error:
        print(f"dh_torch_bridge.teacher: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    entries = sum(x["entries"] for x in cached.manifest["shards"])
    print(f"{cached.folder}: {len(cached):,} pieces, {entries:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
