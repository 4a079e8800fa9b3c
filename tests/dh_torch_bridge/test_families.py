"""Families of transformers: stages against the whole model, and masks against the model's own."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from dh_jax.errors import ConfigError  # noqa: E402
from dh_torch_bridge import load_distributed_config  # noqa: E402
from dh_torch_bridge.data import document_mask  # noqa: E402
from dh_torch_bridge.distributed.parallelism import check_tensor  # noqa: E402
from dh_torch_bridge.distributed.pipeline import Stage, check_pipeline  # noqa: E402
from dh_torch_bridge.families import STAGED, refuse_other_attention  # noqa: E402
from dh_torch_bridge.losses import token_losses  # noqa: E402
from tests.dh_torch_bridge.layouts import make_batch  # noqa: E402

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PIPELINE = {"strategy": "fsdp2", "pipeline": 2, "schedule": "1f1b"}


def make(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZE | more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("family", STAGED)
@torch.no_grad()
def test_stages_compute_what_the_whole_model_does(family: str) -> None:
    model, batch = make(family), make_batch(0)
    check_pipeline(model, load_distributed_config(PIPELINE), 2)
    columns = ("position_ids", "segment_ids", "shift_labels")
    given = batch["input_ids"]
    for layers in (range(2), range(2, 4)):
        given = Stage(model, layers, autocast=None)(given, *(batch[name] for name in columns))
    torch.testing.assert_close(given, token_losses(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "more"),
    [("granite", {"embedding_multiplier": 12.0}), ("cohere", {"logit_scale": 0.25}),
     ("gemma", {})],
)  # fmt: skip
def test_families_that_scale_on_the_way_have_no_stages(family: str, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be cut into stages; families that can: llama"):
        check_pipeline(make(family, **more), load_distributed_config(PIPELINE), 2)


def test_a_table_that_scales_its_rows_is_not_split() -> None:
    with pytest.raises(ConfigError, match="GemmaTextScaledWordEmbedding, which does more"):
        check_tensor(make("gemma"), 2)


@torch.no_grad()
def test_a_window_as_long_as_a_row_is_the_model_s_own_and_a_shorter_one_is_refused() -> None:
    ids = torch.arange(16)[None] + 3
    ones = torch.ones_like(ids)
    model = make("mistral", sliding_window=16)
    found = model(input_ids=ids, attention_mask=document_mask(ones)).logits
    torch.testing.assert_close(found, model(input_ids=ids).logits)
    batch = {"input_ids": ids, "position_ids": ids - 3, "segment_ids": ones, "shift_labels": ids}
    token_losses(model, batch)
    with pytest.raises(ConfigError, match=r"4 tokens back .* rows have 16.*data.max_length=4"):
        token_losses(make("mistral", sliding_window=4), batch)
    refuse_other_attention(AutoConfig.for_model("qwen2", sliding_window=4), 16)  # not in use


def test_layers_without_full_attention_are_refused() -> None:
    with pytest.raises(ConfigError, match="linear_attention, which let a row's documents see"):
        refuse_other_attention(AutoConfig.for_model("qwen3_next"), 16)
