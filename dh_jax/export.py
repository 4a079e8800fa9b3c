"""What a run has trained, as a folder for the torch world: what `dh export` writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dh_jax.completion import open_model
from dh_jax.config import LoraConfig
from dh_jax.errors import ConfigError
from dh_jax.models import lora
from dh_jax.models.pretrained import save_pretrained


def export_run(
    run: str | Path, out: str | Path, *, dtype: str = "float32", adapters: bool = False
) -> Path:
    """Write the newest checkpoint of a run as a Hugging Face folder.

    The checkpoint may be of any mesh and number of processes; it is gathered on this one.

    Args:
        run: folder of a run of `dh train`.
        out: must not exist yet, or be empty. It appears when everything is written.
        dtype: of the weights on disk: float32, bfloat16 or float16.
        adapters: write the adapters alone, in PEFT's format, in place of the merged model.

    Raises:
        ConfigError: there is no such run, ``out`` is occupied, the run has no adapters, or
            transformers knows no such model (ternary layers).
        StateError: the checkpoint is damaged, or there is none yet.
    """
    run, out = Path(run), Path(out)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"no run at {run}: no config.yaml there; give the out= of a `dh train`")
    model = open_model(run)
    base, trained = lora.split(model.params)
    low_rank = model.config.lora
    if not adapters:
        params = lora.merge(base, trained, low_rank) if low_rank.rank else base
        plain = dataclasses.replace(model.config, lora=LoraConfig())
        return save_pretrained(out, plain, params, model.tokenizer, dtype=dtype)
    if not low_rank.rank:
        raise ConfigError(f"{run} trained a whole model, without adapters; leave out --adapters")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} already exists; choose another folder, or remove it")
    return lora.save_adapters(out, trained, low_rank, base=model.config.pretrained)
