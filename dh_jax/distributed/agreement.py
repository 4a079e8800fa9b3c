"""Mixture weights that every host agrees on."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils


def from_first_host(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights that process 0 passes, on every process; call it on all of them.

    Loaders of one run must change their weights at the same step and to the same values, since
    each plans the whole order of rows by itself. Weights that come from arrays replicated over
    the mesh agree anyway; those that a person or a clock decides go through here::

        loader.set_weights(from_first_host(weights))

    Args:
        weights: source name -> weight, of the same names on every process.

    Returns:
        The same names with the values of process 0, to the last bit.
    """
    if jax.process_count() == 1:
        return dict(weights)
    values = np.array([weights[name] for name in sorted(weights)], np.float64)
    # As bytes: JAX would make float32 of float64.
    agreed = np.asarray(multihost_utils.broadcast_one_to_all(values.view(np.uint8)))
    shared = dict(zip(sorted(weights), agreed.view(np.float64).tolist(), strict=True))
    return {name: shared[name] for name in weights}
