"""What leaves the house: a run on a mesh, read again by transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dh_jax.completion import open_model
from dh_jax.config import LoraConfig, MeshConfig, ModelConfig, RunConfig, TrainingConfig
from dh_jax.errors import ConfigError, StateError
from dh_jax.export import export_run
from dh_jax.models import decoder, lora
from dh_jax.train import train
from tests.dh_jax.models.model_cases import pack, words

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, mlp_width=64)


def run_of(config: RunConfig, mesh: MeshConfig, **model: Any) -> Path:
    """A run of two steps."""
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(SHAPE, **model),
        mesh=mesh,
        training=TrainingConfig(
            steps=2, batch_size=4, eval_rows=4, learning_rate=0.1, warmup=1, eval_interval=60
        ),
    )
    train(config)
    return Path(config.out)


@pytest.fixture
def config(make_config: Any, store: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(data=make_config(store=str(store)), out=str(tmp_path / "run"))


@pytest.mark.filterwarnings("ignore:.*stays whole.*:UserWarning", "ignore::FutureWarning")
def test_transformers_computes_what_the_run_computed(
    config: RunConfig, tokenizer: Any, tmp_path: Path
) -> None:
    run = run_of(config, MeshConfig(fsdp=4, tensor=2), lora=LoraConfig(rank=2), scan_layers=True)
    ours = open_model(run)
    tokens = words(np.random.default_rng(0), 40)
    batch = pack([[tokens]], len(tokens))
    logits_TV = jax.jit(decoder.logits_fn(ours.graph))(ours.params, batch)[0]
    folder = export_run(run, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found_TV = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(found_TV, logits_TV, atol=1e-5)
    read = transformers.AutoTokenizer.from_pretrained(folder)
    assert read("def f(x):")["input_ids"] == tokenizer.encode("def f(x):").tolist()[:-1]  # no EOS

    _, trained = lora.split(ours.params)
    export_run(run, tmp_path / "adapters", adapters=True)
    again = lora.load_adapters(tmp_path / "adapters", trained, LoraConfig(rank=2))
    jax.tree.map(np.testing.assert_array_equal, again, trained)
    with pytest.raises(ConfigError, match="already exists"):
        export_run(run, tmp_path / "adapters", adapters=True)


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.yaml there"):
        export_run(tmp_path, tmp_path / "out")
    run = run_of(config, MeshConfig(), linear="ternary", layers=1)
    with pytest.raises(ConfigError, match="leave out --adapters"):
        export_run(run, tmp_path / "out", adapters=True)
    with pytest.raises(ConfigError, match="'ternary' has no counterpart"):
        export_run(run, tmp_path / "out")
    (run / "checkpoints").rename(run / "elsewhere")
    with pytest.raises(StateError, match="no checkpoint in"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
