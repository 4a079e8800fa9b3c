"""A run's teacher, live or cached, from its config; and making a cache of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dh_jax.batch import Batch
from dh_jax.config import DistillationConfig, ModelConfig, RunConfig
from dh_jax.data.loader import Loader
from dh_jax.data.prepare import open_prepared
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distillation.cached import CachedTeacher, open_cache
from dh_jax.distillation.caching import Progress, write_cache
from dh_jax.distillation.divergences import Divergence, check_divergence
from dh_jax.distillation.inside import Hidden, Inside, Relations, check_inside, states_of
from dh_jax.distillation.losses import Kind, Mix
from dh_jax.distillation.objective import Objective, make_objective
from dh_jax.distillation.sparse import check_estimator, check_temperature
from dh_jax.distillation.teacher import TeacherWrapper, fingerprint_of, wrap_teacher
from dh_jax.distributed.mesh import make_mesh, token_ways
from dh_jax.distributed.placement import on_mesh, param_shardings
from dh_jax.errors import ConfigError
from dh_jax.functions import HiddenFn, LossFn, Params, StatesFn
from dh_jax.models import decoder
from dh_jax.models.pretrained import find_folder, load_pretrained
from dh_jax.models.start import Started
from dh_jax.models.states import states_fn


class Distilled(NamedTuple):
    """A run's objective and the schedule of its parts."""

    objective: Objective
    mix_at: Callable[[int], Mix]

    def loss_at(self, step: int) -> LossFn:
        """The loss of a step, from 1; all share one compiled program."""
        return self.objective.loss_fn(self.mix_at(step))

    def record(self, step: int, params: Params, batch: Batch) -> dict[str, Any]:
        """What the log says of student and teacher on a batch."""
        mix = self.mix_at(step)
        found = jax.device_get(self.objective.measure(params, batch, mix))._asdict()
        weight, _, temperature = mix
        return {"kind": "distillation", "step": step} | {
            "alpha": weight,
            "temperature": 1.0 if temperature is None else temperature,
            **{name: float(value) for name, value in found.items()},
        }


def check_distillation(config: RunConfig) -> None:
    """Refuse keys that make no loss.

    Raises:
        ConfigError: names the key, its value and the cure.
    """
    d = config.distillation
    if not _wanted(d):
        return
    kind = kind_of(d)
    check_divergence(kind.divergence)
    if d.cache is not None:
        check_estimator(d.estimator, kind.divergence)
    for label, value, least, most in (
        ("alpha", d.alpha, 0, 1), ("alpha_end", _or(d.alpha_end, d.alpha), 0, 1),
        ("chunk", d.chunk, 1, None), ("batch_size", d.batch_size, 1, None),
        ("shard_entries", d.shard_entries, 1, None),
    ):  # fmt: skip
        if value < least or (most is not None and value > most):
            limits = f"from {least} to {most}" if most is not None else f"at least {least}"
            raise ConfigError(f"distillation.{label} is {value}; it must be {limits}")
    for label, value in (
        ("temperature", d.temperature),
        ("temperature_end", _or(d.temperature_end, d.temperature)),
    ):
        if not value > 0:
            raise ConfigError(f"distillation.{label} is {value}; it must be above 0")
    for label, term in (("hidden", d.hidden), ("relations", d.relations)):
        if term.weight < 0:
            raise ConfigError(
                f"distillation.{label}.weight is {term.weight}; it must be at least 0"
            )
        if term.weight and d.cache is not None:
            raise ConfigError(
                f"distillation.{label}.weight is {term.weight}, but a cache holds the teacher's "
                f"logits alone; take a live teacher (distillation.teacher=MODEL, no "
                f"distillation.cache), or distillation.{label}.weight=0"
            )
    check_inside(inside_of(d))
    if d.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"distillation.dtype is {d.dtype!r}; allowed: float32, bfloat16")


def kind_of(d: DistillationConfig) -> Kind:
    """The static part of a configured loss."""
    return Kind(Divergence(d.divergence, d.beta), d.estimator, d.squared, d.vocabulary)


def inside_of(d: DistillationConfig) -> Inside:
    """The configured terms on hidden states and relations."""
    h, r = d.hidden, d.relations
    return Inside(
        Hidden(h.weight, h.form) if h.weight else None,
        Relations(r.weight, r.form, r.heads, r.temperature, r.causal) if r.weight else None,
    )


def layers_of(d: DistillationConfig, teacher: bool) -> dict[str, int]:
    """Which layer of the teacher, or of the student, shows which state."""
    hidden, relations = inside_of(d)
    layers: dict[str, int] = {}
    if hidden is not None:
        layers["hidden"] = d.hidden.teacher_layer if teacher else d.hidden.layer
    if relations is not None:
        layer = d.relations.teacher_layer if teacher else d.relations.layer
        layers |= dict.fromkeys(states_of(relations), layer)
    return layers


def schedule_of(d: DistillationConfig, steps: int) -> Callable[[int], Mix]:
    """Step (from 1) -> weights and temperature, in a straight line over the run's steps."""

    def between(start: float, end: float | None, step: int) -> float:
        return start if end is None else start + (end - start) * (step - 1) / max(steps - 1, 1)

    hard = min(d.alpha, _or(d.alpha_end, d.alpha)) < 1
    warm = d.temperature != 1 or d.temperature_end is not None

    def mix_at(step: int) -> Mix:
        alpha = between(d.alpha, d.alpha_end, step)
        temperature = between(d.temperature, d.temperature_end, step)
        return Mix(alpha, 1 - alpha if hard else None, temperature if warm else None)

    return mix_at


def find_cache(config: RunConfig) -> CachedTeacher | None:
    """The run's cache, opened and held against its config; None where it has none.

    Raises:
        ConfigError: the temperature is not the cache's, or its entries fit another estimator.
        DataError, StateError: as `open_cache`; also where a teacher is named that is another.
    """
    d = config.distillation
    if d.cache is None:
        return None
    teacher = None if d.teacher is None else _fingerprint(d)
    cached = open_cache(d.cache, teacher=teacher)
    check_temperature(d.temperature, cached.manifest["temperature"])
    check_temperature(_or(d.temperature_end, d.temperature), cached.manifest["temperature"])
    if cached.manifest["sampled"] != (d.estimator == "sampled"):
        kept = "draws" if cached.manifest["sampled"] else "the most probable ids"
        cure = "sampled" if cached.manifest["sampled"] else "tail"
        raise ConfigError(
            f"distillation.estimator is {d.estimator}, but the cache {d.cache} holds {kept}; "
            f"take distillation.estimator={cure}"
        )
    return cached


def open_distillation(
    config: RunConfig,
    cached: CachedTeacher | None,
    model: Started,
    loader: Loader,
    mesh: Mesh,
) -> Distilled | None:
    """The run's objective; None for a run without a teacher.

    Raises:
        ConfigError: there is no such teacher, it has another tokenizer, or one of the two models
            lacks a layer.
        StateError: the cache is of other pieces than the loader's.
    """
    d = config.distillation
    if not _wanted(d):
        return None
    assert model.hidden_fn is not None and model.states_fn is not None
    student: HiddenFn | StatesFn = model.hidden_fn
    if layers := layers_of(d, teacher=False):
        _check_layers(layers, config.model.layers, "student")
        student = model.states_fn(layers)
    teacher = None
    if cached is not None:
        cached.check(loader.identity)
    else:
        teacher = load_teacher(d, loader.tokenizer, mesh, width=config.model.width)
    objective = make_objective(
        student, teacher, kind_of(d), inside=inside_of(d),
        chunk=d.chunk * token_ways(mesh), wrap=partial(on_mesh, mesh=mesh),
    )  # fmt: skip
    return Distilled(objective, schedule_of(d, config.training.steps))


def load_teacher(
    d: DistillationConfig,
    tokenizer: TokenizerWrapper,
    mesh: Mesh,
    *,
    width: int | None = None,
    fingerprint: bool = False,
) -> TeacherWrapper:
    """A teacher from a Hugging Face folder or a hub name, split over the mesh.

    Args:
        d: which, and which of its states are asked for.
        tokenizer: of the data.
        mesh: where it goes.
        width: of the student, to which hidden states are projected; None: no states are shown.
        fingerprint: take one of the weights.

    Raises:
        ConfigError: there is no such model, or its tokenizer is not the data's.
    """
    if not d.teacher:
        raise ConfigError("distillation.teacher names no model; give a folder or a hub name")
    folder = find_folder(d.teacher)
    own = TokenizerWrapper.load(folder, add_bos=tokenizer.add_bos, add_eos=tokenizer.add_eos)
    if own.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"the teacher {d.teacher} has another tokenizer ({own.fingerprint}) than the data "
            f"({tokenizer.fingerprint}); take data.tokenizer={d.teacher} and prepare the data again"
        )
    model = load_pretrained(
        folder,
        ModelConfig(dtype=d.dtype, scan_layers=True),
        shardings=lambda params: param_shardings(params, mesh),
    )
    layers = {} if width is None else layers_of(d, teacher=True)
    hidden_fn: HiddenFn | StatesFn = decoder.hidden_fn(model.graph)
    if layers:
        _check_layers(layers, model.config.layers, "teacher")
        hidden_fn = states_fn(model.graph, layers)
    if "hidden" in layers and model.config.width != width:
        hidden_fn = _narrowed(hidden_fn, model.config.width, width or 0)
    return wrap_teacher(
        model.params,
        hidden_fn=hidden_fn,
        dtype=None if d.dtype == "float32" else d.dtype,
        mesh=mesh,
        fingerprint=_fingerprint(d) if fingerprint else None,
    )


def make_cache(config: RunConfig, progress: Progress | None = None) -> CachedTeacher:
    """Run the configured teacher over the configured data; see `write_cache`.

    Raises:
        ConfigError: the config names no teacher or no folder for the cache.
        DataError, StateError: as `write_cache`.
    """
    d = _cached(config)
    assert d.cache is not None
    data = config.data
    tokenizer = TokenizerWrapper.load(data.tokenizer, add_bos=data.add_bos, add_eos=data.add_eos)
    mesh = make_mesh(config.mesh)
    teacher = load_teacher(d, tokenizer, mesh, fingerprint=True)
    return write_cache(
        teacher, data, d.cache, mesh, tokenizer=tokenizer, entries=d.entries,
        temperature=d.temperature, codec=d.codec, sampled=d.sampled, batch_size=d.batch_size,
        shard_entries=d.shard_entries, progress=progress,
    )  # fmt: skip


def tokens_to_cache(config: RunConfig) -> int | None:
    """Targets that a cache of the training documents holds; None where they are streamed.

    Raises:
        ConfigError: as `make_cache`.
        DataError, StateError: there is no such store, or it is of another tokenizer.
    """
    _cached(config)
    data = config.data
    if data.store is None:
        return None
    tokenizer = TokenizerWrapper.load(data.tokenizer, add_bos=data.add_bos, add_eos=data.add_eos)
    store = open_prepared(data, tokenizer)
    counts = [[store.total(name, "train", what) for what in ("tokens", "documents")]
              for name in data.sources]  # fmt: skip
    return sum(tokens - documents for tokens, documents in counts)  # nothing follows a last token


def _cached(config: RunConfig) -> DistillationConfig:
    d = config.distillation
    if not d.cache or not d.teacher:
        raise ConfigError(
            "dh distill cache needs distillation.teacher=MODEL and distillation.cache=FOLDER"
        )
    check_distillation(config)
    return d


def _narrowed(states: Any, width: int, wanted: int) -> StatesFn:
    """The same with its hidden states projected by a matrix that is the same in every run.

    Columns (or rows, of the narrower side) are orthonormal, so the states' mean square stays, up
    to what a random direction holds more or less than others.
    """
    long, short = max(width, wanted), min(width, wanted)
    drawn = np.linalg.qr(np.random.default_rng(0).standard_normal((long, short)))[0]
    kernel_ED = np.float32(drawn if width >= wanted else drawn.T)

    def projected(params: Params, batch: Batch) -> Any:
        hidden_BTD, head, found = states(params, batch)
        return hidden_BTD, head, found | {"hidden": found["hidden"] @ kernel_ED}

    return projected


def _check_layers(layers: dict[str, int], count: int, whose: str) -> None:
    for state, layer in layers.items():
        if not -count <= layer < count:
            term = "hidden" if state == "hidden" else "relations"
            key = "teacher_layer" if whose == "teacher" else "layer"
            raise ConfigError(
                f"distillation.{term}.{key} is {layer}, but the {whose} has {count} layers; take "
                f"0 to {count - 1}, or -1 for the last"
            )


def _wanted(d: DistillationConfig) -> bool:
    return d.teacher is not None or d.cache is not None


def _fingerprint(d: DistillationConfig) -> str:
    assert d.teacher is not None
    return fingerprint_of(find_folder(d.teacher), d.dtype)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def with_defaults(overrides: list[str]) -> list[str]:
    """Overrides of `dh distill`, which begins with the group's plainest loss."""
    named = any(x.partition("=")[0] == "distillation" for x in overrides)
    return overrides if named else ["distillation=forward_kl", *overrides]


def refuse_without_teacher(config: RunConfig) -> None:
    """`dh distill` wants a teacher.

    Raises:
        ConfigError: there is none.
    """
    if not _wanted(config.distillation):
        raise ConfigError(
            "dh distill needs distillation.teacher=MODEL, distillation.cache=FOLDER, or both (the "
            "cache is then held against the teacher)"
        )
