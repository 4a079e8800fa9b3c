"""What a run will cost, before it is started: tokens, epochs, memory, time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.config import RunConfig, weights_of
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distributed.mesh import make_mesh
from dh_jax.dryrun import abstract_step, step_bytes
from dh_jax.functions import as_argument
from dh_jax.mixing.registry import make_policy
from dh_jax.models import decoder
from dh_jax.models.start import abstract_start
from dh_jax.runconfig import source_tokens

MODEL_SHARE_OF_PEAK = 0.4  # of a large matrix product's rate that a whole step reaches on a CPU


class SourcePrice(NamedTuple):
    """What a run takes from one source if the weights stay as they start."""

    weight: float
    tokens: int  # that the run will take
    available: int | None  # tokens of its training split; None when it is streamed

    @property
    def epochs(self) -> float | None:
        return self.tokens / self.available if self.available else None


class Price(NamedTuple):
    """An estimate; bytes and seconds."""

    sources: dict[str, SourcePrice]
    tokens: int
    parameters: int  # that are trained
    frozen: int  # beside them: those under adapters
    step_bytes: int  # arguments, outputs and temporaries of the compiled step, per device
    flops_per_step: float
    seconds: float  # training alone, at the rate of a matrix product measured just now


def price_run(config: RunConfig) -> Price:
    """Price a run without starting it. Compiles the step for abstract arguments, runs nothing
    of it, and reads no document.

    Raises:
        ConfigError, DataError, StateError: what `dh_jax.train.train` would raise at its start.
    """
    data, training = config.data, config.training
    tokenizer = TokenizerWrapper.load(data.tokenizer, add_bos=data.add_bos, add_eos=data.add_eos)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    tokens = training.steps * training.batch_size * data.max_length
    configured = weights_of(data.sources)
    sizes = source_tokens(data, tokenizer)
    policy = make_policy(config.mixing, list(configured), sizes)
    start_M = policy.start(jnp.array(list(configured.values())))
    weights = dict(zip(configured, start_M.tolist(), strict=True))
    available: Mapping[str, int | None] = sizes or dict.fromkeys(weights)
    flops = decoder.flops_per_token(config.model, vocab_size, data.max_length)
    model = abstract_start(config.model, vocab_size, make_mesh(config.mesh))
    if config.model.lora.rank:
        flops *= 2 / 3  # no gradients of what is frozen
    flops_per_step = flops * training.batch_size * data.max_length
    return Price(
        {n: SourcePrice(w, round(w * tokens), available[n]) for n, w in weights.items()},
        tokens,
        decoder.count_parameters(model.params),
        decoder.count_parameters(as_argument(model.loss_fn)),
        _step_bytes(config, vocab_size),
        flops_per_step,
        training.steps * flops_per_step / (MODEL_SHARE_OF_PEAK * matmul_rate()),
    )


def _step_bytes(config: RunConfig, vocab_size: int) -> int:
    """Memory of the compiled step on each device of the run's mesh."""
    step, arguments = abstract_step(
        config.model,
        config.training,
        make_mesh(config.mesh),
        vocab_size=vocab_size,
        row_length=config.data.max_length,
        sources=len(config.data.sources),
    )
    return step_bytes(step.lower(*arguments).compile())


def matmul_rate(size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of a float32 matrix product on the default device."""
    square = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        product(square, square).block_until_ready()
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - start)
