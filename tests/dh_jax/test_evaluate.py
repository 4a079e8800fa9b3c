"""Evaluation against an independent count: one document at a time, bytes of the text itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch
from dh_jax.config import MeshConfig
from dh_jax.data.store import open_store
from dh_jax.distributed.mesh import make_mesh
from dh_jax.evaluate import make_evaluation


def test_loss_and_bits_per_byte_are_those_of_the_documents(
    make_config: Any, store: Path, tokenizer: Any
) -> None:
    """A unigram model, whose loss of a document can be added up token by token."""
    log_probs_V = np.asarray(jax.nn.log_softmax(jnp.sin(jnp.arange(tokenizer.vocab_size) * 1.7)))

    def loss(params: Any, batch: Batch, key: Any) -> Any:
        return jnp.where(batch.loss_mask_BT, -jnp.asarray(log_probs_V)[batch.targets_BT], 0.0)

    config = make_config(store=str(store))
    evaluate = make_evaluation(
        config, tokenizer, loss, make_mesh(MeshConfig()), rows=10**6, batch_size=4
    )
    judged = evaluate({})
    opened = open_store(store)
    for name in config.sources:
        documents = opened.documents(name, "eval")
        nats = text_nats = size = targets = 0.0
        for d in range(documents.ids_D.size):
            start, length = documents.starts_D[d], documents.lengths_D[d]
            tokens = documents.shards[documents.shards_D[d]].tokens[start : start + length]
            for token in np.asarray(tokens)[1:]:  # the first has no context to be predicted from
                nats -= float(log_probs_V[token])
                targets += 1
                if token != tokenizer.eos_id:
                    text_nats -= float(log_probs_V[token])
            text = tokenizer.decode([t for t in tokens[1:] if t != tokenizer.eos_id])
            size += len(text.encode())
        assert judged[name]["targets"] == targets
        np.testing.assert_allclose(judged[name]["loss"], nats / targets, rtol=1e-5)
        bits = text_nats / size / math.log(2)
        np.testing.assert_allclose(judged[name]["bits_per_byte"], bits, rtol=1e-5)
