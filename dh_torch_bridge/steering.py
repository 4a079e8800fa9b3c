"""Steering in the reference trainer: the run's policy around its optimizer, and rows to look at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from dh_jax.config import MeshConfig, TorchRunConfig
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distributed.mesh import make_mesh
from dh_jax.errors import ConfigError
from dh_jax.influence.optimizer import Reweighting
from dh_jax.mixing.policy import LEARNT, SAMPLED
from dh_jax.mixing.registry import SIZED, make_policy
from dh_jax.runconfig import source_tokens
from dh_jax.sampling import Samplers
from dh_torch_bridge.data import TorchLoader
from dh_torch_bridge.distributed.named import parts_of
from dh_torch_bridge.distributed.parallelize import Parallel
from dh_torch_bridge.optimizer import InfluenceAwareOptimizer


def steer(
    optimizer: torch.optim.Optimizer,
    run: TorchRunConfig,
    model: Parallel,
    loader: TorchLoader,
    tokenizer: TokenizerWrapper,
    closing: ExitStack,
    on_move: Callable[[Reweighting], None],
) -> tuple[torch.optim.Optimizer, Samplers | None]:
    """The optimizer, wrapped where the run's mixture moves; for all ranks.

    Where a policy measures gradients, every rank draws the same rows. A model that each rank has
    whole is measured by JAX, on the processor under ``JAX_PLATFORMS=cpu``; one that ranks hold
    parts of by its pieces (`dh_torch_bridge.pieces`).

    Args:
        optimizer: of the model's parameters.
        run: its ``mixing`` and ``influence``.
        model: as this rank holds it.
        loader: whose weights move.
        tokenizer: of the data.
        closing: closes the samplers.
        on_move: called behind every move, on every rank.

    Returns:
        The optimizer to step, and the samplers, whose state is the run's too (None: no need).

    Raises:
        ConfigError: the policy asks for what this trainer does not have.
    """
    mixing = run.mixing
    if mixing.policy == "static":
        return optimizer, None
    sizes = source_tokens(run.data, tokenizer) if mixing.policy in SIZED else None
    policy = make_policy(mixing, list(loader.names), sizes)
    if policy.needs & LEARNT:
        raise ConfigError(
            f"mixing.policy {mixing.policy!r} looks at losses by source, which this trainer does "
            "not keep; take influence or alignment, or a loop of your own with "
            "InfluenceAwareOptimizer.observe"
        )
    if mixing.budget is not None or mixing.on_failure != "stop":
        raise ConfigError(
            "mixing.budget and mixing.on_failure=keep are for `dh train`; leave them out here"
        )
    samplers = None
    whole = parts_of(model)[0]
    measured: nn.Module | Parallel = whole
    if policy.needs & SAMPLED:
        if model.schedule is not None:
            raise ConfigError(
                f"mixing.policy {mixing.policy!r} measures gradients of the whole model, of which "
                "pipeline ranks hold stages; take distributed.pipeline=1 or mixing=static"
            )
        samplers = Samplers(
            run.data, run.influence, tokenizer, make_mesh(MeshConfig()), seed=run.training.seed
        )
        closing.enter_context(samplers)
        if run.distributed.strategy == "ddp" and model.mesh is not None:
            measured = whole.module  # type: ignore[assignment]
        elif model.mesh is not None:
            measured = model
    steering = InfluenceAwareOptimizer(
        optimizer, policy, loader, measured, samplers.draw if samplers else None,
        interval=mixing.interval,
        warmup=mixing.warmup,
        probe_names=list(run.data.probes or run.data.sources),
        targets=run.influence.targets,
        parameters=run.influence.parameters,
        damping=run.influence.damping,
        on_move=on_move,
    )  # fmt: skip
    return steering, samplers


def steering_state(
    optimizer: torch.optim.Optimizer, samplers: Samplers | None
) -> dict[str, Any] | None:
    """What a checkpoint keeps of it, JSON-able; None where nothing steers."""
    if not isinstance(optimizer, InfluenceAwareOptimizer):
        return None
    drawn = None if samplers is None else samplers.get_state()
    return {"policy": optimizer.steering_state(), "samplers": drawn}


def load_steering_state(
    optimizer: torch.optim.Optimizer, samplers: Samplers | None, state: dict[str, Any] | None
) -> None:
    """Go on with it.

    Raises:
        StateError: it is of another policy, or of other sources.
    """
    if state is None or not isinstance(optimizer, InfluenceAwareOptimizer):
        return
    optimizer.load_steering_state(state["policy"])
    if samplers is not None:
        samplers.set_state(state["samplers"])
