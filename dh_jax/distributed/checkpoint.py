"""Checkpoints: arrays and host state of one step, written together or not at all.

Orbax writes into a temporary folder in the background and renames it when every file is down, so
a process killed at any moment leaves the previous step as the latest. The checksums of all files
are written before the renaming too: a step that is there can be checked.

Arrays may be restored onto another mesh and another number of processes. All processes of a run
must see one folder.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    EveryNSteps,
    LatestN,
    PreservationPolicy,
)

from dh_jax.distributed.agreement import gather, wait_for_all
from dh_jax.distributed.integrity import find_damage, write_checksums
from dh_jax.errors import StateError

ARRAYS, HOST = "arrays", "host"  # parts of a checkpoint
# Orbax writes these last of all, behind the checksums. They hold times and the names of parts,
# none of which a restoration here believes.
UNCHECKED = ("_CHECKPOINT_METADATA", "commit_success.txt")


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

    Raises:
        StateError: the file was changed.
    """
    folder = Path(folder)
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    step = max((step for step in steps if step < before), default=None)
    if step is None:
        return None
    if damage := find_damage(folder / str(step), below=f"{HOST}/"):
        raise StateError(f"checkpoint {folder / str(step)} is damaged: {damage[0]}")
    read = ocp.JsonCheckpointHandler().restore(folder.absolute() / str(step) / HOST)
    return SavedHost(step, json.loads(read["json"]))


def read_arrays(folder: str | Path, like: Any) -> Any:
    """Some arrays of the last checkpoint, on this process's first device; the run is left alone.

    Args:
        folder: of a run's checkpoints.
        like: the part of the saved pytree that is wanted, as arrays or shapes.

    Raises:
        StateError: there is no checkpoint, its files were changed, or its arrays are of other
            shapes.
    """
    folder = Path(folder).absolute()
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if not steps:
        raise StateError(f"no checkpoint in {folder}; the run has saved none yet")
    path = folder / str(max(steps))
    if damage := find_damage(path, without=UNCHECKED):
        raise StateError(f"checkpoint {path} is damaged: {damage[0]}")
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like)
    _refuse_other_shapes(path, abstract)
    handler = ocp.PyTreeCheckpointHandler()
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    return handler.restore(ocp.utils.epath.Path(path / ARRAYS), args=arguments)


class Checkpoints:
    """The checkpoints of one run, newest last; a context manager.

    Every method is called by all processes of a run.

    Args:
        folder: created if missing; the same for all processes.
        keep: how many are kept, the newest.
        keep_every: and those of every step that is a multiple of this.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, keep_every: int | None = None):
        self.folder = Path(folder).absolute()
        kept: list[PreservationPolicy] = [LatestN(keep)]
        if keep_every is not None:
            kept.append(EveryNSteps(keep_every))
        self._saving = 0  # the step being written
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,  # what a killed process left behind
            create=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps that were written completely."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, arrays: Any, host: dict[str, Any]) -> None:
        """Begin to write one step; returns when the arrays are copied, so they may be donated.

        Waits for the step before, if that is still being written.

        Args:
            step: steps already there are left alone.
            arrays: pytree of JAX arrays, sharded or not.
            host: what is not an array: loader states, names, seeds. JSON-able, and the same on
                every process.
        """
        self.wait()
        self._saving = step
        # Orbax's JSON handler would be one more format; a string in one place is enough.
        parts = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays),
            host=ocp.args.JsonSave({"json": json.dumps(host)}),
        )
        self._manager.save(step, args=parts)

    def wait(self) -> None:
        """Return when the last step is on disk; raises what went wrong in writing it."""
        self._manager.wait_until_finished()

    def _seal(self) -> None:
        """Write the checksums; called by Orbax when a step's files are down, before renaming."""
        if jax.process_index() == 0:
            name = f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}*"
            (temporary,) = self.folder.glob(name)
            write_checksums(temporary, without=UNCHECKED)

    def damage(self, step: int) -> list[str]:
        """What is wrong with a step's files, by name; empty if nothing is. Reads all of them, each
        process its share."""
        part = (jax.process_index(), jax.process_count())
        found = find_damage(self._path(step), part=part, without=UNCHECKED)
        return sorted({phrase for each in gather(found) for phrase in each})

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """Read a step into the shapes and shardings of ``like``, after checking all its files.

        Args:
            like: pytree of arrays, or of `jax.ShapeDtypeStruct` with shardings.
            step: None: the newest that is intact. Newer ones that are not are set aside as
                ``damaged-<step>``, with a warning that names the file.

        Raises:
            StateError: there is no such checkpoint, it is damaged, or its arrays have other
                shapes.
        """
        self.wait()
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise StateError(
                f"no checkpoint {'' if step is None else f'of step {step} '}in {self.folder}; "
                f"steps there: {_listed(steps)}; start without resume=true"
            )
        if step is None:
            return self._read(self._newest_intact(steps), like)
        if damage := self.damage(step):
            intact = [other for other in steps if other != step and not self.damage(other)]
            raise StateError(
                f"checkpoint {self._path(step)} is damaged: {'; '.join(damage[:3])}; intact "
                f"steps: {_listed(intact)}"
            )
        return self._read(step, like)

    def _newest_intact(self, steps: list[int]) -> int:
        damaged: dict[int, list[str]] = {}
        for step in reversed(steps):
            if not (damage := self.damage(step)):
                break
            damaged[step] = damage
        else:
            said = "; ".join(f"step {step}: {found[0]}" for step, found in damaged.items())
            raise StateError(
                f"every checkpoint in {self.folder} is damaged ({said}); restore the files from a "
                "copy, or start the run anew in another out="
            )
        for bad, found in damaged.items():
            aside = self.folder / f"damaged-{bad}"
            if jax.process_index() == 0:
                shutil.rmtree(aside, ignore_errors=True)  # of the same step, earlier
                self._path(bad).rename(aside)
            warnings.warn(
                f"checkpoint {self._path(bad)} is damaged: {'; '.join(found[:3])}; it is now "
                f"{aside.name}, and the run goes on from step {step}",
                stacklevel=4,
            )
        wait_for_all("damaged checkpoints set aside")
        if damaged:
            self._manager.reload()
        return step

    def _read(self, step: int, like: Any) -> Restored:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        # Asked first: where Orbax stops in the middle, its other reads are left hanging.
        _refuse_other_shapes(self._path(step), abstract)
        try:
            read = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError) as error:
            raise StateError(
                f"checkpoint {self._path(step)} does not fit this model: "
                f"{str(error).splitlines()[0]}; resume with the config it was saved with"
            ) from error
        return Restored(step, read[ARRAYS], json.loads(read[HOST]["json"]))

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def close(self) -> None:
        """Wait for the last step, then let go of the folder."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_other_shapes(checkpoint: Path, wanted: Any) -> None:
    """Compare shapes with what a checkpoint says of its arrays, before any is read."""
    described = ocp.StandardCheckpointHandler().metadata(ocp.utils.epath.Path(checkpoint / ARRAYS))
    saved = _shapes(described.tree)
    for path, shape in _shapes(wanted).items():
        if saved.get(path) != shape:
            raise StateError(
                f"checkpoint {checkpoint} does not fit this model: {path} has shape "
                f"{saved.get(path, 'none')} there and {shape} here; resume with the config "
                "it was saved with"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every array."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
