"""Labels drawn from the model itself, which make a Fisher matrix exact in expectation.

Shapes: B rows, T tokens, V outputs.
"""

from __future__ import annotations

import jax

from dh_jax.batch import Batch
from dh_jax.functions import LogitsFn, Params


def sample_targets(logits_fn: LogitsFn, params: Params, batch: Batch, key: jax.Array) -> Batch:
    """The batch with every target drawn anew from the model's softmax; masks stay.

    Tokens stay too: each target is drawn given the true text before it, which makes the expected
    outer product of a document's gradient its Gauss-Newton matrix (Kunstner et al. 2019,
    arXiv:1905.12558).
    """
    drawn_BT = jax.random.categorical(key, logits_fn(params, batch))
    return batch._replace(targets_BT=drawn_BT.astype(batch.targets_BT.dtype))
