"""Checkpoints of torch: what is saved comes back bit for bit, and nothing damaged ever does."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.distributed.checkpoint import FileSystemReader  # noqa: E402

from dh_jax.errors import DataError, StateError  # noqa: E402
from dh_torch_bridge.data import get_loader  # noqa: E402
from dh_torch_bridge.distributed.checkpoint import Checkpoints  # noqa: E402
from dh_torch_bridge.runstate import restore_run, save_run  # noqa: E402


def make(width: int = 4, seed: int = 0, depth: int = 2) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(width, width) for _ in range(depth)]
    model = torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.5))
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters()}, {"params": model[1:].parameters(), "lr": 0.02}]
    )
    return model, optimizer


def train(model: Any, optimizer: Any, steps: int = 1) -> list[Any]:
    """Steps that use every part of the state: dropout draws, running means, Adam's moments."""
    for _ in range(steps):
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [x.clone() for x in model.state_dict().values()]


def assert_equal(a: list[Any], b: list[Any]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[int, list[Any]]]:
    """Three steps' checkpoints, and what the model was at each."""
    model, optimizer = make()
    states = {}
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        for step in (1, 2, 3):
            states[step] = train(model, optimizer)
            checkpoints.save(step, model, optimizer, {"note": step})
    return tmp_path / "checkpoints", states


def test_training_goes_on_as_if_it_had_not_been_broken_off(tmp_path: Path) -> None:
    model, optimizer = make()
    train(model, optimizer, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, model, optimizer, {"tokens": 7, "weights": {"a": 0.1}})
        expected = train(model, optimizer, 3)  # while the files are being written
        assert checkpoints.steps() == [2]
        other, fresh = make(seed=1)
        train(other, fresh)  # an optimizer that has a state already
        fresh.param_groups[0]["lr"] = 7.0
        assert checkpoints.restore(other, fresh) == (2, {"tokens": 7, "weights": {"a": 0.1}})
        assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in optimizer.param_groups]
        assert fresh.param_groups[0]["betas"] == (0.9, 0.999)
        assert_equal(train(other, fresh, 3), expected)


def test_the_first_step_may_be_saved_before_the_optimizer_has_a_state(tmp_path: Path) -> None:
    model, optimizer = make()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(model, optimizer) is None
        checkpoints.save(0, model, optimizer, {})
        expected = train(model, optimizer, 2)
        other, fresh = make(seed=1)
        train(other, fresh)
        assert checkpoints.restore(other, fresh) == (0, {})
        assert not fresh.state
        assert_equal(train(other, fresh, 2), expected)


def test_tied_and_wrapped_parameters_keep_their_plain_names(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(5, 4)
            self.head = torch.nn.Linear(4, 5, bias=False)
            self.head.weight = self.table.weight

    model = Tied()
    wrapped = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"_orig_mod": Tied()})})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, torch.optim.SGD(model.parameters()), {})
        restored = checkpoints.restore(wrapped, torch.optim.SGD(wrapped.parameters()))
    assert restored is not None
    names = set(FileSystemReader(tmp_path / "1").read_metadata().state_dict_metadata)
    assert names == {"model.table.weight", "rng.cpu.0"}
    inner = wrapped["module"]["_orig_mod"]
    assert torch.equal(inner.table.weight, model.table.weight)
    assert inner.head.weight is inner.table.weight


def test_old_steps_go_and_those_of_keep_every_stay(tmp_path: Path) -> None:
    model, optimizer = make()
    with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, model, optimizer, {})
        checkpoints.save(8, model, optimizer, {"again": True})  # left alone
        assert checkpoints.steps() == [4, 7, 8]
        restored = checkpoints.restore(model, optimizer)
        assert restored is not None and restored.host == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "7", "8"]


# --- damage ----------------------------------------------------------------------------------


def damage(path: Path, rng: np.random.Generator) -> str:
    """Flip one bit of a file, or cut it short, at random; says what was done."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        place = int(rng.integers(len(content)))
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        return f"bit flipped at {place}"
    keep = int(rng.integers(len(content)))
    path.write_bytes(content[:keep])
    return f"cut to {keep}"


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_or_a_truncation_anywhere_is_found(
    seed: int, saved: tuple[Path, dict[int, list[Any]]]
) -> None:
    folder, states = saved
    rng = np.random.default_rng(seed)
    files = sorted((folder / "3").iterdir())
    assert {path.name for path in files} == {
        ".metadata", "__0_0.distcp", "checksums.json", "host.json",
    }  # fmt: skip
    hurt = files[seed % len(files)]
    done = damage(hurt, rng)
    model, optimizer = make(seed=1)
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(StateError, match="3 is damaged"):
            checkpoints.restore(model, optimizer, step=3)
        with pytest.warns(UserWarning, match="damaged-3, and the run goes on from step 2"):
            restored = checkpoints.restore(model, optimizer)
        assert restored == (2, {"note": 2}), (hurt, done)
        assert_equal(list(model.state_dict().values()), states[2])
        assert checkpoints.steps() == [1, 2]


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a file was unpickled before it was checked",))


def test_nothing_is_unpickled_before_its_checksum_is_right(
    saved: tuple[Path, dict[int, list[Any]]],
) -> None:
    folder, _ = saved
    for step in (1, 2, 3):
        (folder / str(step) / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with Checkpoints(folder) as checkpoints, pytest.raises(StateError, match="every checkpoint"):
        checkpoints.restore(*make())
    assert len(list(folder.iterdir())) == 3  # all are left where they are


def test_what_a_killed_run_left_is_never_a_step(
    saved: tuple[Path, dict[int, list[Any]]],
) -> None:
    folder, states = saved
    shutil.copytree(folder / "3", folder / ".writing-4-0badcafe")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        assert not (folder / ".writing-4-0badcafe").exists()
    (folder / "3" / "__0_0.distcp").unlink()
    model, optimizer = make(seed=1)
    with Checkpoints(folder) as checkpoints, pytest.warns(UserWarning, match="distcp is missing"):
        assert checkpoints.restore(model, optimizer) == (2, {"note": 2})
    assert_equal(list(model.state_dict().values()), states[2])


def test_a_folder_that_cannot_be_written_is_an_error_in_time(tmp_path: Path) -> None:
    model, optimizer = make()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("in the way")
        checkpoints.save(1, model, optimizer, {})
        with pytest.raises(DataError, match="step 1 cannot be written"):
            checkpoints.wait()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"width": 5}, r"model.2.running_mean is \(4,\) torch.float32 there and \(5,\)"),
        ({"depth": 3}, r"it has model.2.running_mean, which is not here"),
        ({"depth": 1}, r"it has model.2.running_mean, which is not here"),
    ],
)
def test_another_model_is_refused_before_anything_is_read(
    other: dict[str, int], said: str, saved: tuple[Path, dict[int, list[Any]]]
) -> None:
    folder, _ = saved
    model, optimizer = make(**other)
    before = [x.clone() for x in model.state_dict().values()]
    with Checkpoints(folder) as checkpoints, pytest.raises(StateError, match=said):
        checkpoints.restore(model, optimizer)
    assert_equal(list(model.state_dict().values()), before)


def test_another_type_and_another_optimizer_are_refused(
    saved: tuple[Path, dict[int, list[Any]]],
) -> None:
    folder, _ = saved
    model, _ = make()
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(StateError, match="an optimizer of 2 groups, this one has 1"):
            checkpoints.restore(model, torch.optim.AdamW(model.parameters()))
        model = model.to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(StateError, match=r"torch.float32 there and .* torch.bfloat16 here"):
            checkpoints.restore(model, optimizer)


# --- loaders ---------------------------------------------------------------------------------


class Alone(Checkpoints):
    """What the ranks of a run would gather, in one process: each rank's values are put in."""

    others: list[Any]

    def gather(self, value: Any) -> list[Any]:
        return self.others if isinstance(value, list) and len(value) == 2 else super().gather(value)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_the_next_hundred_batches_are_the_same_on_other_ranks(
    before: int, after: int, make_config: Any, store: Path, tmp_path: Path
) -> None:
    config = make_config(store=str(store))

    def ranks(count: int) -> list[Any]:
        return [
            get_loader(config, batch_size=8, shard=(i, count), prefetch=0) for i in range(count)
        ]

    def draw(loaders: list[Any], count: int) -> list[Any]:
        return [torch.cat([next(x)["input_ids"] for x in loaders]) for _ in range(count)]

    model, optimizer = make()
    old = ranks(before)
    draw(old, 7)
    for loader in old:
        loader.set_weights({"code": 1, "mail": 2, "sums": 3})
    draw(old, 6)
    with Alone(tmp_path) as checkpoints:
        checkpoints.others = [[i, x.state_dict()] for i, x in enumerate(old)]
        save_run(checkpoints, 13, model, optimizer, old[0])
        expected = draw(old, 100)
        new = ranks(after)
        for loader in new:
            restored = restore_run(checkpoints, model, optimizer, loader)
            assert restored is not None and restored.step == 13
    for loader in new:
        assert loader.weights == old[0].weights
    for a, b in zip(draw(new, 100), expected, strict=True):
        assert torch.equal(a, b)
