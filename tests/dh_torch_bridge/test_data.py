"""The bridge's loader against the JAX loader: the same rows, in Hugging Face's conventions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dh_jax.batch import Batch  # noqa: E402
from dh_jax.data.loader import get_loader  # noqa: E402
from dh_torch_bridge.data import IGNORED, as_torch  # noqa: E402
from dh_torch_bridge.data import get_loader as get_torch_loader  # noqa: E402


def test_rows_are_those_of_the_jax_loader(make_config: Any, store: Path) -> None:
    config = make_config(store=str(store), packing={"strategy": "concat", "window": 32})
    with (
        get_loader(config, batch_size=4) as ours,
        get_torch_loader(config, batch_size=4) as torch_s,
    ):
        for step in range(12):
            if step == 6:
                ours.set_weights({"code": 0, "mail": 1, "sums": 1})
                torch_s.set_weights({"code": 0, "mail": 1, "sums": 1})
            a, b = next(ours), next(torch_s)
            np.testing.assert_array_equal(b["input_ids"].numpy(), a.tokens_BT)
            np.testing.assert_array_equal(b["position_ids"].numpy(), a.positions_BT)
            np.testing.assert_array_equal(b["segment_ids"].numpy(), a.segment_ids_BT)
            learnt = b["shift_labels"].numpy() != IGNORED
            np.testing.assert_array_equal(learnt, a.loss_mask_BT)
            np.testing.assert_array_equal(b["shift_labels"].numpy()[learnt], a.targets_BT[learnt])
        assert torch_s.stats() == ours.stats() and torch_s.weights == ours.weights


def test_labels_shifted_by_hugging_face_are_the_targets_within_documents(
    make_config: Any, store: Path
) -> None:
    """What `transformers` does with labels (drop the first, predict from the position before)
    must give our targets everywhere but at the last token of a document cut at a row's end."""
    with get_torch_loader(make_config(store=str(store)), batch_size=8) as loader:
        for _ in range(5):
            batch = next(loader)
            shifted = batch["labels"][:, 1:]
            targets = batch["shift_labels"][:, :-1]
            last = batch["position_ids"][:, 1:] == 0  # the next token starts another document
            assert torch.equal(shifted[~last], targets[~last])
            assert (shifted[last] == IGNORED).all()


def test_all_but_labels_share_memory_with_the_batch() -> None:
    grid = np.zeros((2, 8), np.int32)
    batch = Batch(grid, grid.copy(), grid > 0, grid.copy(), grid.copy(), np.zeros(2, np.int32))
    tensors = as_torch(batch)
    for name, array in (
        ("input_ids", batch.tokens_BT),
        ("position_ids", batch.positions_BT),
        ("segment_ids", batch.segment_ids_BT),
        ("source_ids", batch.source_ids_B),
    ):
        assert tensors[name].data_ptr() == array.ctypes.data
    assert tensors["labels"].dtype == tensors["shift_labels"].dtype == torch.int64


def test_state_moves_between_the_two_loaders(make_config: Any, store: Path) -> None:
    config = make_config(store=str(store))
    with (
        get_loader(config, batch_size=4) as ours,
        get_torch_loader(config, batch_size=4) as torch_s,
    ):
        for _ in range(7):
            next(ours)
        torch_s.load_state_dict(ours.get_state())
        np.testing.assert_array_equal(next(torch_s)["input_ids"].numpy(), next(ours).tokens_BT)
        assert torch_s.state_dict()["batches"] == 8


def test_loading_initialises_no_jax_backend(make_config: Any, store: Path, tmp_path: Path) -> None:
    import dataclasses

    from omegaconf import OmegaConf

    path = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(make_config(store=str(store)))), path)
    program = f"""
import sys
from dh_torch_bridge import get_loader
with get_loader({str(path)!r}, batch_size=2) as loader:
    next(loader)
if "jax" in sys.modules:
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
