"""The bridge's loader against the JAX loader: the same rows, in Hugging Face's conventions."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dh_jax.batch import Batch, TopKLogits  # noqa: E402
from dh_jax.data.loader import get_loader  # noqa: E402
from dh_jax.errors import ConfigError, StateError  # noqa: E402
from dh_torch_bridge.copies import COPIED  # noqa: E402
from dh_torch_bridge.data import as_torch  # noqa: E402
from dh_torch_bridge.data import get_loader as get_torch_loader  # noqa: E402
from dh_torch_bridge.labels import IGNORED  # noqa: E402


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
    wide = batch._replace(targets_BT=grid.astype(np.int64))  # as the bridge asks the loader for
    assert as_torch(wide)["shift_labels"].data_ptr() == wide.targets_BT.ctypes.data


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_read_the_rows_of_the_jax_loader_and_no_others(
    ranks: int, make_config: Any, store: Path
) -> None:
    """Global batches, put together from all ranks, against the JAX loader on one host."""
    config = make_config(store=str(store))
    shards = [
        get_torch_loader(config, batch_size=8, shard=(i, ranks), prefetch=0) for i in range(ranks)
    ]
    with get_loader(config, batch_size=8) as whole:
        for _ in range(10):
            expected = next(whole)
            batches = [next(loader) for loader in shards]
            for name, array in (
                ("input_ids", expected.tokens_BT),
                ("segment_ids", expected.segment_ids_BT),
                ("source_ids", expected.source_ids_B),
            ):
                np.testing.assert_array_equal(torch.cat([b[name] for b in batches]), array)


def test_writing_into_a_batch_changes_no_later_one(make_config: Any, store: Path) -> None:
    config = make_config(store=str(store))
    with (
        get_torch_loader(config, batch_size=4, prefetch=2) as ours,
        get_loader(config, batch_size=4) as untouched,
    ):
        for _ in range(20):
            batch, expected = next(ours), next(untouched)
            np.testing.assert_array_equal(batch["input_ids"], expected.tokens_BT)
            np.testing.assert_array_equal(batch["position_ids"], expected.positions_BT)
            for tensor in batch.values():
                tensor.fill_(-7)


def test_other_columns_say_the_same_of_documents(make_config: Any, store: Path) -> None:
    config = make_config(store=str(store))
    columns = ("segment_ids", "attention_mask", "cu_seqlens", "max_seqlen")
    with get_torch_loader(config, batch_size=4, columns=columns) as loader:
        batch = next(loader)
    assert tuple(batch) == columns
    segments, bounds = batch["segment_ids"], batch["cu_seqlens"]
    assert bounds.dtype == torch.int32 and batch["max_seqlen"] == int(bounds.diff().max())
    lengths = [len(list(run)) for row in segments.tolist() for _, run in itertools.groupby(row)]
    assert bounds.tolist() == [0, *itertools.accumulate(lengths)]
    B, T = segments.shape
    blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    for row in range(B):
        inside = slice(row * T, (row + 1) * T)
        assert torch.equal(batch["attention_mask"][row, 0], blocks[inside, inside])
    with pytest.raises(ConfigError, match=r"no column 'labls' .did you mean 'labels'"):
        get_torch_loader(config, batch_size=4, columns=["labls"])


def test_a_cached_teacher_comes_along(make_config: Any, store: Path) -> None:
    def join(batch: Batch, origins: Any) -> Batch:
        ids_BTK = np.repeat(batch.tokens_BT[..., None], 2, -1)
        logp_BTK = np.full(ids_BTK.shape, -1.0, np.float32)
        return batch._replace(teacher=TopKLogits(ids_BTK, logp_BTK, logp_BTK[..., 0]))

    with get_torch_loader(make_config(store=str(store)), batch_size=4, join=join) as loader:
        batch = next(loader)
    assert torch.equal(batch["teacher"].ids_BTK[..., 1], batch["input_ids"])
    assert batch["teacher"].log_tail_BT.dtype == torch.float32


def test_nothing_is_copied_but_labels(make_config: Any, store: Path) -> None:
    with get_torch_loader(make_config(store=str(store)), batch_size=4, pin_memory=False) as loader:
        before = COPIED.copy()
        batch = next(loader)
        assert COPIED - before == {"labels": batch["labels"].nbytes}
    wanted = ["input_ids", "shift_labels", "position_ids"]
    with get_torch_loader(make_config(store=str(store)), batch_size=4, columns=wanted) as loader:
        before = COPIED.copy()
        next(loader)
        assert not COPIED - before


def test_a_dataloader_for_trainers_that_insist_on_one(make_config: Any, store: Path) -> None:
    config = make_config(store=str(store))
    with (
        get_torch_loader(config, batch_size=4) as ours,
        get_torch_loader(config, batch_size=4) as plain,
    ):
        wrapped = ours.as_dataloader()
        assert isinstance(wrapped, torch.utils.data.DataLoader)
        for batch, _ in zip(wrapped, range(3), strict=False):
            assert torch.equal(batch["input_ids"], next(plain)["input_ids"])


@pytest.mark.filterwarnings("ignore")  # of accelerate's own making
def test_a_trainer_that_fetches_ahead_goes_on_behind_the_batch_it_trained_on(
    make_config: Any, store: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    config = make_config(store=str(store))
    with (
        get_torch_loader(config, batch_size=4) as ours,
        get_torch_loader(config, batch_size=4) as plain,
    ):
        ahead = accelerate.Accelerator(cpu=True).prepare(ours.as_dataloader())
        for _, batch in zip(range(12), ahead, strict=False):
            assert torch.equal(batch["input_ids"], next(plain)["input_ids"])
        assert ours.state_dict()["batches"] == 13  # it has one more in hand
        state = ours.state_dict(batches=12)
        with pytest.raises(
            StateError, match=r"no state behind batch 2 .* 6, 7, 8, 9, 10, 11, 12, 13"
        ):
            ours.state_dict(batches=2)
        ours.load_state_dict(state)
        assert torch.equal(next(ours)["input_ids"], next(plain)["input_ids"])


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
