"""What a mixture policy is: two pure functions, in optax's manner, that move the weights.

Shapes: M sources.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PolicyState = Any  # a NamedTuple of arrays: a pytree, checkpointed with the optimizer


class Observation(NamedTuple):
    """What a policy may look at when it moves. Fields outside its ``needs`` are None."""

    step: jax.Array  # int32, optimizer steps made so far
    weights_M: jax.Array  # float32, the weights in force
    influence_M: jax.Array | None = None  # float32, mean over the source's rows; positive = harmful
    loss_M: jax.Array | None = None  # float32, mean loss of the source's rows, nats a target
    tokens_M: jax.Array | None = None  # float32, tokens delivered from the source so far


class Policy(NamedTuple):
    """A rule that moves mixture weights. Every function is pure and jit-able.

    ``needs`` names the optional fields of `Observation` that ``update`` reads: what is not asked
    for is not computed, so a policy that looks at nothing costs nothing.
    """

    start: Callable[[jax.Array], jax.Array]  # configured weights_M -> weights_M of the first step
    init: Callable[[jax.Array], PolicyState]  # weights_M -> state
    update: Callable[[Observation, PolicyState], tuple[jax.Array, PolicyState]]  # weights_M, state
    needs: frozenset[str] = frozenset()


class NoState(NamedTuple):
    """State of a policy that remembers nothing."""


def static() -> Policy:
    """Keep the weights as they were configured."""
    return Policy(
        start=lambda weights_M: weights_M,
        init=lambda weights_M: NoState(),
        update=lambda observation, state: (observation.weights_M, state),
    )


def uniform() -> Policy:
    """Give every source the same weight, whatever was configured."""

    def equal(weights_M: jax.Array) -> jax.Array:
        return jnp.full_like(weights_M, 1 / weights_M.size)

    return Policy(
        start=equal,
        init=lambda weights_M: NoState(),
        update=lambda observation, state: (equal(observation.weights_M), state),
    )
