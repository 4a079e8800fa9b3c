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
    """What a policy may look at when it moves. Fields outside its ``needs`` are None.

    Training knows ``loss_M`` and ``tokens_M`` anyway; the others are measured on sampled rows.
    """

    step: jax.Array  # int32, optimizer steps made so far
    weights_M: jax.Array  # float32, the weights in force
    influence_M: jax.Array | None = None  # float32, mean over the source's rows; positive = harmful
    loss_M: jax.Array | None = None  # float32, nats a target, mean since the last move
    tokens_M: jax.Array | None = None  # float32, targets learnt since the last move
    alignment_M: jax.Array | None = None  # float32, source's gradient . target's gradient
    norm_M: jax.Array | None = None  # float32, norm of the source's gradient
    target_loss: jax.Array | None = None  # float32 scalar, nats a target, weighted over the probes


LEARNT = frozenset({"loss_M", "tokens_M"})  # fields that training fills from its own steps
SAMPLED = frozenset({"influence_M", "alignment_M", "norm_M", "target_loss"})  # measured on request


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


def as_configured(weights_M: jax.Array) -> jax.Array:
    """A ``start`` that takes the weights as they are."""
    return weights_M


def equal(weights_M: jax.Array) -> jax.Array:
    """A ``start`` that gives every source the same weight, whatever was configured."""
    return jnp.full_like(weights_M, 1 / weights_M.size)


def static() -> Policy:
    """Keep the weights as they were configured."""
    return Policy(
        start=as_configured,
        init=lambda weights_M: NoState(),
        update=lambda observation, state: (observation.weights_M, state),
    )


def uniform() -> Policy:
    """Give every source the same weight, whatever was configured."""
    return Policy(
        start=equal,
        init=lambda weights_M: NoState(),
        update=lambda observation, state: (equal(observation.weights_M), state),
    )
