"""The schema of the group ``distributed``: how torch ranks share a model and its rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DistributedConfig:
    """How torch ranks share a model, and in what precision they work on their shares.

    ``pipeline`` times ``replicate`` times ``shard`` times ``tensor`` is the number of ranks; one
    of the four may be -1 (what is left). ``replicate`` groups of ranks each hold the whole model,
    split over the ``shard`` ranks of the group; rows are split over both. Ranks that differ in
    ``tensor`` or ``pipeline`` only read the same rows: they hold parts of every matrix, or other
    layers. All keys after the sizes but ``backend`` and ``timeout`` are for fsdp2 alone.
    """

    name: str = "single"
    strategy: str = "single"  # single (one process), ddp (copies), fsdp2 (shares; hybrid if both)
    replicate: int = 1
    shard: int = 1
    tensor: int = 1  # heads, feed-forward and vocabulary are split
    pipeline: int = 1  # layers are split, each rank has its stages
    sequence_parallel: bool = False  # between matrices, tensor ranks split the row's tokens
    schedule: str = "1f1b"  # gpipe, 1f1b, interleaved_1f1b, interleaved_zero_bubble, zbv
    microbatches: int | None = None  # parts of a rank's batch in the pipeline; None: the stages
    stages: int | None = None  # a rank's; None: 1, or 2 of a schedule that interleaves
    param_dtype: str | None = None  # gathered parameters and activations; None: as the model has
    reduce_dtype: str | None = None  # sums of gradients over ranks; None: param_dtype
    reshard_after_forward: bool = True  # free a block's parameters until its backward
    checkpoint_activations: bool = False  # keep a block's input alone; compute the rest again
    cpu_offload: bool = False  # parameters, gradients and optimizer state wait in host memory
    backend: str = "auto"  # auto (nccl where there is a GPU, else gloo), nccl, gloo
    timeout: float = 600.0  # seconds that a rank waits for the others before all stop
