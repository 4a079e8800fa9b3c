"""The training step before it runs: for abstract arguments, on any mesh, nothing allocated.

What XLA says of the compiled program (memory of a device, what goes over the network) is known
without a device of that kind; the mesh may even be larger than the machine::

    XLA_FLAGS=--xla_force_host_platform_device_count=64 dh train mesh.fsdp=64 ... --dry-run
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dh_jax.batch import Batch
from dh_jax.config import ModelConfig, TrainingConfig
from dh_jax.distributed.mesh import batch_sharding
from dh_jax.distributed.placement import AnyMesh, check_heads, on_mesh, placed_shapes
from dh_jax.influence.optimizer import InfluenceAwareOptimizer
from dh_jax.mixing.policy import uniform
from dh_jax.models.start import abstract_start
from dh_jax.step import make_optimizer, make_step

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8, "u64": 8}  # else 4


class AbstractStep(NamedTuple):
    """A jitted step and the shapes it is for: ``step.lower(*arguments)``, or `jax.export`."""

    step: Any
    arguments: tuple[Any, ...]  # loss, parameters, optimizer state, batch, key


class Traffic(NamedTuple):
    """Collectives of one kind in one run of a program."""

    times: int
    bytes: int  # of their results, on one device


def abstract_step(
    model: ModelConfig,
    training: TrainingConfig,
    mesh: AnyMesh,
    *,
    vocab_size: int,
    row_length: int,
    sources: int = 1,
) -> AbstractStep:
    """The step that `dh_jax.train.train` would run, for abstract arguments.

    Args:
        model: as configured.
        training: its batch size is that of the global batch.
        mesh: real, or a `jax.sharding.AbstractMesh` (then for `jax.export` alone).
        vocab_size: of the embedding.
        row_length: T.
        sources: of the mixture.

    Raises:
        ConfigError: the mesh does not fit the model's heads.
    """
    check_heads(model, mesh)
    names = [str(i) for i in range(sources)]
    optimizer = InfluenceAwareOptimizer(
        make_optimizer(training), uniform(), source_names=names, weights=[1 / sources] * sources
    )
    params, loss_fn, *_ = abstract_start(model, vocab_size, mesh)
    state = placed_shapes(jax.eval_shape(optimizer.init, params), mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    step = make_step(on_mesh(loss_fn, mesh), optimizer, sources, (*shardings, whole))

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        rows = batch_sharding(mesh, 1 + len(shape))
        return jax.ShapeDtypeStruct((training.batch_size, *shape), dtype, sharding=rows)

    ints = array(jnp.int32, row_length)
    batch = Batch(ints, ints, array(jnp.bool_, row_length), ints, ints, array(jnp.int32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    return AbstractStep(step.func, (*step.args, params, state, batch, key))


def step_bytes(compiled: Any) -> int:
    """Memory of a compiled program on one device by XLA's own account: arguments, results (those
    in the arguments' places count once) and what lies between."""
    memory = compiled.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def collectives(compiled: Any) -> dict[str, Traffic]:
    """What a compiled program sends over the network, by kind, in one run of it.

    Read from XLA's own text. What stands in the body of a loop (the layers of a scanned model)
    counts as often as XLA says that the loop runs.
    """
    times: dict[str, int] = {}
    texts = _computations(compiled.as_text())
    waiting = [(name, 1) for name, (entry, _) in texts.items() if entry]
    while waiting:
        name, count = waiting.pop()
        times[name] = times.get(name, 0) + count
        for line in texts[name][1]:
            trips = _TRIPS.search(line) if " while(" in line else None
            for called in _CALLED.findall(line):
                for inner in re.findall(r"%?([\w.\-]+)", called):
                    if inner in texts:
                        waiting.append((inner, count * (int(trips[1]) if trips else 1)))
    found = dict.fromkeys(COLLECTIVES, Traffic(0, 0))
    for name, count in times.items():
        for line in texts[name][1]:
            if match := _COLLECTIVE.search(line):
                kind = match[2]
                so_far = found[kind]
                size = _bytes(match[1])
                found[kind] = Traffic(so_far.times + count, so_far.bytes + count * size)
    return {kind: traffic for kind, traffic in found.items() if traffic.times}


_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")


def _computations(text: str) -> dict[str, tuple[bool, list[str]]]:
    """Name -> (is it where the program begins, its lines)."""
    found: dict[str, tuple[bool, list[str]]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = []
            found[head[2]] = bool(head[1]), lines
        else:
            lines.append(line)
    return found


def _bytes(shapes: str) -> int:
    """Bytes of ``f32[8,2048]{1,0}`` or of a tuple of such."""
    return sum(
        BYTES.get(dtype, 4) * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)
    )
