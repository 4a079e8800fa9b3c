"""Checkpoints: arrays and host state of one step, written together or not at all.

Orbax writes into a temporary folder and renames it when every file is down, so a process
killed at any moment leaves the previous step as the latest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from dh_jax.errors import StateError


class Restored(NamedTuple):
    """One checkpoint, read back."""

    step: int
    arrays: Any  # the pytree that was saved, placed like the ``like`` it was restored into
    host: dict[str, Any]  # the JSON-able part


class SavedHost(NamedTuple):
    """The host state of one checkpoint."""

    step: int
    host: dict[str, Any]


def read_host(folder: str | Path, *, before: int) -> SavedHost | None:
    """The host state of the last checkpoint before a step; None if there is none.

    Touches neither arrays nor devices nor the folder, so a run that is still going on, and its
    accelerator, are left alone.
    """
    folder = Path(folder)
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    step = max((step for step in steps if step < before), default=None)
    if step is None:
        return None
    read = ocp.JsonCheckpointHandler().restore(folder.absolute() / str(step) / "host")
    return SavedHost(step, json.loads(read["json"]))


class Checkpoints:
    """The checkpoints of one run, newest last; a context manager.

    Args:
        folder: created if missing.
        keep: how many are kept.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps that were written completely."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, arrays: Any, host: dict[str, Any]) -> None:
        """Write one step; returns when it is on disk.

        Args:
            step: steps already there are left alone.
            arrays: pytree of JAX arrays, sharded or not.
            host: what is not an array: loader states, names, seeds. JSON-able.
        """
        # Orbax's JSON handler would be one more format; a string in one place is enough.
        parts = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays),
            host=ocp.args.JsonSave({"json": json.dumps(host)}),
        )
        self._manager.save(step, args=parts)
        self._manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """Read a step (default: the latest) into the shapes and shardings of ``like``.

        Raises:
            StateError: there is no such checkpoint, or its arrays have other shapes.
        """
        steps = self.steps()
        step = (steps[-1] if steps else None) if step is None else step
        if step is None or step not in steps:
            raise StateError(
                f"no checkpoint {'' if step is None else f'of step {step} '}in {self.folder}; "
                f"steps there: {steps or 'none'}; start without resume=true"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            read = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError) as error:
            raise StateError(
                f"checkpoint {self.folder / str(step)} does not fit this model: "
                f"{str(error).splitlines()[0]}; resume with the config it was saved with"
            ) from error
        return Restored(step, read["arrays"], json.loads(read["host"]["json"]))

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
