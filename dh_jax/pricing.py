"""What a run will cost, before it is started: tokens, epochs, memory, time."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.batch import Batch
from dh_jax.config import RunConfig, weights_of
from dh_jax.data.prepare import open_prepared
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.functions import Params
from dh_jax.mixing.registry import make_policy
from dh_jax.models import decoder
from dh_jax.train import make_optimizer, make_step

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
    parameters: int
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
    start_M = make_policy(config.mixing).start(jnp.array(list(configured.values())))
    weights = dict(zip(configured, start_M.tolist(), strict=True))
    available: dict[str, int | None] = dict.fromkeys(weights)
    if data.store is not None:
        store = open_prepared(data, tokenizer)
        available = {name: store.total(name, "train", "tokens") for name in weights}
    flops = decoder.flops_per_token(config.model, vocab_size, data.max_length)
    flops_per_step = flops * training.batch_size * data.max_length
    params = decoder.abstract_params(config.model, vocab_size)
    return Price(
        {n: SourcePrice(w, round(w * tokens), available[n]) for n, w in weights.items()},
        tokens,
        decoder.count_parameters(params),
        _step_bytes(config, vocab_size, params),
        flops_per_step,
        training.steps * flops_per_step / (MODEL_SHARE_OF_PEAK * _matmul_rate()),
    )


def _step_bytes(config: RunConfig, vocab_size: int, params: Params) -> int:
    """Memory of the compiled step by XLA's own account."""
    optimizer = make_optimizer(config.training)
    graph = decoder.abstract_graph(config.model, vocab_size)
    shape = (config.training.batch_size, config.data.max_length)
    ints = jax.ShapeDtypeStruct(shape, jnp.int32)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_)
    batch = Batch(ints, ints, mask, ints, ints, jax.ShapeDtypeStruct(shape[:1], jnp.int32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(optimizer.init, params)
    step: Any = make_step(decoder.loss_fn(graph), optimizer, len(config.data.sources))
    memory = step.func.lower(*step.args, params, state, batch, key).compile().memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _matmul_rate(size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of a float32 matrix product on the default device."""
    square = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        product(square, square).block_until_ready()
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - start)
