"""What a rank sends and holds while something runs: collectives with their bytes, peak memory."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations of c10d (by which FSDP2 speaks) and of its functional form (DTensor): what each is,
# and which of argument and result is the whole tensor.
KINDS = {
    "_allgather_base_": ("all_gather", "first"),
    "all_gather_into_tensor": ("all_gather", "result"),
    "_reduce_scatter_base_": ("reduce_scatter", "second"),
    "reduce_scatter_tensor": ("reduce_scatter", "first"),
    "allreduce_": ("all_reduce", "first"),
    "all_reduce": ("all_reduce", "first"),
    "all_reduce_": ("all_reduce", "first"),
    "broadcast_": ("broadcast", "first"),
}
IGNORED_OPERATIONS = ("wait_tensor", "barrier", "monitored_barrier_")


class Traffic(NamedTuple):
    """Collectives of one kind along one axis."""

    times: int
    bytes: int  # that a rank sends, if the collective is a ring


class Meter(TorchDispatchMode):
    """Counts what passes while it is entered; made for fake tensors, right for real ones.

    Gradients, gathered parameters and saved activations all count as memory, from the moment
    their storage is made until it is freed. Enter it after a `FakeTensorMode`, if there is one.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.axes: dict[str, tuple[str, int]] = {}
        if mesh is not None:
            for axis in mesh.mesh_dim_names or ():
                self.axes[mesh.get_group(axis).group_name] = (axis, mesh[axis].size())
        self._counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        self._live: dict[int, weakref.ref[Any]] = {}
        self.held = self.peak = 0

    @property
    def traffic(self) -> dict[tuple[str, str], Traffic]:
        """By axis and kind."""
        return {key: Traffic(*pair) for key, pair in sorted(self._counts.items())}

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count what is there already."""
        for tensor in tensors:
            self._see(tensor.to_local() if isinstance(tensor, DTensor) else tensor)

    def add_reduction(self, axis: str, size: int) -> None:
        """An all-reduce of so many bytes that nobody ran, such as DDP's."""
        ranks = next((n for name, n in self.axes.values() if name == axis), 1)
        if ranks > 1:
            self.send(axis, "all_reduce", 2 * size * (ranks - 1) // ranks)

    def send(self, axis: str, kind: str, size: int) -> None:
        pair = self._counts[axis, kind]
        pair[0] += 1
        pair[1] += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as operations on local tensors
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._collective(func, args, result)
            self._recount()
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return result

    def _collective(self, func: Any, args: Any, result: Any) -> None:
        name = func._schema.name.partition("::")[2]
        if name in IGNORED_OPERATIONS:
            return
        if name not in KINDS:
            raise NotImplementedError(f"the collective {name} is not known to the meter")
        kind, which = KINDS[name]
        axis, ranks = next(
            (self.axes[group] for group in map(_group_name, args) if group in self.axes),
            ("world", dist.get_world_size()),
        )
        if ranks == 1:
            return
        whole = {"first": args[0], "second": args[1], "result": result}[which]
        size = sum(leaf.nbytes for leaf in tree_leaves(whole) if isinstance(leaf, torch.Tensor))
        once = size * (ranks - 1) // ranks
        self.send(axis, kind, 2 * once if kind == "all_reduce" else once)

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = weakref.ref(storage, lambda _: self._live.pop(key, None))
        self.held += storage.nbytes()
        if self.held > self.peak:
            self._recount()
            self.peak = max(self.peak, self.held)

    def _recount(self) -> None:
        """Storages are freed, and those of gathered parameters emptied, without a word."""
        self.held = sum(
            storage.nbytes() for ref in list(self._live.values()) if (storage := ref()) is not None
        )


def _group_name(argument: Any) -> str | None:
    """Of a process group, which is passed by itself, boxed or by its name."""
    if isinstance(argument, str):
        return argument
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        argument = dist.ProcessGroup.unbox(argument)
    return argument.group_name if isinstance(argument, dist.ProcessGroup) else None
