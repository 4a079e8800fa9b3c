"""The training step: loss, gradient and update in one jitted function; its optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from dh_jax.batch import Batch
from dh_jax.config import TrainingConfig
from dh_jax.functions import LossFn, Params, as_argument, masked_mean, matrices
from dh_jax.influence.optimizer import InfluenceAwareOptimizer, InfluenceState
from dh_jax.metrics import StepMetrics

# (params, state, batch, key) -> (params, state, metrics); the loss is bound as its first argument.
TrainStep = partial[tuple[Params, InfluenceState, StepMetrics]]


def make_step(
    loss_fn: LossFn,
    optimizer: InfluenceAwareOptimizer,
    source_count: int,
    shardings: tuple[Any, Any, NamedSharding] | None = None,
) -> TrainStep:
    """One optimizer step, jitted; parameters and optimizer state are donated.

    ``shardings`` are those of parameters, state and metrics behind the step; None leaves them to
    XLA.
    """

    def step(
        loss_fn: LossFn, params: Params, state: InfluenceState, batch: Batch, key: jax.Array
    ) -> tuple[Params, InfluenceState, StepMetrics]:
        def objective(params: Params) -> tuple[jax.Array, jax.Array]:
            loss_BT = loss_fn(params, batch, key)
            return masked_mean(loss_BT, batch.loss_mask_BT), loss_BT

        (loss, loss_BT), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        of_source_MB = jax.nn.one_hot(batch.source_ids_B, source_count, axis=0)
        targets_M = of_source_MB @ batch.loss_mask_BT.sum(1).astype(jnp.float32)
        loss_M = of_source_MB @ loss_BT.sum(1) / targets_M.clip(min=1)
        metrics = StepMetrics(loss, optax.tree.norm(grads), loss_M, targets_M)
        state = optimizer.observe(state, loss_M, targets_M)
        return optax.apply_updates(params, updates), state, metrics

    return partial(
        jax.jit(step, donate_argnums=(1, 2), out_shardings=shardings), as_argument(loss_fn)
    )


def make_schedule(training: TrainingConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to the final fraction of it."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=training.learning_rate,
        warmup_steps=training.warmup,
        decay_steps=max(training.steps, training.warmup + 1),
        end_value=training.learning_rate * training.final_learning_rate,
    )


def make_optimizer(training: TrainingConfig) -> optax.GradientTransformation:
    """AdamW with gradient clipping; weight decay acts on matrices alone."""
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.adamw(
            make_schedule(training),
            b1=training.b1,
            b2=training.b2,
            weight_decay=training.weight_decay,
            mask=matrices,
        ),
    )
