"""Training runs on a synthetic world, many in one compiled program, steered as the library does.

Shapes: S moves of the weights; otherwise as in `benchmarks._worlds`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks._worlds import Data, M, P, T, as_batch, init_params, loss_fn
from dh_jax.functions import masked_mean
from dh_jax.influence import datainf
from dh_jax.influence.gradients import mean_gradient, select
from dh_jax.mixing.policy import Observation, Policy

BATCH = 32  # rows

Params = dict[str, jax.Array]


class Contender(NamedTuple):
    """A policy, how often it moves, and how many rows it looks at if it asks for gradients."""

    policy: Policy
    interval: int = 20
    rows: int = 4  # of each source
    probe_rows: int = 16


class Outcome(NamedTuple):
    """What a run ended with; nats a target."""

    target_P: jax.Array  # held-out loss on the target of each phase, at the phase's end
    source_M: jax.Array  # held-out loss on every source's clean rows, at the end
    weights_SM: jax.Array  # in force after each move


def simulate(
    contender: Contender, steps: int, data: Data, start_M: jax.Array, reference_M: jax.Array,
    key: jax.Array,
) -> Outcome:  # fmt: skip
    """Train on the mixture that the policy makes, from its first weights on."""
    policy, interval = contender.policy, contender.interval
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps, alpha=0.05))
    params = init_params(jax.random.fold_in(key, 0))
    weights_M = policy.start(start_M)

    def rows_of(sources_B: jax.Array, key: jax.Array) -> jax.Array:
        index_B = jax.random.randint(key, sources_B.shape, 0, data.rows_M[sources_B])
        return data.train_MNT[sources_B, index_B]

    def train_step(carry, k):
        params, state, sums = carry[0], carry[1], carry[3]
        order_key, row_key = jax.random.split(jax.random.fold_in(key, k + 1))
        u_B = (jax.random.uniform(order_key) + jnp.arange(BATCH)) / BATCH
        sources_B = jnp.searchsorted(jnp.cumsum(carry[2]), u_B).clip(max=M - 1)
        batch = as_batch(rows_of(sources_B, row_key), sources_B)

        def objective(params):
            loss_BT = loss_fn(params, batch, key)
            return masked_mean(loss_BT, batch.loss_mask_BT), loss_BT.sum(axis=1)

        grads, nats_B = jax.grad(objective, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        of_source_MB = jax.nn.one_hot(sources_B, M, axis=0)
        sums = sums + jnp.stack([of_source_MB @ nats_B, of_source_MB.sum(axis=1) * (T - 1)])
        return (optax.apply_updates(params, updates), state, carry[2], sums), None

    def move(phase, carry, n):
        params, state, weights_M, policy_state = carry
        first = (params, state, weights_M, jnp.zeros((2, M)))
        (params, state, _, sums), _ = jax.lax.scan(
            train_step, first, n * interval + jnp.arange(interval)
        )
        seen = observe(
            contender, params, weights_M, (n + 1) * interval, sums, reference_M,
            rows_of, data.probe_PNT[phase], jax.random.fold_in(key, -n - 1),
        )  # fmt: skip
        weights_M, policy_state = policy.update(seen, policy_state)
        return (params, state, weights_M, policy_state), weights_M

    carry = (params, optimizer.init(params), weights_M, policy.init(weights_M))
    losses, trail = [], []
    half = steps // interval // 2
    for phase in range(P):
        moves = phase * half + jnp.arange(half)
        carry, weights_SM = jax.lax.scan(partial(move, phase), carry, moves)
        losses.append(mean_loss(carry[0], data.eval_PNT[phase]))
        trail.append(weights_SM)
    source_M = jax.vmap(partial(mean_loss, carry[0]))(data.sources_MNT)
    return Outcome(jnp.stack(losses), source_M, jnp.concatenate(trail))


def observe(contender, params, weights_M, step, sums, reference_M, rows_of, probe_NT, key):
    """What a policy asks for, measured by the library on sampled rows; nothing else is compiled."""
    needs, count = contender.policy.needs, contender.rows
    settings = datainf.Settings(chunk=M * count)
    nats_M, targets_M = sums
    seen = {
        "loss_M": nats_M / targets_M.clip(min=1) - reference_M,
        "tokens_M": targets_M,
    }
    pick, draw_key = jax.random.split(key)
    chosen = jax.random.choice(pick, len(probe_NT), (contender.probe_rows,), replace=False)
    probe = as_batch(probe_NT[chosen])
    rows = as_batch(rows_of(jnp.repeat(jnp.arange(M), count), draw_key))
    if "influence_M" in needs:
        fitted = datainf.fit(loss_fn, settings, params, rows, key)
        v = datainf.probe_gradient(loss_fn, settings, params, probe, key)
        q = datainf.precondition(loss_fn, settings, fitted, v)
        scores_B = datainf.score_fitted(loss_fn, settings, fitted, q)
        seen["influence_M"] = scores_B.reshape(M, count).mean(axis=1)
    if "alignment_M" in needs:
        selection = select(params)
        v = mean_gradient(loss_fn, selection, probe, key, contender.probe_rows)
        groups = jax.tree.map(lambda x: x.reshape(M, count, *x.shape[1:]), rows)
        g = jax.vmap(lambda b: mean_gradient(loss_fn, selection, b, key, count))(groups)
        dots = [jnp.tensordot(g[path], v[path], v[path].ndim) for path in v]
        seen["alignment_M"] = sum(dots)
        squares = [jnp.square(x).sum(axis=tuple(range(1, x.ndim))) for x in g.values()]
        seen["norm_M"] = jnp.sqrt(sum(squares))
    if "target_loss" in needs:
        seen["target_loss"] = mean_loss(params, probe_NT)
    return Observation(step, weights_M, **{name: seen[name] for name in needs})


def mean_loss(params, tokens_NT):
    batch = as_batch(tokens_NT)
    return masked_mean(loss_fn(params, batch, jax.random.key(0)), batch.loss_mask_BT)


def runner(contender: Contender, steps: int) -> Callable[..., Outcome]:
    """A compiled program for groups of runs: ``go(data, start_GNM, reference_GM, keys_G)``.

    G groups, one after the other, each of N runs side by side on the same data and key.
    """
    lane = partial(simulate, contender, steps)
    group = jax.vmap(lane, in_axes=(None, 0, None, None))
    return jax.jit(lambda *groups: jax.lax.map(lambda each: group(*each), groups))
