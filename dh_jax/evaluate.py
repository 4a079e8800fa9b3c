"""Held-out loss by domain, in nats a target and in bits a byte.

Bits per byte divides by the UTF-8 bytes that the judged targets stand for, so models with
different tokenizers compare. Special tokens stand for no bytes and are left out of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dh_jax.batch import Batch
from dh_jax.config import DataConfig
from dh_jax.data.loader import get_loader
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distributed.mesh import to_device
from dh_jax.functions import LossFn, Params, as_argument

Evaluate = Callable[[Params], dict[str, dict[str, float]]]


class _Sums(NamedTuple):
    loss: jax.Array  # nats over all targets
    targets: jax.Array
    text_loss: jax.Array  # nats over targets that stand for text
    bytes: jax.Array


def make_evaluation(
    config: DataConfig,
    tokenizer: TokenizerWrapper,
    loss_fn: LossFn,
    mesh: Mesh,
    *,
    rows: int,
    batch_size: int,
    split: str = "eval",
) -> Evaluate:
    """Read each source's evaluation rows once and return a function that judges parameters.

    Args:
        config: its sources' ``eval`` splits are used, in an order drawn from ``config.seed``
            (not the training seed), so that all runs of a config are judged on the same rows.
        rows: the most rows a domain; fewer if its split has fewer.
        batch_size: rows evaluated at once.
        split: ``eval``, or ``probe`` for the config's probes.

    Returns:
        ``params -> {domain: {"loss", "bits_per_byte", "targets"}}``; loss in nats a target.
    """
    batches = {
        # Every process reads all rows and places its part: streams end together.
        name: [
            to_device(batch, mesh, whole=True)
            for batch in _rows(config, tokenizer, name, rows, batch_size, split)
        ]
        for name in (config.sources if split == "eval" else config.probes or config.sources)
    }
    token_bytes_V = jnp.asarray(tokenizer.token_bytes_V)

    @jax.jit
    def sums(loss_fn: LossFn, params: Params, batch: Batch) -> _Sums:
        loss_BT = loss_fn(params, batch, jax.random.key(0))
        bytes_BT = jnp.where(batch.loss_mask_BT, token_bytes_V[batch.targets_BT], 0)
        text_BT = bytes_BT > 0
        return _Sums(
            loss_BT.sum(), batch.loss_mask_BT.sum(), (loss_BT * text_BT).sum(), bytes_BT.sum()
        )

    loss = as_argument(loss_fn)

    def evaluate(params: Params) -> dict[str, dict[str, float]]:
        return {
            name: _figures([sums(loss, params, b) for b in group])
            for name, group in batches.items()
        }

    return evaluate


def _rows(
    config: DataConfig,
    tokenizer: TokenizerWrapper,
    source: str,
    rows: int,
    batch_size: int,
    split: str,
) -> list[Batch]:
    with get_loader(
        config,
        tokenizer=tokenizer,
        batch_size=batch_size,
        split=split,
        sources=[source],
        shuffle=True,
        prefetch=0,
    ) as loader:
        return [
            batch for _, batch in zip(range(math.ceil(rows / batch_size)), loader, strict=False)
        ]


def _figures(parts: list[_Sums]) -> dict[str, Any]:
    loss, targets, text_loss, size = (
        float(np.sum([np.float64(x) for x in column])) for column in zip(*parts, strict=True)
    )
    return {
        "loss": loss / targets if targets else math.nan,
        "bits_per_byte": text_loss / size / math.log(2) if size else math.nan,
        "targets": int(targets),
    }
