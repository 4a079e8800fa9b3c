"""Refusals that name whose rows, gradients or scores are at fault."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dh_jax.batch import Batch
from dh_jax.distributed.mesh import to_host
from dh_jax.errors import DataError
from dh_jax.influence.gradients import Blocks, valid_rows

CURE = "training has diverged or the rows are broken: lower the learning rate or look at them"


def rows_with_targets(owner: str, batch: Batch) -> np.ndarray:
    """(B,) bool, rows that have a target to learn.

    Raises:
        DataError: none has.
    """
    valid_B: np.ndarray = to_host(valid_rows(batch))
    if not valid_B.any():
        raise DataError(f"{owner}: none of its {len(valid_B)} rows has a target to learn")
    return valid_B


def refuse_non_finite(what: str, values: Mapping[str, np.ndarray]) -> None:
    """Refuse numbers by source that are not finite, saying of how many rows."""
    bad = {name: int((~np.isfinite(x)).sum()) for name, x in values.items()}
    if any(bad.values()):
        named = ", ".join(f"{n!r} ({k} of {len(values[n])} rows)" for n, k in bad.items() if k)
        raise DataError(f"{what} is not finite for source {named}; {CURE}")


def refuse_gradient(owner: str, gradient: Blocks) -> None:
    """Refuse a gradient that is not finite."""
    if not bool(_all_finite(gradient)):
        raise DataError(f"{owner}: gradient is not finite; {CURE}")


@jax.jit
def _all_finite(blocks: Blocks) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(blocks)]).all()
