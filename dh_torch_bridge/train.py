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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from dh_jax.compose import compose
from dh_jax.config import ModelConfig, TorchRunConfig, TrainingConfig, validate_model
from dh_jax.data.seeding import derive
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, DataError, UserError
from dh_jax.runconfig import check_training, refuse_other_config, save_config
from dh_jax.runlog import RunLog
from dh_torch_bridge.data import IGNORED, TorchBatch, document_mask, get_loader
from dh_torch_bridge.distributed.checkpoint import Checkpoints
from dh_torch_bridge.distributed.fsdp2 import distribute
from dh_torch_bridge.distributed.mesh import data_shard, make_mesh, pick_device, sum_over_data
from dh_torch_bridge.runstate import restore_run, save_run

# Of a model config: what a plain Llama has not.
JAX_ONLY = ("pretrained", "qkv_bias", "qk_norm", "rope_scaling", "linear", "lora")


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


def token_losses(model: nn.Module, batch: TorchBatch) -> torch.Tensor:
    """Cross-entropy ``[B, T]`` in float32 nats, 0 where nothing is learnt."""
    logits_BTV = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=document_mask(batch["segment_ids"]),
    ).logits
    return cross_entropy(
        logits_BTV.float().transpose(1, 2),
        batch["shift_labels"],
        ignore_index=IGNORED,
        reduction="none",
    )


def make_optimizer(
    model: nn.Module, training: TrainingConfig
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
    torch.manual_seed(training.seed)
    model = distribute(build_llama(run.model, vocab_size), run.distributed, mesh)
    optimizer, schedule = make_optimizer(model, training)
    log, first, tokens = None, 0, 0
    with Checkpoints(
        folder / "checkpoints", keep=training.keep, keep_every=training.keep_every
    ) as checkpoints, get_loader(
        data, tokenizer=tokenizer, batch_size=training.batch_size,
        seed=derive(training.seed, "train"), shard=(rank, ranks),
    ) as loader:  # fmt: skip
        if restored := restore_run(checkpoints, model, optimizer, loader, schedule):
            first, tokens = restored.step, restored.host["tokens"]
        if rank == 0:
            save_config(folder, run)
            log = RunLog(folder, step=first or None)
        for step in range(first + 1, training.steps + 1):
            batch = {name: tensor.to(device) for name, tensor in next(loader).items()}
            learnt = (batch["shift_labels"] != IGNORED).sum()
            counts = sum_over_data(torch.stack([learnt, (batch["segment_ids"] > 0).sum()]), mesh)
            with torch.autocast(device.type, torch.bfloat16, run.model.dtype == "bfloat16"):
                loss_BT = token_losses(model, batch)
            loss = loss_BT.sum() / counts[0]  # of the global batch: no rank's rows weigh more
            (loss * ranks).backward()  # gradients are averaged over the ranks
            norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            mean = float(sum_over_data(loss.detach(), mesh))
            if not math.isfinite(mean):
                raise DataError(f"the loss is {mean} at step {step}; lower the learning rate")
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            tokens += int(counts[1])
            if log and (step % training.log_interval == 0 or step == training.steps):
                log.write({
                    "kind": "train", "step": step, "loss": mean, "grad_norm": float(norm),
                    "learning_rate": rate, "tokens": tokens, "weights": loader.weights,
                })  # fmt: skip
            if step % training.checkpoint_interval == 0 or step == training.steps:
                save_run(checkpoints, step, model, optimizer, loader, schedule, tokens=tokens)
    if log:
        log.close()


def main(overrides: Sequence[str]) -> int:
    """Compose, train; 0 done, 2 the user's mistake (one line on standard error)."""
    try:
        train(compose("torch_train", TorchRunConfig, overrides))
    except UserError as error:
        # Every rank says so: torchrun ends the others as soon as one has left, heard or not.
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"dh_torch_bridge.train{rank}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == 0 and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads now and then abort an ordinary exit
