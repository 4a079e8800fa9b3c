"""What each rank does for test_pieces.py, under torchrun: measure a spread model.

torchrun ... pieces.py FOLDER LAYOUT
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dh_jax.config import DistributedConfig
from dh_torch_bridge import pieces
from dh_torch_bridge.distributed.parallelize import parallelize
from tests.dh_torch_bridge.test_pieces import NEEDS, TARGETS, llama, samples

if __name__ == "__main__":
    sizes: list[int] = []
    gradient = pieces._gradient

    def watched(*arguments: object, **options: object) -> list[torch.Tensor]:
        kept = gradient(*arguments, **options)  # type: ignore[arg-type]
        sizes.extend(x.numel() for x in kept)
        return kept

    pieces._gradient = watched
    model = parallelize(llama(), DistributedConfig(**ast.literal_eval(sys.argv[2])))
    sources, probes = samples()
    seen, _ = pieces.measure_pieces(model)(NEEDS, sources, probes, TARGETS)
    seen["scores"] = pieces.score_documents(model, sources["second"], probes["a"], 3)
    np.savez(Path(sys.argv[1]) / f"{dist.get_rank()}.npz", largest=max(sizes), **seen)
    dist.barrier()
    os._exit(0)
