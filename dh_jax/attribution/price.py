"""What an influence run will cost, before it is started: passes, time, memory.

Shapes: K queries.

Time counts forward passes over documents at the rate of a matrix product measured just now:
between all of it, which large models reach, and two fifths. Memory takes XLA's own account of
the compiled scoring step and adds what is kept beside it. No document is read and no weight is
loaded.
"""

from __future__ import annotations

import resource
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dh_jax.attribution.config import AttributionConfig, check
from dh_jax.attribution.setup import FITTED, make_estimator, tapped_objective, with_run
from dh_jax.batch import Batch
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.dryrun import step_bytes
from dh_jax.errors import ConfigError
from dh_jax.influence.estimator import Estimator
from dh_jax.influence.objective import Objective
from dh_jax.models import decoder
from dh_jax.pricing import MODEL_SHARE_OF_PEAK, matmul_rate

GIB = 2**30
# Forward passes over each fitted document; a backward pass is two. Solvers: one product a step.
FIT_PASSES = {"ekfac": 8, "datainf": 3, "woodbury": 3, "projection": 3, "newton_step": 3}
PRODUCT_PASSES = 5  # of a curvature product with one vector
HUTCHINSON = 16  # products that set the solvers' damping


class Price(NamedTuple):
    """An estimate; bytes, and seconds at the full rate of a matrix product.

    ``slowest`` times the seconds is what small models take, beside what is compiled.
    """

    parameters: int
    coverage: float
    queries: int  # K
    fit_seconds: float
    query_seconds: float
    score_seconds: float
    compile_seconds: float  # of all programs, from the time that the scoring step took just now
    bytes: int  # at the peak, of the process
    query_bytes: int  # of all prepared queries

    slowest: float = 1 / MODEL_SHARE_OF_PEAK

    @property
    def seconds(self) -> float:
        return self.fit_seconds + self.query_seconds + self.score_seconds


def price_influence(config: AttributionConfig) -> Price:
    """Price a run without starting it; compiles the scoring step for abstract arguments.

    Raises:
        ConfigError, DataError: what the run would raise at its start.
    """
    config = check(with_run(config))
    data, chosen = config.data, config.estimator
    tokenizer = TokenizerWrapper.load(data.tokenizer, add_bos=data.add_bos, add_eos=data.add_eos)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    params = decoder.abstract_params(config.model, vocab_size)
    graph = decoder.abstract_graph(config.model, vocab_size)
    objective = Objective(decoder.loss_fn(graph), decoder.logits_fn(graph))
    if config.model.lora.rank:
        raise ConfigError("a dry run of adapters is not priced; start the run itself")
    if chosen.taps and config.model.linear == "dense":
        objective = tapped_objective(objective, config.model, graph, params)
    estimator = make_estimator(chosen, objective, data.packing.max_segments)
    count = _queries(config)
    state, prepared = _abstract(config, estimator.door, params, count)
    batch = _abstract_batch(config)
    temporary = 0
    started = time.perf_counter()
    if state is not None:
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = jax.jit(estimator.score).lower(params, state, prepared, batch, key)
        temporary = step_bytes(step.compile())
    compiling = (time.perf_counter() - started) * _programs(config, estimator)
    query_bytes, weights = _bytes(prepared), _bytes(params)
    # Two copies of the queries more while they are joined and finished, before any is scored.
    peak = max(temporary, weights + 3 * query_bytes) + _fitted_bytes(config, estimator.door, params)
    forward = decoder.flops_per_token(config.model, vocab_size, data.max_length) / 3
    document = forward * data.max_length / matmul_rate()  # seconds, of a pass over a full row
    asked = config.queries
    texts = len(asked.texts)
    probes = len(asked.probes) or (0 if texts else len(data.probes or data.sources))
    query_documents = probes * asked.documents + texts
    solver = chosen.name in ("conjugate_gradient", "low_rank", "lissa")
    fitted = chosen.fit_documents if chosen.name in FITTED else 0
    steps = int(chosen.arguments.get("steps", chosen.arguments.get("rank", 20)))
    products = PRODUCT_PASSES * fitted * document
    once = HUTCHINSON * products if solver else FIT_PASSES.get(chosen.name, 0) * fitted * document
    own = 6 if config.self_influence else 0
    passes = 3 if objective.tapped is not None or chosen.name != "gradient_dot" else 1 + 2 * count
    return Price(
        decoder.count_parameters(params),
        estimator.coverage(params),
        count,
        once,
        3 * query_documents * document + (steps * count * products if solver else 0),
        (passes + own) * config.documents * document,
        compiling,
        peak + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        query_bytes,
    )


def refuse_too_large(price: Price, limit: float) -> None:
    """Refuse a run that would take more memory than it may.

    Raises:
        ConfigError: names the estimate, the limit and the cures.
    """
    if price.bytes > limit * GIB:
        raise ConfigError(
            f"the run would take about {price.bytes / GIB:.1f} GiB, above memory_limit {limit:g}; "
            f"{price.queries} queries alone take {price.query_bytes / GIB:.1f} GiB: ask fewer, "
            "set queries.average=true or queries.low_rank, lower estimator.chunk, or select "
            "fewer estimator.parameters"
        )


def _programs(config: AttributionConfig, estimator: Estimator) -> int:
    """Programs that take about as long to compile as the scoring step: those of the queries, of
    the fit, of self-influence and of the tokens that a report tints."""
    tinted = config.tinted > 0 and estimator.by_token is not None
    return 2 + (config.estimator.name in FITTED) + config.self_influence + tinted


def _queries(config: AttributionConfig) -> int:
    asked, data = config.queries, config.data
    probes = len(asked.probes) or (0 if asked.texts else len(data.probes or data.sources))
    return probes * (1 if asked.average else asked.documents) + len(asked.texts)


def _abstract(config: AttributionConfig, door: Any, params: Any, count: int) -> tuple[Any, Any]:
    """State and prepared queries as shapes; no state where the scoring step cannot be priced."""
    float32 = jnp.float32
    if config.estimator.name == "projection":
        size = int(config.estimator.arguments.get("size", 2048))
        return (), jax.ShapeDtypeStruct((count, size), float32)
    if door is None:
        return None, ()
    blocks = door.blocks(params)
    return (), {p: jax.ShapeDtypeStruct((count, *b.shape), float32) for p, b in blocks.items()}


def _abstract_batch(config: AttributionConfig) -> Batch:
    shape = config.batch_size, config.data.max_length
    ints = jax.ShapeDtypeStruct(shape, jnp.int32)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_)
    return Batch(ints, ints, mask, ints, ints, jax.ShapeDtypeStruct(shape[:1], jnp.int32))


def _fitted_bytes(config: AttributionConfig, door: Any, params: Any) -> int:
    """Of the fitted state, and of what building it holds beside it."""
    name = config.estimator.name
    if name == "newton_step" or door is None:
        return 0
    blocks = door.blocks(params)
    covered = sum(b.size for b in blocks.values())
    if name in ("datainf", "woodbury"):
        return 4 * config.estimator.fit_documents * covered
    if name == "ekfac":
        kernels = [b.shape for path, b in blocks.items() if path in door.kernels]
        squares = [
            (shape[0] if len(shape) > 2 else 1) * (shape[-2] ** 2 + shape[-1] ** 2)
            for shape in kernels
        ]
        return 4 * 2 * (sum(squares) + covered)
    return 0


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
