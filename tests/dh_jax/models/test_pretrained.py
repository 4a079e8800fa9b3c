"""Checkpoints in and out: transformers computes the same from the same folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dh_jax.config import ModelConfig
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, DataError
from dh_jax.models import decoder
from dh_jax.models.hf_config import to_hf
from dh_jax.models.pretrained import load_pretrained, save_pretrained
from dh_jax.models.rotary import rotary
from tests.dh_jax.data.tokenizer_cases import real_texts
from tests.dh_jax.models.model_cases import FAMILIES, LLAMA, V, build, by_path, pack, words

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")

TOKENS = 150
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}  # fmt: skip
CASES = FAMILIES | {
    f"llama {kind}": dataclasses.replace(
        LLAMA, rope_scaling=scaling, max_positions=256, head_width=16, rope_theta=100.0
    )
    for kind, scaling in SCALINGS.items()
}


def theirs(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None]).logits[0].numpy()


def our_logits(graph: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    batch = pack([[tokens]], len(tokens))
    return np.asarray(jax.jit(decoder.logits_fn(graph))(params, batch)[0])


@pytest.mark.parametrize("case", CASES)
def test_every_family_goes_to_transformers_and_back(case: str, tmp_path: Path) -> None:
    config = CASES[case]
    graph, params = build(config)
    save_pretrained(tmp_path / "ours", config, params)
    model = theirs(tmp_path / "ours")
    tokens = words(np.random.default_rng(0), TOKENS)
    wanted = their_logits(model, tokens)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(our_logits(graph, params, tokens), wanted, atol=1e-5)
    # A folder that transformers wrote reads as the very same model.
    model.save_pretrained(tmp_path / "theirs")
    back = load_pretrained(tmp_path / "theirs", LLAMA)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    assert back.graph == graph
    same = {f.name for f in dataclasses.fields(config)} - {"vocab_size", "max_positions"}
    for name in same - {"head_width"}:
        assert getattr(back.config, name) == getattr(config, name), name


def test_scaling_moves_the_logits_so_that_the_comparison_means_something() -> None:
    tokens = words(np.random.default_rng(0), TOKENS)
    plain = dataclasses.replace(CASES["llama yarn"], rope_scaling={})
    _, params = build(plain)
    base = our_logits(decoder.abstract_graph(plain, V), params, tokens)
    for kind in ("linear", "llama3", "yarn"):
        graph = decoder.abstract_graph(CASES[f"llama {kind}"], V)
        assert np.abs(our_logits(graph, params, tokens) - base).max() > 0.01, kind


def test_shards_scanned_layers_and_bfloat16_hold_the_same_numbers(tmp_path: Path) -> None:
    config = FAMILIES["qwen2"]
    _, params = build(config)
    save_pretrained(tmp_path / "one", config, params)
    scanned = dataclasses.replace(config, scan_layers=True)
    save_pretrained(
        tmp_path / "many", scanned, decoder.stack_layers(params), shard_bytes=4000, dtype="bfloat16"
    )
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)
    back = load_pretrained(tmp_path / "many", scanned)
    jax.tree.map(np.testing.assert_array_equal, decoder.unstack_layers(back.params), rounded)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "one").params, params)
    same = theirs(tmp_path / "many").state_dict()
    np.testing.assert_array_equal(
        same["model.layers.1.mlp.up_proj.weight"].numpy().T,
        rounded["layers"]["1"]["mlp"]["up"]["kernel"],
    )


@pytest.mark.parametrize("scan", [False, True])
def test_each_device_reads_its_own_part(scan: bool, tmp_path: Path, monkeypatch: Any) -> None:
    config = dataclasses.replace(FAMILIES["qwen3"], scan_layers=scan)
    _, params = build(config)
    save_pretrained(tmp_path / "model", config, params)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))

    def place(shapes: Any) -> Any:
        def one(x: Any) -> NamedSharding:
            spec = ["fsdp", "tensor"] if len(x.shape) > 1 and not x.shape[-1] % 2 else []
            spec = spec if len(x.shape) < 3 else [None, *spec]
            return NamedSharding(
                mesh, PartitionSpec(*spec if not spec or x.shape[-2] % 4 == 0 else [])
            )

        return jax.tree.map(one, shapes)

    whole = load_pretrained(tmp_path / "model", config).params
    parts = load_pretrained(tmp_path / "model", config, shardings=place).params
    kernel = by_path(parts)[
        "layers/attention/query/kernel" if scan else "layers/0/attention/query/kernel"
    ]
    assert kernel.sharding.spec == PartitionSpec(*([None] if scan else []), "fsdp", "tensor")
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_what_cannot_be_computed_or_is_damaged_is_refused_in_one_line(tmp_path: Path) -> None:
    _, params = build(LLAMA)
    save_pretrained(tmp_path / "good", LLAMA, params)
    config = json.loads((tmp_path / "good/config.json").read_text())

    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        changed = {k: v for k, v in (config | changes).items() if v != "gone"}
        (tmp_path / "good/config.json").write_text(json.dumps(changed))
        with pytest.raises(error, match=match) as caught:
            load_pretrained(tmp_path / "good")
        assert "\n" not in str(caught.value)

    refused(ConfigError, "'lama' .did you mean 'llama'", model_type="lama")
    refused(ConfigError, "attention_bias True", attention_bias=True)
    refused(ConfigError, "hidden_act 'gelu'", hidden_act="gelu")
    refused(ConfigError, "'longrope' is not read", rope_parameters={"rope_type": "longrope"})
    refused(ConfigError, "factor is None", rope_parameters={"rope_type": "linear"})
    refused(ConfigError, "lacks 'hidden_size'", hidden_size="gone")
    refused(DataError, r"k_proj.weight is \[8, 24\], but", head_dim=8)
    refused(DataError, "9 tensors that its config.json", num_hidden_layers=1)
    refused(DataError, r"no tensor 'model.layers.2\.", num_hidden_layers=3)
    refused(DataError, r"no tensor 'model.layers.0.self_attn.k_norm", model_type="qwen3")
    (tmp_path / "good/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="already exists"):
        save_pretrained(tmp_path / "good", LLAMA, params)
    weights = tmp_path / "good/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        load_pretrained(tmp_path / "good")
    weights.unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        load_pretrained(tmp_path / "good")
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        load_pretrained(tmp_path / "none")
    with pytest.raises(ConfigError, match="dh convert"):
        load_pretrained(tmp_path / "model.gguf")


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5])
def test_frequencies_are_those_of_transformers_to_the_bit(theta: float) -> None:
    """A difference of 7e-8 is one of 1e-4 radians at position 2,000."""
    config = dataclasses.replace(LLAMA, head_width=64, rope_theta=theta)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.AutoConfig.for_model(**to_hf(config, V, "float32"))
    )
    assert np.float32(rotary(config).frequencies).tolist() == theirs.inv_freq.tolist()


def test_rows_longer_than_dynamic_scaling_allows_are_refused() -> None:
    config = dataclasses.replace(CASES["llama dynamic"], max_positions=100)
    graph, params = build(config)
    with pytest.raises(ConfigError, match=r"rows of 150 tokens: above model\.max_positions 100"):
        our_logits(graph, params, words(np.random.default_rng(0), TOKENS))


# --- SmolLM2 ---------------------------------------------------------------------------------


def compare_real_logits(folder: Path, count: int, characters: int) -> None:
    """On real text: equal to 2e-4, and the same choice wherever it is clear."""
    tokenizer = TokenizerWrapper.load(folder, add_eos=False)
    texts = [tokenizer.encode(text) for text in real_texts(characters)]
    tokens = np.concatenate([ids[: count // 4] for ids in texts]).astype(np.int64)[:count]
    assert len(tokens) == count
    # Scanned: thirty layers compile in the time of one.
    model = load_pretrained(folder, ModelConfig(scan_layers=True, precision="highest"))
    torch.set_num_threads(1)  # its threads would wait for one another on shared cores
    wanted = their_logits(theirs(folder), tokens)
    ours = our_logits(model.graph, model.params, tokens)
    error = np.abs(ours - wanted).max()
    two = np.sort(wanted, axis=-1)[:, -2:]
    clear = two[:, 1] - two[:, 0] > 4e-4
    print(f"{count} tokens: largest error {error:.1e}; clear choices {clear.mean():.2%}")
    assert error < 2e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(ours.argmax(-1)[clear], wanted.argmax(-1)[clear])


@pytest.mark.slow
def test_logits_of_smollm2_equal_those_of_transformers(smollm2_folder: Path) -> None:
    compare_real_logits(smollm2_folder, 200, 4_000)


@pytest.mark.slow
def test_logits_of_smollm2_equal_those_of_transformers_on_2000_tokens(smollm2_folder: Path) -> None:
    compare_real_logits(smollm2_folder, 2000, 20_000)
