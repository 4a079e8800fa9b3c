"""A run that starts from a folder and trains adapters alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dh_jax.completion import complete, open_model
from dh_jax.config import LoraConfig, ModelConfig, RunConfig, TrainingConfig
from dh_jax.errors import ConfigError
from dh_jax.models.lora import split
from dh_jax.models.pretrained import save_pretrained
from dh_jax.models.start import resolve
from dh_jax.train import train
from tests.dh_jax.models.model_cases import build, by_path

SHAPE = ModelConfig(width=16, layers=1, heads=2, kv_heads=1, mlp_width=16)


def test_adapters_train_beside_a_pretrained_base(
    make_config: Any, store: Path, tokenizer: Any, tmp_path: Path
) -> None:
    _, params = build(SHAPE, vocab_size=tokenizer.vocab_size)
    save_pretrained(tmp_path / "base", SHAPE, params, tokenizer)
    config = RunConfig(
        data=make_config(store=str(store)),
        model=ModelConfig(pretrained=str(tmp_path / "base"), lora=LoraConfig(rank=4, targets=".")),
        training=TrainingConfig(
            steps=60, batch_size=4, eval_rows=4, learning_rate=0.1, warmup=1, eval_interval=60
        ),
        out=str(tmp_path / "run"),
    )
    facts = train(config)
    assert facts["parameters"] < 4 * 7 * (16 + 16) * 2  # adapters alone
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    evals = [r["domains"] for r in map(json.loads, lines) if r["kind"] == "eval"]
    before, after = (sum(d["loss"] for d in domains.values()) for domains in (evals[0], evals[-1]))
    assert after < before
    # The checkpoint opens as a model that writes: the base with the trained adapters.
    opened = open_model(tmp_path / "run")
    _, adapters = split(opened.params)
    moved = [x for path, x in by_path(adapters).items() if path.endswith("lora_b")]
    assert len(moved) == 7 and all(np.abs(x).max() > 0 for x in moved)
    base, _ = split(opened.params)
    jax.tree.map(np.testing.assert_array_equal, base, params)
    (written,) = complete(opened, "def ", new_tokens=1)
    assert written.tokens == [1]


@pytest.mark.parametrize("config", [ModelConfig(pretrained=""), ModelConfig(pretrained="nowhere")])
def test_a_start_from_no_folder_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"model\.pretrained is empty|nowhere"):
        resolve(config)


def test_a_shape_beside_that_of_a_folder_is_refused(tmp_path: Path) -> None:
    _, params = build(SHAPE)
    save_pretrained(tmp_path, SHAPE, params)
    with pytest.raises(ConfigError, match=r"model\.layers is 7.*has 1; take model=pretrained"):
        resolve(ModelConfig(pretrained=str(tmp_path), layers=7))
