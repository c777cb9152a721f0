"""Counts the bytes that tensors hold and the bytes that collectives send, operation by operation.

Every storage that an operation returns is counted from then until it is freed, once however many views it has. Works
on real tensors and on fake ones alike. What a collective sends is that of the ring algorithms: of S bytes on N devices
each sends S (N - 1) / N in an all-gather or a reduce-scatter, and twice that in an all-reduce.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..sharded import local

# name of the operation -> what it is, and which way of the ring it goes
COLLECTIVES = {
    "allreduce": ("all-reduce", 2),
    "allgather": ("all-gather", 1),
    "all_gather": ("all-gather", 1),
    "reduce_scatter": ("reduce-scatter", 1),
}


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds of tensors, each storage counted once."""
    held = [local(tensor) for tensor in tensors]
    return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in held}.values())


class FakeMode(FakeTensorMode):
    """FakeTensorMode that knows how often it is entered: DTensor enters it again to work out shapes, on tensors of full
    size that no real run holds."""

    depth = 0

    def __enter__(self) -> "FakeMode":
        self.depth += 1
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.depth -= 1
        super().__exit__(*args)


def _fake_place() -> tuple[int, int]:
    """Which fake mode is active, and how deep in it this is."""
    mode = active_fake_mode()
    return id(mode), getattr(mode, "depth", 0)


class Tracker(TorchDispatchMode):
    """Counts while it is entered; storages that were there before can be added by hand.

    Attributes:
        current, peak: bytes held now, and at most.
        sent: bytes that this process sends, by collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.sent: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> "Tracker":
        self._place = _fake_place()
        original = self._resize = torch.UntypedStorage.resize_

        # FSDP2 frees and refills gathered parameters in this way, which no operation shows
        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            self._change(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local operations are counted
        result = func(*args, **(kwargs or {}))
        if _fake_place() == self._place:
            if func.namespace in ("c10d", "_c10d_functional"):
                self._count(func, args)
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._free, key)
        self._change(key, storage.nbytes())

    def _change(self, key: int, size: int) -> None:
        if key in self._sizes:
            self.current += size - self._sizes[key]
            self._sizes[key] = size
            self.peak = max(self.peak, self.current)

    def _free(self, key: int) -> None:
        self.current -= self._sizes.pop(key, 0)

    def _count(self, func: Any, args: Any) -> None:
        name = func.name()
        for part, (kind, ways) in COLLECTIVES.items():
            if part in name:
                whole = max(_bytes(arg) for arg in args)  # of input and output the larger one
                size = _group_size(func, args)
                self.sent[kind] += ways * whole * (size - 1) // size
                return


def _group_size(func: Any, args: Any) -> int:
    """Processes that take part in a collective."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    if "group_name" in given:
        return dist.distributed_c10d._resolve_process_group(given["group_name"]).size()
    return dist.ProcessGroup.unbox(given["process_group"]).size()


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
