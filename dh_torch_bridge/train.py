"""The reference consumer: a plain torch loop on the library's rows, on one rank or many.

    torchrun --nproc-per-node 2 -m dh_torch_bridge.train data=demo distributed=fsdp2

It writes checkpoints, and goes on from the newest intact one with ``resume=true`` or when torchrun
restarts it (``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts 3 ...``; without the
variable a restart after a killed rank often fails in torch's rendezvous).

Read it as an example. With the same seed and batch size it sees the rows of `dh train`, in the
same order, whatever the number of ranks (for streamed sources each rank has its own documents).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from dh_jax.compose import compose
from dh_jax.config import ModelConfig, TorchRunConfig, TrainingConfig, validate_model
from dh_jax.data.seeding import derive
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, DataError, UserError
from dh_jax.influence.optimizer import Reweighting
from dh_jax.models.pretrained import find_folder
from dh_jax.progress import TrainProgress
from dh_jax.runconfig import check_training, refuse_other_config, save_config
from dh_jax.runlog import RunLog
from dh_torch_bridge.data import TorchBatch, TorchLoader, get_loader
from dh_torch_bridge.distributed.checkpoint import Checkpoints
from dh_torch_bridge.distributed.mesh import data_shard, make_mesh, pick_device, sum_over_data
from dh_torch_bridge.distributed.parallelize import (
    Parallel,
    check_batch,
    clip,
    forward_backward,
    parallelize,
)
from dh_torch_bridge.runstate import restore_run, save_run
from dh_torch_bridge.steering import load_steering_state, steer, steering_state

PATIENCE = 5.0  # seconds that a rank leaves a mistake to rank 0 to tell

# Of a model config: what a plain Llama has not.
JAX_ONLY = (
    "qkv_bias", "qk_norm", "rope_scaling", "linear", "lora", "remat", "attention", "precision",
)  # fmt: skip


def build_llama(config: ModelConfig, vocab_size: int) -> LlamaForCausalLM:
    """Hugging Face's Llama in the shape of a model config, drawn from torch's global seed.

    Raises:
        ConfigError: the config describes no decoder, or asks for what only the JAX side has.
    """
    validate_model(config)
    plain = ModelConfig()
    for key in JAX_ONLY:
        if (value := getattr(config, key)) != getattr(plain, key):
            raise ConfigError(
                f"model.{key} is {value!r}; this trainer makes a plain Llama, so leave it out "
                "(`dh train` knows it)"
            )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_epsilon,
            initializer_range=config.init_scale,
            tie_word_embeddings=config.tied,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            # Takes the boolean mask of `document_mask`. (Among the config's untyped extras.)
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )
    )


def build_model(config: ModelConfig, vocab_size: int, *, empty: bool = False) -> PreTrainedModel:
    """The model of a config: Hugging Face's own from a folder, or a plain Llama made new.

    Args:
        config: its shape, or the folder.
        vocab_size: ids of the data's tokenizer.
        empty: without numbers, on the meta device, for ranks that are given them.

    Raises:
        ConfigError: the folder is none, its vocabulary is below the tokenizer's, or as
            `build_llama`.
    """
    if config.pretrained is None:
        with torch.device("meta" if empty else "cpu"):
            return build_llama(config, vocab_size)
    folder = find_folder(config.pretrained)
    described = AutoConfig.from_pretrained(folder, use_cache=False)
    if described.vocab_size < vocab_size:
        raise ConfigError(
            f"{folder} has {described.vocab_size} ids and the data's tokenizer {vocab_size}; "
            f"set data.tokenizer to that of the model"
        )
    if empty:  # `from_pretrained` refuses the meta device
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                described, dtype=torch.float32, attn_implementation="sdpa"
            )
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=described, dtype=torch.float32, attn_implementation="sdpa"
        )
    return cast(PreTrainedModel, model)


def make_optimizer(
    model: nn.Module | Parallel, training: TrainingConfig
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW as in `dh train`: warm-up, cosine, and weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.b1, training.b2),
        weight_decay=training.weight_decay,
    )

    def share_of_peak(step: int) -> float:
        if step < training.warmup:
            return step / training.warmup
        done = (step - training.warmup) / max(training.steps - training.warmup, 1)
        final = training.final_learning_rate
        return final + (1 - final) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)


def train(run: TorchRunConfig) -> None:
    """Train to the end; the first rank writes ``metrics.jsonl`` and ``timing.jsonl``.

    Raises:
        ConfigError: the config is wrong, or ``out`` already holds a run.
        DataError: the data cannot be read, or the loss is no longer finite.
    """
    training, data, folder = run.training, run.data, Path(run.out)
    check_training(training)
    if (folder / "config.yaml").exists():
        if not (run.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))):
            raise ConfigError(f"{folder} already holds a run; add resume=true or another out=")
        refuse_other_config(folder, run)
    tokenizer = TokenizerWrapper.load(data.tokenizer, add_bos=data.add_bos, add_eos=data.add_eos)
    vocab_size = run.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size {vocab_size} is below the tokenizer's {tokenizer.vocab_size}; "
            "set model.vocab_size=null to take the tokenizer's"
        )
    mesh = make_mesh(run.distributed)
    rank, ranks = data_shard(mesh)
    device = pick_device(run.distributed)
    check_batch(run.distributed, mesh, training.batch_size // ranks, data.max_length)
    torch.manual_seed(training.seed)
    first = mesh is None or dist.get_rank() == 0
    built = partial(build_model, run.model, vocab_size)
    whole = built(empty=not first)  # the others are given rank 0's numbers
    model = parallelize(
        whole, run.distributed, mesh,
        autocast=torch.bfloat16 if run.model.dtype == "bfloat16" else None,
    )  # fmt: skip
    optimizer, schedule = make_optimizer(model, training)
    log: RunLog | None = None
    done = tokens = 0
    with ExitStack() as closing:
        checkpoints = closing.enter_context(
            Checkpoints(folder / "checkpoints", keep=training.keep, keep_every=training.keep_every)
        )
        loader = closing.enter_context(
            get_loader(
                data, tokenizer=tokenizer, batch_size=training.batch_size,
                seed=derive(training.seed, "train"), shard=(rank, ranks),
            )
        )  # fmt: skip

        def note(move: Reweighting) -> None:
            if log:
                log.write(move_record(move, loader))

        steered, samplers = steer(optimizer, run, model, loader, tokenizer, closing, note)
        if restored := restore_run(checkpoints, model, optimizer, loader, schedule):
            done, tokens = restored.step, restored.host["tokens"]
            load_steering_state(steered, samplers, restored.host["steering"])
        if first:
            save_config(folder, run)
            console = Console()
            if done:
                console.print(f"goes on behind step {done}")
            progress = closing.enter_context(TrainProgress(training.steps, console, "training"))
            log = RunLog(folder, step=done or None, listeners=(progress,))
            closing.callback(log.close)
        for step in range(done + 1, training.steps + 1):
            batch = {name: tensor.to(device) for name, tensor in next(loader).items()}
            tokens += int(sum_over_data((batch["segment_ids"] > 0).sum(), mesh))
            rate, weights = schedule.get_last_lr()[0], loader.weights
            loss, norm = update(model, batch, steered, training.clip_norm)
            schedule.step()
            if not math.isfinite(loss):
                raise DataError(f"the loss is {loss} at step {step}; lower the learning rate")
            if log and (step % training.log_interval == 0 or step == training.steps):
                log.write({
                    "kind": "train", "step": step, "loss": loss, "grad_norm": norm,
                    "learning_rate": rate, "tokens": tokens, "weights": weights,
                })  # fmt: skip
            if step % training.checkpoint_interval == 0 or step == training.steps:
                save_run(
                    checkpoints, step, model, optimizer, loader, schedule,
                    tokens=tokens, steering=steering_state(steered, samplers),
                )  # fmt: skip
    if first:
        Console(soft_wrap=True).print(
            f"finished at step {training.steps}; {folder} holds metrics.jsonl and checkpoints"
        )


def move_record(move: Reweighting, loader: TorchLoader) -> dict[str, Any]:
    """A move of the weights for the log, as `dh train` writes it."""
    record: dict[str, Any] = {"kind": "reweight", "step": move.step, "weights": loader.weights}
    for name, values in (("influence", move.influence_M), ("alignment", move.alignment_M)):
        if values is not None:
            record[name] = dict(zip(loader.names, map(float, values), strict=True))
    return record


def update(
    model: Parallel, batch: TorchBatch, optimizer: torch.optim.Optimizer, max_norm: float
) -> tuple[float, float]:
    """One step on this rank's rows: the global batch's loss, and its gradient's norm."""
    loss = forward_backward(model, batch)
    norm = clip(model, max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss), float(norm)


def main(overrides: Sequence[str]) -> int:
    """Compose, train; 0 done, 2 the user's mistake (one line on standard error)."""
    try:
        train(compose("torch_train", TorchRunConfig, overrides))
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank:
            # What is wrong on every rank is said by rank 0, and torchrun ends the others as soon
            # as it has left. Who is still here then is the only one to know.
            time.sleep(PATIENCE)
        said = f" (rank {rank})" if "RANK" in os.environ else ""
        print(f"dh_torch_bridge.train{said}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == 0 and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads now and then abort an ordinary exit
