"""GGUF to folder: against the format's definition, transformers and the gguf package's writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from dh_jax.cli import main
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, DataError
from dh_jax.models.gguf import convert_gguf
from dh_jax.models.pretrained import load_pretrained
from tests.dh_jax.data.tokenizer_cases import load_smollm2, smollm2_file
from tests.dh_jax.models.model_cases import FAMILIES, V, build, by_path

gguf = pytest.importorskip("gguf")


def stored(folder: Path, name: str) -> np.ndarray:
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return np.asarray(file.get_tensor(name))


def halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Row ``2 i + half`` of a head in GGUF is row ``half * width / 2 + i``, written as a loop."""
    width = len(array) // heads
    out = np.empty_like(array)
    for head in range(heads):
        for i in range(width // 2):
            for half in (0, 1):
                out[head * width + half * width // 2 + i] = array[head * width + 2 * i + half]
    return out


def test_tensors_are_what_the_blocks_of_the_file_mean(smollm2_folder: Path) -> None:
    """Q4_1: 32 weights as float16 scale, float16 least value, and 16 bytes of two nibbles."""
    tensors = {t.name: t for t in gguf.GGUFReader(smollm2_file()).tensors}

    def literal(name: str) -> np.ndarray:
        tensor = tensors[name]
        assert tensor.tensor_type.name == "Q4_1"
        blocks = np.asarray(tensor.data).reshape(-1, 20)
        scale, least = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
        nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        weights = nibbles * scale[:, None] + least[:, None]
        return weights.reshape(int(tensor.shape[1]), int(tensor.shape[0]))

    for name, theirs, heads in (
        ("blk.3.ffn_down.weight", "mlp.down_proj", 0),
        ("blk.3.attn_v.weight", "self_attn.v_proj", 0),
        ("blk.3.attn_q.weight", "self_attn.q_proj", 9),
        ("blk.3.attn_k.weight", "self_attn.k_proj", 3),
    ):
        wanted = literal(name)
        wanted = halves(wanted, heads) if heads else wanted
        found = stored(smollm2_folder, f"model.layers.3.{theirs}.weight")
        np.testing.assert_array_equal(found, wanted, err_msg=name)


def test_the_folder_has_the_config_and_tokenizer_of_the_file(smollm2_folder: Path) -> None:
    model = load_pretrained(smollm2_folder)
    c = model.config
    assert (c.layers, c.width, c.heads, c.kv_heads, c.rope_theta) == (30, 576, 9, 3, 1e5)
    assert c.tied and c.norm_epsilon == 1e-5 and c.vocab_size == 49_152
    assert sum(x.size for x in by_path(model.params).values()) == 134_515_008
    ours, file = TokenizerWrapper.load(smollm2_folder, add_eos=False), load_smollm2()
    assert ours.fingerprint == file.fingerprint and ours.chat_template == file.chat_template


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
def test_weights_equal_those_that_transformers_dequantises(smollm2_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    path = smollm2_file()
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name
    )
    state = theirs.state_dict()
    with safe_open(smollm2_folder / "model.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(state) - {"lm_head.weight"}
        for name in state.keys() - {"lm_head.weight"}:
            wanted = state[name].float().numpy()
            np.testing.assert_array_equal(file.get_tensor(name), wanted, err_msg=name)


def write_gguf(
    path: Path, case: str, *, vocab_size: int = V, leave_out: str = "-", **keys: Any
) -> Any:
    """A small model of random weights, written as llama.cpp's converter does."""
    config = FAMILIES[case]
    family = case.split()[0]
    _, params = build(config, vocab_size=vocab_size)
    writer = gguf.GGUFWriter(path, keys.get("family", family))
    writer.add_block_count(config.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width or config.width // config.heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope_theta)
    if "scaling" in keys:
        writer.add_rope_scaling_type(keys["scaling"])
    modules = {
        "attention_norm": "attn_norm", "attention/query": "attn_q", "attention/key": "attn_k",
        "attention/value": "attn_v", "attention/out": "attn_output", "mlp_norm": "ffn_norm",
        "mlp/gate": "ffn_gate", "mlp/up": "ffn_up", "mlp/down": "ffn_down",
        "attention/query_norm": "attn_q_norm", "attention/key_norm": "attn_k_norm",
    }  # fmt: skip
    outer = {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}
    for name, leaf in by_path(params).items():
        module, _, kind = name.rpartition("/")
        array = np.asarray(leaf).T if kind == "kernel" else np.asarray(leaf)
        if module in outer:
            there = outer[module]
        else:
            _, layer, inner = module.split("/", 2)
            there = f"blk.{layer}.{modules[inner]}"
            if family == "llama" and inner in ("attention/query", "attention/key"):
                heads = config.heads if inner.endswith("query") else config.kv_heads
                order = np.argsort(halves(np.arange(len(array)), heads))
                array = array[order]
        if there != leave_out:
            writer.add_tensor(
                f"{there}.{'bias' if kind == 'bias' else 'weight'}", np.ascontiguousarray(array)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_comes_out_as_it_went_in(
    case: str, tmp_path: Path, tokenizer: TokenizerWrapper, capsys: Any
) -> None:
    params = write_gguf(tmp_path / "model.gguf", case, vocab_size=tokenizer.vocab_size)
    tokenizer.save(tmp_path / "words")
    arguments = [
        str(tmp_path / "model.gguf"),
        str(tmp_path / "out"),
        "--tokenizer",
        str(tmp_path / "words"),
    ]
    assert main(["convert", *arguments]) == 0
    said = capsys.readouterr().out.strip()
    found = load_pretrained(tmp_path / "out")
    count = sum(leaf.size for leaf in by_path(found.params).values())
    assert said.startswith(f"{tmp_path / 'out'}: {count:,} parameters, ")
    assert found.config.vocab_size == tokenizer.vocab_size
    for name, leaf in by_path(params).items():
        np.testing.assert_array_equal(by_path(found.params)[name], leaf, err_msg=name)


def test_other_models_and_damaged_files_are_refused_in_one_line(
    tmp_path: Path, tokenizer: TokenizerWrapper
) -> None:
    tokenizer.save(tmp_path / "words")
    words = str(tmp_path / "words")

    def refused(error: type[Exception], match: str, **options: Any) -> None:
        path = tmp_path / "model.gguf"
        write_gguf(path, "llama", **options)
        with pytest.raises(error, match=match) as caught:
            convert_gguf(path, tmp_path / "out", tokenizer=words)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    refused(ConfigError, "architecture 'gemma' is not built", family="gemma")
    refused(ConfigError, "61 rows, fewer than the tokenizer's")
    refused(DataError, "no tensor 'output_norm.weight'", leave_out="output_norm")
    refused(ConfigError, "scaled rotary positions", scaling=gguf.RopeScalingType.YARN)
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged or cut short"):
        convert_gguf(tmp_path / "cut.gguf", tmp_path / "out", tokenizer=words)
    with pytest.raises(ConfigError, match="no such file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")
