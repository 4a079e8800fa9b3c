"""Hugging Face folders from and for torch runs; by them weights go to `dh train` and come back.

    python -m dh_torch_bridge.pretrained RUN FOLDER

writes the newest intact checkpoint of a run of `dh_torch_bridge.train`, of any layout, from one
process. `dh export` writes the same kind of folder from a JAX run, and ``model.pretrained`` of
both trainers reads one.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from dh_jax.config import TorchRunConfig, typed
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distributed.integrity import find_damage
from dh_jax.errors import ConfigError, DataError, StateError, UserError
from dh_torch_bridge.distributed.checkpoint import written_steps
from dh_torch_bridge.distributed.named import named_tensors, refuse_other_tensors
from dh_torch_bridge.train import build_model


def export_run(run: str | Path, out: str | Path, *, dtype: str = "float32") -> int:
    """Write a run's newest intact checkpoint as a folder that transformers reads.

    Args:
        run: folder of a run of `dh_torch_bridge.train`, of any number of ranks.
        out: must not exist yet. It appears when everything is written.
        dtype: of the weights on disk.

    Returns:
        The checkpoint's step.

    Raises:
        ConfigError: there is no such run, or ``out`` is there.
        StateError: there is no intact checkpoint.
    """
    run, out = Path(run), Path(out)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"no run at {run}: no config.yaml there")
    if out.exists():
        raise ConfigError(f"{out} is there already; choose another folder")
    config = typed(TorchRunConfig, OmegaConf.load(run / "config.yaml"))
    data = config.data
    tokenizer = TokenizerWrapper.load(data.tokenizer, add_bos=data.add_bos, add_eos=data.add_eos)
    model = build_model(config.model, config.model.vocab_size or tokenizer.vocab_size)
    step = read_model(run / "checkpoints", model)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    model.to(getattr(torch, dtype)).save_pretrained(partial)
    tokenizer.save(partial)
    partial.rename(out)
    return step


def read_model(folder: str | Path, model: nn.Module) -> int:
    """Fill a whole model from the newest intact checkpoint in a folder; returns its step.

    Raises:
        StateError: none is intact, or it is of another model.
    """
    folder, damage = Path(folder), []
    for step in reversed(written_steps(folder)):
        if found := find_damage(folder / str(step)):
            damage.append(f"step {step}: {found[0]}")
            continue
        tensors = named_tensors(model)
        there = dcp.FileSystemReader(folder / str(step)).read_metadata().state_dict_metadata
        refuse_other_tensors(folder / str(step), tensors, there, whole=True)
        dcp.load(tensors, checkpoint_id=folder / str(step), no_dist=True)
        return step
    raise StateError(f"no intact checkpoint in {folder} ({'; '.join(damage) or 'none at all'})")


def read_weights(folder: str | Path, model: nn.Module) -> None:
    """Fill a whole model from the safetensors of a Hugging Face folder (of `dh export`, say).

    Raises:
        DataError: there are none.
        StateError: a tensor is missing, left over, or of another shape.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder}: no safetensors there")
    read = {name: x for file in files for name, x in load_file(file).items()}
    tensors = named_tensors(model)
    tied = set(model.state_dict()) - {name.removeprefix("model.") for name in tensors}
    with torch.no_grad():
        for full, tensor in tensors.items():
            name = full.removeprefix("model.")
            if name not in read or read[name].shape != tensor.shape:
                said = tuple(read[name].shape) if name in read else "missing"
                raise StateError(f"{folder}: {name} is {said}, the model's {tuple(tensor.shape)}")
            tensor.copy_(read.pop(name))
    if left := set(read) - tied:
        raise StateError(f"{folder}: {sorted(left)[0]} is no tensor of this model")


def main(arguments: Sequence[str]) -> int:
    """Export; 0 done, 2 the user's mistake."""
    if len(arguments) != 2:
        print("usage: python -m dh_torch_bridge.pretrained RUN FOLDER", file=sys.stderr)
        return 2
    try:
        step = export_run(*arguments)
    except UserError as error:
        print(f"dh_torch_bridge.pretrained: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"step {step} of {arguments[0]} is in {arguments[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
