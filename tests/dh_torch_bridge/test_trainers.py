"""Other people's training loops on the bridge's loader: fifty steps on real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from dh_jax.config import ModelConfig  # noqa: E402
from dh_torch_bridge.data import get_loader  # noqa: E402
from dh_torch_bridge.losses import token_losses  # noqa: E402
from dh_torch_bridge.train import build_llama  # noqa: E402

pytestmark = pytest.mark.slow

STEPS = 50
COLUMNS = ("input_ids", "labels", "position_ids", "attention_mask")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return build_llama(ModelConfig(width=32, layers=2, heads=4, kv_heads=2, mlp_width=48), 512)


@pytest.mark.filterwarnings("ignore")  # of transformers' and of accelerate's own making
def test_transformers_trainer(model: Any, make_config: Any, store: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = make_config(store=str(store))

    class OnRows(transformers.Trainer):
        """The one line that a user adds."""

        def get_train_dataloader(self) -> Any:
            return loader.as_dataloader()

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, learning_rate=3e-3, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    with get_loader(config, batch_size=8, columns=COLUMNS) as loader:
        trainer = OnRows(model=model, args=arguments)
        trainer.train()
        assert loader.stats()["batches"] >= STEPS
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5
    # The first loss is that of a plain loop over the same rows.
    torch.manual_seed(0)
    again = build_llama(ModelConfig(width=32, layers=2, heads=4, kv_heads=2, mlp_width=48), 512)
    with get_loader(config, batch_size=8) as loader:
        batch = next(loader)
        learnt = batch["labels"][:, 1:] != -100
        loss_BT = token_losses(again, batch | {"shift_labels": torch.cat(
            [batch["labels"][:, 1:], torch.full((8, 1), -100)], 1)})  # fmt: skip
    assert losses[0] == pytest.approx(float(loss_BT.sum() / learnt.sum()), abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_accelerate(model: Any, make_config: Any, store: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    with get_loader(make_config(store=str(store)), batch_size=8, columns=COLUMNS) as loader:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ours, optimizer, rows = accelerator.prepare(model, optimizer, loader.as_dataloader())
        assert_learns(ours, optimizer, rows, accelerator.backward)


@pytest.mark.filterwarnings("ignore")
def test_lightning_fabric(model: Any, make_config: Any, store: Path) -> None:
    fabric_module = pytest.importorskip("lightning_fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    with get_loader(make_config(store=str(store)), batch_size=8, columns=COLUMNS) as loader:
        ours, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
        rows = fabric.setup_dataloaders(loader.as_dataloader())
        assert_learns(ours, optimizer, rows, fabric.backward)


def assert_learns(model: Any, optimizer: Any, rows: Any, backward: Any) -> None:
    losses = []
    for batch, _ in zip(rows, range(STEPS), strict=False):
        loss = model(**batch).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5
