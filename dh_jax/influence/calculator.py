"""The face of DataInf: settings checked once, every function compiled once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from dh_jax.batch import Batch
from dh_jax.errors import ConfigError, DataError
from dh_jax.functions import LossFn, Params, as_argument
from dh_jax.influence import datainf
from dh_jax.influence.datainf import DataInfState
from dh_jax.influence.gradients import Blocks, select


class DataInfCalculator:
    """DataInf (see `dh_jax.influence.datainf`) for any loss; works on sharded arrays.

    Typical use::

        calculator = DataInfCalculator(loss_fn)
        state = calculator.fit(params, training_rows, key)
        v = calculator.probe_gradient(params, probe_rows, key)
        q = calculator.precondition(state, v)
        influence_B = calculator.score_rows(params, q, rows, key)  # positive = harmful

    Args:
        loss_fn: ``(params, batch, key) -> loss_BT``. It must have a forward derivative
            (``jax.jvp``), which a function with only a ``custom_vjp`` has not; dropout draws anew
            in every chunk, so prefer a deterministic loss.
        damping: lambda of a block as a multiple of its mean squared gradient.
        parameters: regular expression searched for in parameter paths; gradients are taken of
            the parameters that match, alone.
        chunk: rows worked on at once. Fitting holds this many gradients of the selected
            parameters; give a multiple of the devices that rows are sharded over.
        max_bytes: fitted gradients are kept where all of them fit in this many bytes (over all
            devices), and computed a second time where they do not.

    Raises:
        ConfigError: a number lies outside its range. `select` raises it for ``parameters``, as
            soon as there are parameters to match.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        *,
        damping: float = 0.1,
        parameters: str = ".*",
        chunk: int = 8,
        max_bytes: int = 1 << 29,
    ) -> None:
        if not (math.isfinite(damping) and damping > 0):
            raise ConfigError(f"influence.damping is {damping}; it must be finite and above 0")
        if chunk < 1:
            raise ConfigError(f"chunk is {chunk} rows; the least is 1")
        self.loss_fn = loss_fn
        self.settings = datainf.Settings(damping, parameters, chunk, max_bytes)
        bound = as_argument(loss_fn), self.settings  # settings choose the program

        def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
            return partial(jax.jit(function, static_argnums=1, **options), *bound)

        self._fit = compiled(datainf.fit)
        self._precondition = compiled(datainf.precondition)
        self._probe_gradient = compiled(datainf.probe_gradient)
        self._score_fitted = compiled(datainf.score_fitted)
        self._score_rows = compiled(datainf.score_rows)
        self._score_documents = compiled(datainf.score_documents, static_argnames="max_segments")

    def coverage(self, params: Params) -> float:
        """Selected parameters as a share of all, counted in entries."""
        return select(params, self.settings.parameters).coverage

    def fit(self, params: Params, batch: Batch, key: jax.Array) -> DataInfState:
        """Measure the training gradients: one example for each row that has a valid target."""
        state: DataInfState = self._fit(params, batch, key)
        if state.gradients is not None:
            return state
        return state._replace(rows=datainf.Rows(params, batch, key))

    def precondition(self, state: DataInfState, v: Blocks) -> Blocks:
        """``q``, by path: the swapped inverse applied to the probe gradient ``v``."""
        q: Blocks = self._precondition(state, v)
        return q

    def probe_gradient(self, params: Params, batch: Batch, key: jax.Array) -> Blocks:
        """``v``, by path: gradient of the mean over probe rows of each row's mean loss."""
        return self._probe_gradient(params, batch, key)

    def score_fitted(self, state: DataInfState, q: Blocks) -> jax.Array:
        """(B,) what `score_rows` gives for the fitted rows, for less where gradients are kept."""
        return self._score_fitted(state, q)

    def score_rows(self, params: Params, q: Blocks, batch: Batch, key: jax.Array) -> jax.Array:
        """(B,) influence of each row's mean loss; 0 for a row without a valid target."""
        return self._score_rows(params, q, batch, key)

    def score_documents(
        self, params: Params, q: Blocks, batch: Batch, max_segments: int, key: jax.Array
    ) -> jax.Array:
        """(B, S) influence of the mean loss of each segment of packed rows.

        Args:
            params: pytree of parameters.
            q: preconditioned probe gradient, by path.
            batch: packed rows; segment ``s + 1`` of row ``b`` is scored in entry ``[b, s]``.
            max_segments: S.
            key: random key, as the loss may use it.

        Returns:
            Scores; 0 where there is no such segment or it has no valid target.

        Raises:
            DataError: a row has more than ``max_segments`` segments.
        """
        most = int(batch.segment_ids_BT.max())
        if most > max_segments:
            raise DataError(
                f"a row has {most} segments, above max_segments {max_segments}; raise it to {most}"
            )
        return self._score_documents(params, q, batch, max_segments=max_segments, key=key)
