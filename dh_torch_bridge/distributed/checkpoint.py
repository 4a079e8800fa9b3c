"""Checkpoints of torch ranks: model, optimizer and host state of one step, written together.

PyTorch's distributed checkpoint (DCP) writes each rank's shards into a folder that nobody else
ever wrote to, in the background. The first rank then adds the checksums of all files and renames
the folder to its step: so a step that is there is whole, and can be checked. Every file is checked
before any is read, since DCP notices no changed bit and its metadata is a pickle.

Tensors are kept by the names that the whole model has, so another number of ranks or another
layout (DDP, FSDP2, tensor parallel, stages of a pipeline) reads its own pieces of them. All ranks
must see one folder.
"""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from dh_jax.distributed.integrity import find_damage, write_checksums
from dh_jax.errors import DataError, StateError
from dh_torch_bridge.distributed.named import (
    Model,
    fill_twins,
    named_tensors,
    ready_state,
    refuse_other_tensors,
)
from dh_torch_bridge.distributed.parallelize import Parallel

# One process is what was asked for; torch warns of it all the same.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")

HOST = "host.json"
SCHEMA = 1
UNFINISHED = ".writing-"  # beginning of the name of a folder that is being written


class Restored(NamedTuple):
    """What was read, beside the tensors that are now in model and optimizer."""

    step: int
    host: dict[str, Any]  # as the first rank saved it


class Checkpoints:
    """The checkpoints of one run, newest last; a context manager.

    Every method is called by all ranks, also the constructor.

    Args:
        folder: created if missing; the same for all ranks.
        keep: how many are kept, the newest.
        keep_every: and those of every step that is a multiple of this.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, keep_every: int | None = None):
        self.folder = Path(folder).absolute()
        self._keep, self._keep_every = keep, keep_every
        # A group of its own: its messages cannot mix with those of training, nor need a GPU.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._rank = dist.get_rank() if self._group else 0
        self._ranks = dist.get_world_size() if self._group else 1
        # No two starts of a run, nor two saves of a step, write into one folder.
        self._start = self._agreed(uuid.uuid4().hex[:8])
        if self._rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f"{UNFINISHED}*"):  # by a run that was killed
                shutil.rmtree(left)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps that were written completely, as the first rank sees them."""
        self.wait()
        return self._agreed(written_steps(self.folder))

    def save(
        self, step: int, model: Model, optimizer: torch.optim.Optimizer, host: dict[str, Any]
    ) -> None:
        """Begin to write one step; returns when all tensors are copied, so training may go on.

        Waits for the step before, if that is still being written. A step already there is left
        alone.

        Args:
            step: steps made so far.
            model: in any layout.
            optimizer: of the model's parameters. Its state must be tensors of a parameter's
                shape, or tensors that are equal on all ranks.
            host: JSON-able; the first rank's is kept.

        Raises:
            DataError: the step before could not be written.
        """
        if step in self.steps():
            return
        tensors = named_tensors(model, optimizer)
        tensors |= {f"rng.{name}.{self._rank}": state for name, state in _rng().items()}
        groups = [
            {key: _plain(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        about = {"schema": SCHEMA, "ranks": self._ranks, "groups": groups, "host": host}
        staged: dict[str, Any] = BlockingAsyncStager().stage(tensors)
        path = self.folder / f"{UNFINISHED}{step}-{self._start}"
        self._writing = self._writer.submit(self._write, step, path, staged, json.dumps(about))

    def _write(self, step: int, path: Path, tensors: dict[str, Any], about: str) -> None:
        """In the background: shards by all ranks; checksums and the name by the first."""
        try:
            dcp.save(
                tensors,
                checkpoint_id=path,
                process_group=self._group,
                no_dist=self._group is None,
            )
        except dcp.CheckpointException as error:  # not an `Exception`, and seen by all ranks
            raise DataError(f"step {step} cannot be written to {self.folder}: {error}") from None
        if self._rank == 0:  # DCP has heard from all ranks that their files are down
            (path / HOST).write_text(about)
            write_checksums(path)
            path.rename(self.folder / str(step))
            self._remove_old()

    def _remove_old(self) -> None:
        for step in written_steps(self.folder)[: -self._keep]:
            if not self._keep_every or step % self._keep_every:
                gone = self.folder / f"{UNFINISHED}removed-{step}"
                (self.folder / str(step)).rename(gone)  # never half a step under its name
                shutil.rmtree(gone)

    def wait(self) -> None:
        """Return when the last step is on disk.

        Raises:
            DataError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def restore(
        self, model: Model, optimizer: torch.optim.Optimizer, step: int | None = None
    ) -> Restored | None:
        """Read a step into model and optimizer, after checking all its files.

        Random generators go on too, where there are as many ranks as there were; else each rank
        keeps its own.

        Args:
            model: as for `save`; of any layout.
            optimizer: its state is replaced, and the settings of its groups.
            step: None: the newest that is intact, if there is any at all. Newer ones that are
                damaged are set aside as ``damaged-<step>``, with a warning that names the file.

        Returns:
            None if there is no checkpoint.

        Raises:
            StateError: the step is not there or is damaged, all are, or its tensors are of
                another model.
        """
        steps = self.steps()
        if step is not None:
            if step not in steps:
                raise StateError(
                    f"no checkpoint of step {step} in {self.folder}; steps there: "
                    f"{', '.join(map(str, steps)) or 'none'}"
                )
            if damage := self._damage(step):
                raise StateError(f"checkpoint {self.folder / str(step)} is damaged: {damage[0]}")
        elif not steps:
            return None
        else:
            step = self._newest_intact(steps)
        return self._read(step, model, optimizer)

    def _damage(self, step: int) -> list[str]:
        """What is wrong with a step's files; each rank looks at its share of them."""
        found = find_damage(self.folder / str(step), part=(self._rank, self._ranks))
        return sorted({phrase for each in self.gather(found) for phrase in each})

    def _newest_intact(self, steps: list[int]) -> int:
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            if not (damage := self._damage(step)):
                break
            damaged[step] = damage[0]
        else:
            said = "; ".join(f"step {step}: {what}" for step, what in damaged.items())
            raise StateError(
                f"every checkpoint in {self.folder} is damaged ({said}); restore the files from "
                "a copy, or start the run anew in another out="
            )
        for bad, what in damaged.items():
            aside = self.folder / f"damaged-{bad}"
            if self._rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(bad)).rename(aside)
                warnings.warn(
                    f"checkpoint {self.folder / str(bad)} is damaged: {what}; it is now "
                    f"{aside.name}, and the run goes on from step {step}",
                    stacklevel=4,
                )
        self.gather(None)  # no rank goes on before they are set aside
        return step

    def _read(self, step: int, model: Model, optimizer: torch.optim.Optimizer) -> Restored:
        path = self.folder / str(step)
        about = json.loads((path / HOST).read_text())
        there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = named_tensors(model)
        whole = not (isinstance(model, Parallel) and model.schedule)  # no stages
        refuse_other_tensors(path, tensors, there, whole=whole)
        groups = about["groups"]
        if len(groups) != len(optimizer.param_groups):
            raise StateError(
                f"checkpoint {path} has an optimizer of {len(groups)} groups, this one has "
                f"{len(optimizer.param_groups)}; resume with the config it was saved with"
            )
        tensors |= ready_state(model, optimizer, there)
        own = {f"rng.{name}.{self._rank}": state for name, state in _rng().items()}
        if about["ranks"] == self._ranks:
            tensors |= {name: state for name, state in own.items() if name in there}
        dcp.load(
            tensors,
            checkpoint_id=path,
            process_group=self._group,
            no_dist=self._group is None,
        )
        fill_twins(model, optimizer)
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: _as(group.get(key), value) for key, value in saved.items()})
        _set_rng({name.split(".")[1]: tensors[name] for name in own if name in tensors})
        return Restored(step, about["host"])

    def gather(self, value: Any) -> list[Any]:
        """A JSON-able value of every rank, in their order."""
        self.wait()  # the writer uses the group too
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._ranks
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _agreed(self, value: Any) -> Any:
        """The first rank's value, on all."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def close(self) -> None:
        """Wait for the last step."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def written_steps(folder: Path) -> list[int]:
    """Steps in a folder of checkpoints that were written completely."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def _rng() -> dict[str, torch.Tensor]:
    """States of torch's random generators on this rank."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng(states: dict[str, torch.Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _as(old: Any, value: Any) -> Any:
    """A value from JSON in the form that an optimizer's group had it."""
    if isinstance(old, torch.Tensor):
        return torch.full_like(old, value)
    return tuple(value) if isinstance(value, list) else value
