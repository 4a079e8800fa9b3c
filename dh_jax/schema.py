"""The schemas of every YAML file under ``configs/``: plain dataclasses, one for each group.

Units: lengths in tokens, weights as shares of the mixture, sizes of models in elements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dh_jax.distillation_schema import DistillationConfig
from dh_jax.distributed_schema import DistributedConfig

SPLITS = ("train", "probe", "eval")
# array_record holds JSON objects, array_record_text plain UTF-8.
FILE_FORMATS = ("jsonl", "parquet", "arrow", "text", "array_record", "array_record_text")
# What each shape of a conversation reads from a record.
CONVERSATION_COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "instruction": ("instruction", "input", "output"),
    "prompt_completion": ("prompt", "completion"),
}


# --- data ------------------------------------------------------------------------------------


@dataclass
class ConversationConfig:
    """How a record is a conversation, and what becomes of one that does not fit.

    ``columns`` renames what a shape reads: ``messages``; ``conversations`` (sharegpt);
    ``instruction, input, output``; ``prompt, completion``; and, only if named, ``system`` and
    ``tools``. For example ``{output: response, input: null}`` (there is no input).
    """

    shape: str = "messages"  # messages, sharegpt, instruction, prompt_completion
    columns: dict[str, str | None] = field(default_factory=dict)
    too_long: str = "truncate"  # than a row: truncate (after the last answer that fits) or drop
    dropped_text: str = "refuse"  # or keep: answers of which the chat template leaves text out
    variables: dict[str, Any] = field(default_factory=dict)  # of the chat template


@dataclass
class TextConfig:
    """How a record becomes text: one column, several joined by a separator, a template, or a
    conversation.

    Exactly one of ``column``, ``columns``, ``template`` and ``conversation`` is set. ``template``
    is a Python format string over the record's columns, for example ``"{sentence} => {label}"``;
    ``choices`` maps an integer column to words first (class labels).
    """

    column: str | None = None
    columns: list[str] | None = None
    separator: str = "\n\n"
    template: str | None = None
    choices: dict[str, list[str]] = field(default_factory=dict)
    conversation: ConversationConfig | None = None


@dataclass
class RetryConfig:
    """How often, and how patiently, a network fault is tried again. Times in seconds."""

    attempts: int = 6  # in all, the first included
    first: float = 0.5  # wait before the second attempt; doubled before every further one
    longest: float = 30.0  # no wait is longer, whatever a server's Retry-After asks for


@dataclass
class SourceConfig:
    """What every kind of source has."""

    kind: str = ""
    weight: float | None = None  # share of the mixture; equal shares when no source has one
    split: str = "hash"  # hash: by content into train/probe/eval; or all of it is one of these
    text: TextConfig = field(default_factory=lambda: TextConfig(column="text"))
    max_epochs: int | None = None  # passes that training makes over it; None: as many as it takes
    # Records read in a pass, of all shards together; every pass reads the same ones.
    max_documents: int | None = None
    interleave: int = 1  # pieces read in turn when order is shuffled
    retry: RetryConfig = field(default_factory=RetryConfig)


@dataclass
class FilesSource(SourceConfig):
    """Files on a disk or behind fsspec (``s3://``, ``gs://``, ``hf://``, ``http(s)://``, ...):
    JSONL (.gz, .zst), Parquet, Arrow, ArrayRecord, or a tree of text files (one document each)."""

    kind: str = "files"
    paths: list[str] = field(default_factory=list)  # files, folders or globs
    format: str = "auto"  # auto (by file ending), or one of FILE_FORMATS
    include: str = "**/*"  # which files of a folder
    interleave: int = 8
    # Options of the file system: keys, endpoint, ... Left out of repr, identities and errors.
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class HubSource(SourceConfig):
    """A data set on a Hugging Face hub (HF_ENDPOINT), streamed through ``datasets``."""

    kind: str = "hub"
    path: str = ""
    name: str | None = None  # the data set's configuration, e.g. sample-10BT
    hub_split: str = "train"
    revision: str | None = None
    data_files: str | None = None


@dataclass
class MegatronSource(SourceConfig):
    """Documents tokenised by Megatron: ``path`` + ``.bin`` and ``.idx``, read in place."""

    kind: str = "megatron"
    path: str = ""  # without the ending; one of the two files will do as well
    ids: str = "position"  # position, or content (reads every token once at opening)


@dataclass
class MdsSource(SourceConfig):
    """Documents tokenised into MosaicML's MDS shards: a folder with ``index.json``."""

    kind: str = "mds"
    path: str = ""
    column: str | None = None  # None: tokens or input_ids
    dtype: str | None = None  # of a column of bytes, e.g. uint16; an ndarray column says itself
    cache: str | None = None  # folder for the decompressed shards of a compressed data set
    ids: str = "position"


SOURCE_KINDS: dict[str, type[SourceConfig]] = {
    "files": FilesSource,
    "hub": HubSource,
    "megatron": MegatronSource,
    "mds": MdsSource,
}
TOKEN_SOURCES = (MegatronSource, MdsSource)  # hold tokens, not text


@dataclass
class PackingConfig:
    """How documents become rows of T tokens."""

    strategy: str = "best_fit"  # best_fit, first_fit, concat
    window: int = 1024  # documents planned together, with those that the window before left over
    max_segments: int = 64  # a row closes at this many documents
    long_documents: str = "split"  # split (all pieces are kept) or truncate (counted)


@dataclass
class SplitConfig:
    """Fractions of documents, by hash of content, that training never sees."""

    probe: float = 0.01
    eval: float = 0.01


@dataclass
class NearDuplicateConfig:
    """Near-duplicates by MinHash LSH over word n-grams; needs the package ``rensa``."""

    action: str = "ignore"  # ignore; drop (keep the first); together (keep all, in one split)
    threshold: float = 0.8  # estimated Jaccard similarity of two documents' sets of n-grams
    ngram: int = 5  # words
    permutations: int = 128  # numbers in a signature


@dataclass
class DecontaminationConfig:
    """Training documents that share an n-gram of words with evaluation texts are removed."""

    against: dict[str, Any] = field(default_factory=dict)  # name -> a source of evaluation texts
    held_out: bool = False  # also against this config's own probe and eval documents
    ngram: int = 13  # words
    shortest: int = 8  # an evaluation text of at least so many words counts as one n-gram
    max_documents: int = 10  # an n-gram in more training documents than this is boilerplate


@dataclass
class PrepareConfig:
    """How `dh prepare` works, and what it leaves out besides exact duplicates."""

    backend: str = "local"  # local (all cores of this machine), ray (Ray Data, on a cluster)
    workers: int | None = None  # processes; None: as many as there are cores and work for them
    near_duplicates: NearDuplicateConfig = field(default_factory=NearDuplicateConfig)
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)


@dataclass
class DataConfig:
    """A mixture: sources, their weights, the probe sets that judge it, and how rows are cut."""

    name: str = ""
    tokenizer: str = ""  # a folder, a .gguf file, or a hub name
    sources: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)  # default: each source's probe split
    max_length: int = 2048  # T, tokens of a row
    packing: PackingConfig = field(default_factory=PackingConfig)
    splits: SplitConfig = field(default_factory=SplitConfig)
    weight_unit: str = "tokens"  # what a weight is a share of: tokens, rows, trained_tokens
    exhausted: str = "renormalise"  # a source has no more rows: the others share, or stop
    add_bos: bool = False
    add_eos: bool = True
    on_error: str = "raise"  # raise, or skip (counted in stats)
    store: str | None = None  # folder of a prepared token store; None streams from the sources
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    seed: int = 0
    prefetch: int = 2  # batches made ahead by a background thread; 0 = none


# --- model, mesh, training -------------------------------------------------------------------


@dataclass
class LoraConfig:
    """Low-rank adapters, which alone are trained where ``rank`` is not 0."""

    rank: int = 0
    alpha: float = 16.0  # the adapters' product is scaled by alpha / rank
    targets: str = "attention/(query|value)$"  # regular expression over paths of linear layers


@dataclass
class ModelConfig:
    """A decoder of the Llama, Qwen2 or Qwen3 families. Sizes in elements.

    With ``pretrained`` the shape (down to ``tied``) is that of the folder's config.json; only
    what follows it is still to be chosen.
    """

    name: str = ""
    pretrained: str | None = None  # a Hugging Face folder or hub name to start from
    vocab_size: int | None = None  # None: the tokenizer's
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_width: int | None = None  # None: width // heads
    mlp_width: int = 384
    qkv_bias: bool = False  # Qwen2's
    qk_norm: bool = False  # Qwen3's: queries and keys are normalised head by head
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)  # as config.json has it
    max_positions: int | None = None  # tokens of a document the model was made for
    norm_epsilon: float = 1e-5
    tied: bool = True
    init_scale: float = 0.02
    dtype: str = "float32"  # of activations; parameters stay float32
    precision: str = "default"  # of linear layers; or highest (see `dh_jax.models.layers.product`)
    attention: str = "xla"  # the kernel; pallas on a TPU or GPU (see dh_jax.models.kernels)
    remat: str = "none"  # or what a layer's backward finds saved: a policy of jax.checkpoint
    scan_layers: bool = False  # parameters stacked over layers: compiles in the time of one
    linear: str = "dense"  # or ternary: weights -1, 0, 1 and 8-bit activations (BitNet b1.58)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class MeshConfig:
    """Named axes of the device mesh and their sizes; one may be -1 (what is left).

    The last three keys are for a run of several processes, each started with the same command;
    what is null is read from the environment (see `dh_jax.distributed.processes`).
    """

    name: str = "single"
    data: int = 1  # rows are split, parameters repeated
    fsdp: int = 1  # rows and parameters are split
    sequence: int = 1  # the tokens of each row are split, parameters repeated
    tensor: int = 1  # heads, feed-forward and vocabulary are split, rows repeated
    coordinator: str | None = None  # host:port of process 0, or auto (ask the cluster)
    processes: int | None = None
    process: int | None = None  # index of this one


@dataclass
class StageConfig:
    """Weights that hold from a step on; a source that is not named has weight 0."""

    step: int = 0
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class MixingConfig:
    """Which policy moves the weights, how often, and within what bounds.

    Policies that follow a plan: static (the data config's weights), uniform, temperature,
    proportional, schedule. Policies that look and move: influence, alignment, group_influence,
    influence_share, doge, odm, doremi, aioli, ado.
    """

    policy: str = "static"
    interval: int = 20  # steps between two moves; with a budget the least
    budget: float | None = None  # share of training's time for moves, sets their number; e.g. 0.05
    longest: int | None = None  # steps between moves beyond which it halves samples; 10 intervals
    warmup: int = 0  # steps before the first move
    freeze: int | None = None  # step from which the weights stay as they are
    learning_rate: float = 0.5  # log-weight (influence, alignment, doge, doremi, aioli)
    smoothing: float = 0.0  # share of the old estimate or reward kept (influence's kin, odm)
    ema: float = 0.0  # share of the old weights kept at a move
    exploration: float = 1e-3  # weight given to all alike (doremi), to others in a trial (aioli)
    hold: int = 6  # moves for which a round's answer is in force (aioli)
    temperature: float = 1.0  # of sizes (temperature); pull to configured weights (group_influence)
    min_weight: float = 0.02  # of policies that move
    max_weight: float = 0.9
    bounds: dict[str, list[float]] = field(default_factory=dict)  # source: [least, greatest]
    sizes: dict[str, float] = field(default_factory=dict)  # by source; empty: the store's tokens
    stages: list[StageConfig] = field(default_factory=list)  # of a schedule
    interpolate: bool = False  # from stage to stage in a straight line
    reference: dict[str, float] = field(default_factory=dict)  # source: nats a target, for doremi
    reference_run: str | None = None  # or take its final held-out losses
    on_failure: str = "stop"  # no weights come of a move: stop (at a checkpoint), or keep the last


@dataclass
class InfluenceConfig:
    """How influence is measured when the policy asks for it."""

    targets: dict[str, float] = field(default_factory=dict)  # probe -> weight; empty: all equal
    rows_per_source: int = 8  # training rows sampled from each source at a move
    probe_rows: int = 16  # rows sampled from each target probe at a move
    damping: float = 0.1  # lambda of a block = damping * mean squared gradient
    parameters: str = ".*"  # regular expression over parameter paths
    row_length: int | None = None  # tokens of a sampled row; None: max_length
    documents: int = 0  # documents a source to score for the report at the end; 0 = none


@dataclass
class TrainingConfig:
    """The optimizer, its schedule, and what is written when."""

    steps: int = 200
    batch_size: int = 16  # rows of the global batch
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.1  # as a fraction of the peak, at the end of the cosine
    warmup: int = 20
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0
    eval_interval: int = 50
    eval_rows: int = 64  # rows a domain
    eval_split: str = "eval"  # or probe: what a search judges by, so that eval stays unseen
    checkpoint_interval: int = 50
    keep: int = 2  # checkpoints kept, the newest
    keep_every: int | None = None  # and those of steps that are a multiple of this
    log_interval: int = 1
    seed: int = 0
    tensorboard: bool = False
    wandb: bool = False


@dataclass
class RunConfig:
    """Everything one training run is made from."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    out: str = "runs/default"
    resume: bool = False


@dataclass
class TorchRunConfig:
    """Everything one run of the torch bridge's reference trainer is made from."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    out: str = "runs/torch"
    resume: bool = False  # a restart by torchrun resumes by itself
