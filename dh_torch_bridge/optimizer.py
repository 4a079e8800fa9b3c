"""Any torch optimizer, with a mixture that steers itself: the JAX policies in a torch loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
import torch.distributed as dist
from torch import nn

from dh_jax.batch import Batch
from dh_jax.errors import StateError
from dh_jax.influence import optimizer as house
from dh_jax.influence.calculator import DataInfCalculator
from dh_jax.influence.optimizer import InfluenceState, Reweighting
from dh_jax.influence.sources import GRADIENTS, Measure
from dh_jax.mixing.policy import SAMPLED, Policy
from dh_torch_bridge.data import TorchBatch, TorchLoader
from dh_torch_bridge.distributed.parallelize import Parallel
from dh_torch_bridge.influence import TorchLoss, fill_twin, torch_objective, torch_params
from dh_torch_bridge.labels import IGNORED
from dh_torch_bridge.losses import token_losses
from dh_torch_bridge.pieces import measure_pieces

Draw = Callable[[str], Mapping[str, Batch]]  # "train" or "probe" -> rows by source or probe
WIDE = 1 << 40  # fitted gradients are always kept: torch has no forward mode here


class InfluenceAwareOptimizer(torch.optim.Optimizer):
    """Wraps a torch optimizer; every so many steps it moves the weights of the loader's mixture.

    It is the wrapped optimizer in all else: schedulers, `torch.amp.GradScaler` and checkpoints
    see its groups and its state. Its `state_dict` is the wrapped one's with one more entry.

    Every rank calls `step` and draws the same rows; the first rank's weights go to all loaders.

    Args:
        optimizer: any; it makes the updates.
        policy: moves the weights (`dh_jax.mixing.registry.make_policy`).
        loader: whose weights move, from the first batch not yet delivered on.
        model: what is trained, or the `Parallel` that `parallelize` made of it, whose ranks are
            measured piece by piece. Only needed for policies that measure gradients.
        draw: rows to measure on, the same on every rank (`dh_jax.sampling.Samplers.draw`).
        twin: the double of a module that ranks hold only parts of, whole on this rank and filled
            before every measurement; for modules that `parallelize` did not spread.
        loss: of the model, unreduced.
        weights: to start with; default: the loader's.
        interval: steps between two moves.
        warmup: steps before the first move.
        probe_names: names of the probes that can be targets.
        targets: probe -> weight; empty: every probe counts the same.
        parameters: regular expression over the names of parameters that gradients are taken of.
        damping: of DataInf.
        on_move: called with what a move saw and did, for logs.

    Raises:
        ConfigError: as `dh_jax.influence.optimizer.InfluenceAwareOptimizer`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        policy: Policy,
        loader: TorchLoader,
        model: nn.Module | Parallel | None = None,
        draw: Draw | None = None,
        *,
        twin: nn.Module | None = None,
        loss: TorchLoss = token_losses,
        weights: Mapping[str, float] | None = None,
        interval: int = 20,
        warmup: int = 0,
        probe_names: Sequence[str] = (),
        targets: Mapping[str, float] | None = None,
        parameters: str = ".*",
        damping: float = 0.1,
        on_move: Callable[[Reweighting], None] = lambda move: None,
    ) -> None:
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.inner = optimizer
        self._share()
        self._loader, self._model, self._twin, self._draw = loader, model, twin, draw
        self._parameters, self._on_move = parameters, on_move
        calculator: DataInfCalculator | Measure | None = None
        if policy.needs & SAMPLED and isinstance(model, Parallel):
            calculator = measure_pieces(model, loss, parameters=parameters, damping=damping)
        elif policy.needs & SAMPLED and isinstance(model, nn.Module):
            objective = torch_objective(twin or model, loss)
            calculator = DataInfCalculator(objective.loss, damping=damping, max_bytes=WIDE)
        self._steering = house.InfluenceAwareOptimizer(
            optax.identity(), policy, calculator, source_names=loader.names,
            weights=loader.weights if weights is None else weights,
            interval=interval, warmup=warmup, probe_names=probe_names, targets=targets,
        )  # fmt: skip
        self._state: InfluenceState = self._steering.init({})
        loader.set_weights(self._by_source())

    def _share(self) -> None:
        """Groups and state are the wrapped optimizer's own objects."""
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def step(self, closure: Any = None) -> Any:
        """The wrapped optimizer's step; behind every ``interval``-th the weights move.

        Raises:
            DataError: what the policy asked for, or what it gave, is not finite.
        """
        result = self.inner.step(closure)
        self._state = self._state._replace(step=self._state.step + 1)
        if self._steering.due(int(self._state.step)):
            self.reweight()
        return result

    def observe(self, loss_BT: torch.Tensor, batch: TorchBatch) -> None:
        """Note a step's losses, for policies that look at them; call it on all ranks before `step`.

        Args:
            loss_BT: of this rank's rows, unreduced.
            batch: the rows.
        """
        count = len(self._loader.names)
        sums = torch.zeros(2, count, dtype=torch.float32)
        learnt = batch["shift_labels"] != IGNORED
        rows = torch.stack([(loss_BT.detach() * learnt).sum(1), learnt.sum(1)]).float().cpu()
        sums.index_add_(1, batch["source_ids"].cpu().long(), rows)
        if dist.is_initialized():
            sums = _summed(sums)
        nats_M, targets_M = (jnp.asarray(x.numpy()) for x in sums)
        loss_M = nats_M / targets_M.clip(min=1)
        self._state = self._steering.observe(self._state, loss_M, targets_M)

    def reweight(self) -> Reweighting:
        """Measure what the policy needs, and move the weights of all ranks' loaders now."""
        needs = self._steering.policy.needs
        measured: Any = {}
        if needs & SAMPLED:
            assert self._model is not None and self._draw is not None
            if not isinstance(self._model, Parallel):
                if self._twin is not None:
                    fill_twin(self._twin, self._model)
                measured = torch_params(self._twin or self._model, self._parameters)
        draw = self._draw or (lambda split: {})
        self._state, move = self._steering.reweight(
            measured,
            self._state,
            draw("train") if needs & GRADIENTS else {},
            draw("probe") if needs & SAMPLED else {},
            jax.random.fold_in(jax.random.key(0), int(self._state.step)),
        )
        self._loader.set_weights(from_first_rank(self._by_source()))
        self._on_move(move)
        return move

    def _by_source(self) -> dict[str, float]:
        weights = [float(x) for x in self._state.weights_M]
        return dict(zip(self._loader.names, weights, strict=True))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer`: the wrapped optimizer gets the group."""
        if "inner" not in self.__dict__:  # from the constructor, which shares the groups itself
            super().add_param_group(param_group)
            return
        self.inner.add_param_group(param_group)
        self._share()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and ``steering``: the policy's state, JSON-able."""
        return self.inner.state_dict() | {"steering": self.steering_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a wrapped optimizer's plain one too: the policy is then left as it is."""
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != "steering"})
        self._share()
        if "steering" in state_dict:
            self.load_steering_state(state_dict["steering"])

    def steering_state(self) -> list[Any]:
        """What the policy remembers, JSON-able; `save_run` takes it as a host value."""
        return [x.tolist() for x in jax.tree.leaves(self._state)]

    def load_steering_state(self, state: list[Any]) -> None:
        """Go on with it. The loader's own state brings the weights back.

        Raises:
            StateError: it is of another policy, or of other sources.
        """
        leaves, shape = jax.tree.flatten(self._state)
        new = [jnp.asarray(x, old.dtype) for x, old in zip(state, leaves, strict=False)]
        if len(state) != len(leaves) or any(
            x.shape != old.shape for x, old in zip(new, leaves, strict=True)
        ):
            raise StateError("the steering state is of another policy or other sources")
        self._state = jax.tree.unflatten(shape, new)


def from_first_rank(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights that the first rank passes, on every rank, to the last bit; all ranks call it.

    Weights that a person or a clock decides go through here before `TorchLoader.set_weights`,
    since every rank plans the whole order of rows by itself.
    """
    if not dist.is_initialized():
        return dict(weights)
    values = [dict(weights)]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _summed(sums: torch.Tensor) -> torch.Tensor:
    """A small CPU tensor's sum over all ranks, on whatever device the process group works."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    placed = sums.to(device)
    dist.all_reduce(placed)
    return placed.cpu()
