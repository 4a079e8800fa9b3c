"""Folders of Hugging Face from torch runs, read by transformers and by the JAX models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM  # noqa: E402

from dh_jax.config import ModelConfig, TorchRunConfig  # noqa: E402
from dh_jax.errors import ConfigError, StateError  # noqa: E402
from dh_jax.models.pretrained import load_pretrained, save_pretrained  # noqa: E402
from dh_jax.runconfig import save_config  # noqa: E402
from dh_torch_bridge.distributed.checkpoint import Checkpoints  # noqa: E402
from dh_torch_bridge.pretrained import export_run, read_weights  # noqa: E402
from dh_torch_bridge.train import build_llama  # noqa: E402

SHAPE = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, tied=True)


def equal(a: Any, b: Any) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(x, theirs[name]) for name, x in a.named_parameters())


def test_a_run_becomes_a_folder_and_a_folder_a_model(
    make_config: Any, store: Path, tokenizer: Any, tmp_path: Path
) -> None:
    run = TorchRunConfig(data=make_config(store=str(store)), model=SHAPE)
    save_config(tmp_path / "run", run)
    model = build_llama(SHAPE, tokenizer.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(3, model, optimizer, {})
        expected = {name: x.detach().clone() for name, x in model.named_parameters()}
        checkpoints.wait()
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        checkpoints.save(4, model, optimizer, {})
    shard = tmp_path / "run" / "checkpoints" / "4" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert export_run(tmp_path / "run", tmp_path / "out") == 3
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(x, expected[name]) for name, x in read.named_parameters())
    # And through JAX and back, as `dh train model.pretrained=` and `dh export` have it.
    jax_s = load_pretrained(tmp_path / "out", ModelConfig())
    save_pretrained(tmp_path / "back", jax_s.config, jax_s.params, tokenizer, dtype="float32")
    back = build_llama(SHAPE, tokenizer.vocab_size)
    read_weights(tmp_path / "back", back)
    assert equal(back, read)
    with pytest.raises(StateError, match=r"weight is \(512, 32\), the model's \(600, 32\)"):
        read_weights(tmp_path / "back", build_llama(SHAPE, 600))
    with pytest.raises(ConfigError, match="is there already"):
        export_run(tmp_path / "run", tmp_path / "out")
    shard.with_name("host.json").unlink()
    (tmp_path / "run" / "checkpoints" / "3" / "host.json").write_text("{}")
    with pytest.raises(StateError, match=r"no intact checkpoint .*step 3: host.json was changed"):
        export_run(tmp_path / "run", tmp_path / "other")
    assert np.isfinite(read.lm_head.weight.detach().numpy()).all()
