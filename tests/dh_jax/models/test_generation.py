"""Decoding with a cache: the tokens of decoding without one, of transformers, of the softmax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.config import LoraConfig, ModelConfig
from dh_jax.errors import ConfigError
from dh_jax.models import decoder, generation, lora
from dh_jax.models.generation import Sampling, generate, stream, truncate
from dh_jax.models.pretrained import load_pretrained, save_pretrained
from tests.dh_jax.models.model_cases import FAMILIES, LLAMA, V, build, pack, words

N = 12
LENGTHS = (1, 5, 70)  # of prompts in one batch, on both sides of a step of padding


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [words(rng, length) for length in lengths]


def without_cache(graph: Any, params: Any, given: list[np.ndarray], count: int) -> np.ndarray:
    """Greedy by a whole forward pass a token; each prompt is a row of its own."""
    logits = jax.jit(decoder.logits_fn(graph))
    length, rows = max(map(len, given)) + count, list(given)
    for _ in range(count):
        found = np.asarray(logits(params, pack([[row] for row in rows], length)))
        rows = [np.append(row, found[i, len(row) - 1].argmax()) for i, row in enumerate(rows)]
    return np.stack([row[-count:] for row in rows])


slow = pytest.mark.slow
UNTIED = FAMILIES["llama untied"]  # tied ones repeat themselves
SMALL = dataclasses.replace(UNTIED, layers=1)
CASES: dict[str, ModelConfig] = {
    "qwen2": dataclasses.replace(FAMILIES["qwen2"], tied=False),
    "qwen3 scanned": dataclasses.replace(FAMILIES["qwen3"], scan_layers=True),
}
SLOW = {
    "llama": UNTIED,
    "llama tied": LLAMA,
    "llama rematerialised": dataclasses.replace(UNTIED, remat="nothing_saveable"),
    "qwen2 scanned": dataclasses.replace(CASES["qwen2"], scan_layers=True),
    "qwen3": FAMILIES["qwen3"],
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=slow) for case in SLOW)])
def test_greedy_tokens_are_those_of_whole_forward_passes(case: str) -> None:
    graph, params = build((CASES | SLOW)[case])
    found = generate(graph, params, prompts(), N, stop_ids=[-1])
    assert found.tokens_BN.shape == (3, N) and found.lengths_B.tolist() == [N] * 3
    np.testing.assert_array_equal(found.tokens_BN, without_cache(graph, params, prompts(), N))
    assert len(set(found.tokens_BN.flat)) > (4 if "tied" not in case else 1)


@slow
def test_bfloat16_writes_nearly_what_whole_forward_passes_do() -> None:
    graph, params = build(dataclasses.replace(SMALL, dtype="bfloat16"))
    found = generate(graph, params, prompts(), 4).tokens_BN
    # Sums of another order, rounded to 8 bits: a row may part from the other at a tie.
    assert (found == without_cache(graph, params, prompts(), 4)).mean() > 0.7


@pytest.mark.slow
def test_adapters_write_as_their_merged_weights_do() -> None:
    graph, base = build(SMALL)
    config = LoraConfig(rank=2, targets="query$|mlp/up$")
    adapted, adapters = lora.adapt(graph, base, config, jax.random.key(0))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.3, x.shape)), adapters)
    plain, merged = (
        generate(graph, params, prompts(), N).tokens_BN
        for params in (base, lora.merge(base, adapters, config))
    )
    ours = generate(adapted, lora.combine(base, adapters), prompts(), N).tokens_BN
    np.testing.assert_array_equal(ours, merged)
    assert (ours != plain).any()


@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
def test_greedy_tokens_and_stops_are_those_of_transformers(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    graph, params = build(CASES["qwen2"])
    save_pretrained(tmp_path / "model", CASES["qwen2"], params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    given, free = prompts(), generate(graph, params, prompts(), N, stop_ids=[-1])
    stop = int(free.tokens_BN[1, 4])  # ends one row early
    found = generate(graph, params, given, N, stop_ids=[stop])
    longest = max(LENGTHS)
    ids = np.stack([np.pad(p, (longest - len(p), 0)) for p in given])
    mask = np.stack([np.arange(longest) >= longest - len(p) for p in given]).astype(int)
    wanted = theirs.generate(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), do_sample=False,
        max_new_tokens=N, eos_token_id=stop, pad_token_id=0,
    )[:, longest:].numpy()  # fmt: skip
    np.testing.assert_array_equal(found.tokens_BN[:, : wanted.shape[1]], wanted)
    assert found.stopped_B[1] and found.lengths_B[1] <= 5 and not found.stopped_B.all()
    for row, length, stopped in zip(*found, strict=True):
        assert (length == N or stopped) and stopped == (row[length - 1] == stop)
        assert not row[length:].any()


def test_looking_on_changes_nothing_and_ends_when_all_rows_have_stopped() -> None:
    graph, params = build(SMALL)
    sampling = Sampling(temperature=1.0)
    whole = generate(graph, params, prompts(), N, sampling=sampling)
    parts = list(stream(graph, params, prompts(), N, sampling=sampling, every=5))
    assert [int(part.lengths_B.max()) for part in parts] == [1, 6, 11, 12]
    for part in parts:
        written = int(part.lengths_B.max())
        np.testing.assert_array_equal(part.tokens_BN[:, :written], whole.tokens_BN[:, :written])
    all_ids = list(range(V))
    (only,) = stream(graph, params, prompts(), N, stop_ids=all_ids, sampling=sampling)
    assert only.stopped_B.all() and only.lengths_B.tolist() == [1, 1, 1]


def test_a_row_is_drawn_alike_whatever_is_written_beside_it() -> None:
    graph, params = build(SMALL)
    sampling, key = Sampling(temperature=1.0), jax.random.key(3)
    three = generate(graph, params, prompts(), N, sampling=sampling, key=key)
    one = generate(graph, params, prompts()[:1], N, sampling=sampling, key=key)
    np.testing.assert_array_equal(one.tokens_BN[0], three.tokens_BN[0])
    other = generate(graph, params, prompts(), N, sampling=sampling, key=jax.random.key(4))
    assert (other.tokens_BN != three.tokens_BN).any(1).all()


def test_nothing_is_compiled_again_for_another_prompt_temperature_or_filter_value() -> None:
    graph, params = build(SMALL)
    counts = []
    for lengths, sampling in (((3,), (0.5, 5, 0.5)), ((9,), (2.0, 9, 0.9)), ((64,), (1.0, 1, 0.1))):
        generate(graph, params, prompts(lengths), 3, sampling=Sampling(*sampling))
        sizes = (f._cache_size() for f in (generation._prefill, generation._decode))  # type: ignore[attr-defined]
        counts.append(tuple(sizes))
    assert counts[0] == counts[1] == counts[2]


# --- drawing ---------------------------------------------------------------------------------


def literal_filter(logits: np.ndarray, temperature: float, k: int | None, p: float | None) -> Any:
    """Probabilities after the filters: sort, cut, add up, one row at a time in float64."""
    x = logits.astype(np.float64) / temperature
    order = np.argsort(-x, kind="stable")
    kept = list(order if k is None else order[:k])
    if p is not None:
        shares = np.exp(x[kept] - x.max())
        shares /= shares.sum()
        total, nucleus = 0.0, []
        for token, share in zip(kept, shares, strict=True):
            nucleus.append(token)
            total += share
            if total >= p:
                break
        kept = nucleus
    out = np.zeros(len(x))
    out[kept] = np.exp(x[kept] - x.max())
    return out / out.sum()


FILTERS = jax.jit(truncate)


@pytest.mark.parametrize("k", [None, 1, 7, V + 5])
@pytest.mark.parametrize("p", [None, 0.01, 0.6, 0.97])
def test_filters_leave_the_tokens_that_their_definition_names(k: Any, p: Any) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (40, V)).astype(np.float32)
    left = jax.nn.softmax(FILTERS(jnp.asarray(logits), Sampling(0.7, k, p)), axis=-1)
    for row, found in zip(logits, np.asarray(left), strict=True):
        wanted = literal_filter(row, 0.7, k, p)
        np.testing.assert_array_equal(found > 0, wanted > 0)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_equals_of_the_last_token_kept_are_kept_too() -> None:
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2]]))
    for sampling in (Sampling(1.0, 2, None), Sampling(1.0, None, 0.5)):
        assert np.isfinite(truncate(logits, sampling)).all()
    assert np.isfinite(truncate(logits, Sampling(1.0, 1, None))).sum() == 1


@pytest.mark.slow
def test_pairs_of_tokens_are_drawn_with_their_exact_probabilities() -> None:
    """Chi-square over all pairs: the second token's distribution comes from the cache."""
    from scipy.stats import chi2

    small = 6
    graph, params = decoder.build(SMALL, small, jax.random.key(2))
    prompt, rows, temperature = np.array([1, 4, 2]), 2000, 1.5
    sampling = Sampling(temperature=temperature, top_k=5)
    found = generate(graph, params, [prompt] * rows, 2, sampling=sampling)
    drawn = np.zeros((small, small))
    np.add.at(drawn, (found.tokens_BN[:, 0], found.tokens_BN[:, 1]), 1)
    batch = pack([[np.append(prompt, first)] for first in range(small)], 4)
    logits = np.asarray(jax.jit(decoder.logits_fn(graph))(params, batch))
    first = literal_filter(logits[0, 2], temperature, 5, None)
    second = np.stack([literal_filter(logits[i, 3], temperature, 5, None) for i in range(small)])
    wanted = rows * first[:, None] * second
    assert not drawn[wanted == 0].any() and np.ptp(second, axis=0).max() > 0.1
    cells = wanted > 0
    statistic = ((drawn - wanted)[cells] ** 2 / wanted[cells]).sum()
    assert chi2.sf(statistic, cells.sum() - 1) > 1e-3


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[1], []]}, r"prompt 1 has shape \(0,\)"),
        ({"prompts": [[1, V]]}, f"id {V}, but .* has {V}"),
        ({"prompts": [[-1, 2]]}, "has the id -1"),
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"sampling": Sampling(-1.0)}, "temperature is -1"),
        ({"sampling": Sampling(1.0, top_k=0)}, "top_k is 0"),
        ({"sampling": Sampling(1.0, top_p=0.0)}, r"top_p is 0\.0"),
    ],
)
def test_what_cannot_be_written_is_refused(changes: Any, named: str) -> None:
    graph, params = build(SMALL)
    with pytest.raises(ConfigError, match=named) as caught:
        generate(graph, params, **{"prompts": [[1, 2]], "new_tokens": 2, **changes})
    assert "\n" not in str(caught.value)


def test_dynamic_scaling_ends_where_its_frequencies_do() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    config = dataclasses.replace(LLAMA, layers=1, rope_scaling=dynamic, max_positions=20)
    graph, params = build(config)
    assert generation._aligned(graph, params, [[1] * 12], 8)[0].shape == (1, 20)
    with pytest.raises(ConfigError, match="at most 7"):
        generate(graph, params, [[1] * 13], 8)


# --- SmolLM2 ---------------------------------------------------------------------------------


@slow
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
def test_smollm2_writes_what_transformers_has_it_write(smollm2_folder: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from dh_jax.data.tokenization import TokenizerWrapper

    tokenizer = TokenizerWrapper.load(smollm2_folder, add_eos=False)
    messages = [{"role": "user", "content": "Explain photosynthesis in two sentences."}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    given = [
        tokenizer.encode("The capital of France is"),
        tokenizer.encode("def fibonacci(n):\n"),
        tokenizer.encode_rendered(chat),
    ]
    model = load_pretrained(smollm2_folder, ModelConfig())
    found = generate(model.graph, model.params, given, 100, stop_ids=[tokenizer.eos_id or 0])
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_folder, dtype=torch.float32
    )
    torch.set_num_threads(1)
    for ids, row, length in zip(given, found.tokens_BN, found.lengths_B, strict=True):
        one = torch.from_numpy(ids.astype(np.int64))[None]
        wanted = theirs.generate(
            one, attention_mask=torch.ones_like(one), do_sample=False, max_new_tokens=100
        )[0, len(ids) :].numpy()
        print(repr(tokenizer.decode(row[:length])))
        np.testing.assert_array_equal(row[:length], wanted)
