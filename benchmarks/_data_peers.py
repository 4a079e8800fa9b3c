"""LitData and MosaicML Streaming over fixed blocks; run by `data.py` in their own environment."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _measure

TOKENS = 20e6


def blocks_of(path: str, row_length: int) -> np.ndarray[Any, Any]:
    tokens = np.load(path, mmap_mode="r")
    return tokens[: tokens.size // row_length * row_length].reshape(-1, row_length)


def litdata(path: str, B: int, T: int, workers: int) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    folder = Path(f"{path}.litdata")
    if not folder.exists():
        from functools import partial

        optimize(
            partial(_litdata_rows, path, T), inputs=[0], output_dir=str(folder), num_workers=1,
            chunk_size=T * 4096, item_loader=TokensLoader(),
        )  # fmt: skip
    data = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=T), shuffle=True)
    return StreamingDataLoader(data, batch_size=B, num_workers=workers)


def _litdata_rows(path: str, T: int, _: int) -> Any:
    import torch

    for block in blocks_of(path, T):
        yield torch.from_numpy(block.astype(np.int32))


def without_torchvision() -> None:
    """MosaicML imports torchvision for its image data sets, which are not used here; the package
    does not load beside a CPU build of torch."""
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms",
             "torchvision.transforms.functional")  # fmt: skip
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = ModuleSpec(name, None)
        for attribute in ("VisionDataset", "Compose", "ToTensor", "Resize", "to_tensor"):
            setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module


def mosaicml(path: str, B: int, T: int, workers: int) -> Any:
    without_torchvision()
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    folder = Path(f"{path}.mds")
    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:int32:{T}"}) as writer:
            for block in blocks_of(path, T):
                writer.write({"tokens": block.astype(np.int32)})
    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=B)
    return DataLoader(data, batch_size=B, num_workers=workers)


def main() -> None:
    name, path, B, T = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    workers = 2 if name.endswith("2") else 0
    make = {"litdata": litdata, "mosaicml": mosaicml}[name.removesuffix("2")]
    loader = make(path, B, T, workers)

    def work() -> int:
        done = 0
        while done < TOKENS:
            for batch in loader:
                done += batch["tokens"].numel() if isinstance(batch, dict) else batch.numel()
        return done

    import json

    print(json.dumps(_measure.clock(work)))


if __name__ == "__main__":
    main()
