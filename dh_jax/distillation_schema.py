"""The schema of the group ``distillation``: whose words a student learns, and how."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class HiddenConfig:
    """A term on hidden states, of a live teacher; see `dh_jax.distillation.inside`.

    Where the teacher has another width, its states are projected to the student's by an
    orthonormal matrix that is drawn once and stays.
    """

    weight: float = 0.0  # 0: no such term
    form: str = "mse"  # or cosine
    layer: int = -1  # of the student, from 0, or from the last backwards
    teacher_layer: int = -1


@dataclass
class RelationsConfig:
    """A term on relations of queries, keys and values, of a live teacher; see the same file."""

    weight: float = 0.0  # 0: no such term
    form: str = "bitdistill_equation"  # or bitdistill_algorithm, minilm, minilm_v2
    heads: int = 1  # relation heads; minilm has the attention's
    temperature: float = 1.0  # of bitdistill_algorithm
    causal: bool = True  # tokens are related to earlier ones only
    layer: int = -1
    teacher_layer: int = -1


@dataclass
class DistillationConfig:
    """A teacher, live or from a cache; with neither a run learns from its data alone.

    The loss is ``alpha * D + (1 - alpha) * CE``, and the terms of ``hidden`` and ``relations``
    times their weights. ``alpha`` and ``temperature`` go in a straight line to their ends over the
    steps of the run where ends are given. The last five keys are read by ``dh distill cache``.
    """

    name: str = "none"
    teacher: str | None = None  # a Hugging Face folder or hub name, of the data's tokenizer
    cache: str | None = None  # a folder of `dh distill cache`, read instead of running the teacher
    divergence: str = "forward_kl"  # or reverse_kl, jensen_shannon, total_variation,
    # skewed_forward_kl, skewed_reverse_kl; see dh_jax.distillation.divergences
    beta: float = 0.5  # of jensen_shannon and the skewed ones
    alpha: float = 1.0  # share of the divergence; the rest is cross-entropy
    alpha_end: float | None = None
    temperature: float = 1.0  # of both sides, in the divergence; a cache has its own
    temperature_end: float | None = None
    squared: bool = True  # the divergence is multiplied by temperature²
    estimator: str = "tail"  # of a cache: tail, teacher_renormalised, both_renormalised, sampled
    hidden: HiddenConfig = field(default_factory=HiddenConfig)
    relations: RelationsConfig = field(default_factory=RelationsConfig)
    vocabulary: int | None = None  # ids from here on are padding; None: none are
    dtype: str = "float32"  # of the live teacher's activations and matrices, or bfloat16
    chunk: int = 256  # tokens of a device whose logits exist at one time
    entries: int = 64  # ids kept for a token
    codec: str = "plain"  # or dense: 18 % smaller, half as fast to read
    sampled: bool = False  # keep draws instead of the most probable ids
    batch_size: int = 8  # rows that the teacher reads at once
    shard_entries: int = 32_768  # tokens of a shard, after which a killed run goes on
