"""Which documents helped or harmed a probe: scored at the end of a run, for its report."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch
from dh_jax.config import InfluenceConfig
from dh_jax.data.loader import Loader
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distributed.mesh import to_host
from dh_jax.functions import Params
from dh_jax.influence.calculator import DataInfCalculator
from dh_jax.sampling import Samplers

SHOWN = 8  # documents kept at either end
EXCERPT = 1200  # characters of text kept of each
SHORTEST = 32  # tokens; the mean loss of a shorter piece says little


def rank_documents(
    config: InfluenceConfig,
    samplers: Samplers,
    calculator: DataInfCalculator,
    params: Params,
    tokenizer: TokenizerWrapper,
    key: jax.Array,
) -> dict[str, Any]:
    """Score documents of every source against the target probes with DataInf.

    Args:
        config: ``documents`` says how many of each source (at least) are scored.
        samplers: where training and probe rows come from.
        calculator: of the trained loss.
        params: the trained parameters.
        tokenizer: turns tokens back into text.
        key: random key.

    Returns:
        The content of ``documents.json``: targets, how many were scored, and the documents of
        lowest (helpful) and highest (harmful) score, with source, id in hex, score and text.
    """
    sources = samplers.draw("train")
    rows: Batch = jax.tree.map(lambda *x: jnp.concatenate(x), *sources.values())
    fitted = calculator.fit(params, rows, key)
    probes = samplers.draw("probe")
    gradients = {n: calculator.probe_gradient(params, b, key) for n, b in probes.items()}
    v = jax.tree.map(
        lambda *parts: sum(w * g for w, g in zip(samplers.targets.values(), parts, strict=True)),
        *(gradients[name] for name in samplers.targets),
    )
    query = calculator.precondition(fitted, v)
    scored: list[dict[str, Any]] = []
    for name in sources:
        loader = samplers.loader("train", name)
        found: dict[str, dict[str, Any]] = {}
        for _ in range(8 * config.documents):  # a source may have fewer documents than asked for
            if len(found) >= config.documents:
                break
            batch = next(loader)
            scores_BS = to_host(
                calculator.score_documents(
                    params, query, batch, loader.config.packing.max_segments, key
                )
            )
            found |= _documents(name, batch, loader, scores_BS, tokenizer)
        scored += found.values()
    scored.sort(key=lambda document: document["score"])
    shown = scored if len(scored) <= 2 * SHOWN else scored[:SHOWN] + scored[-SHOWN:]
    return {"targets": samplers.targets, "scored": len(scored), "documents": shown}


def _documents(
    source: str, batch: Batch, loader: Loader, scores_BS: np.ndarray, tokenizer: TokenizerWrapper
) -> dict[str, dict[str, Any]]:
    """Id -> record of every segment of a batch that is long enough to judge."""
    origins = loader.origins
    found = {}
    for b, s in zip(*np.nonzero(origins.lengths_BS >= SHORTEST), strict=True):
        tokens = np.asarray(batch.tokens_BT[b])[np.asarray(batch.segment_ids_BT[b]) == s + 1]
        identity = f"{int(origins.document_ids_BS[b, s]):#018x}"
        found[identity] = {
            "source": source,
            "id": identity,
            "offset": int(origins.offsets_BS[b, s]),
            "score": float(scores_BS[b, s]),
            "text": tokenizer.decode(tokens)[:EXCERPT],
        }
    return found
