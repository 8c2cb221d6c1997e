"""What a suspended forward keeps alive, how much room there is for it, and how to put it elsewhere meanwhile.

A tensor's memory can be given back and taken again behind its back: the storage is shrunk to nothing and grown again,
and every reference to the tensor, in whatever frame or closure of the network, stays as good as it was.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_bn.lockstep.thread_state import ThreadState


class AllocationTracker(TorchDispatchMode):
    """Knows the memory that was allocated while it was active, and of it what is still in use.

    Args:
        room: Notified of every storage used that was not allocated here.

    Example:
        >>> import torch
        >>> with (alive := AllocationTracker()):
        ...     kept = torch.zeros(1000) + torch.ones(1000)
        >>> alive.num_bytes
        4000
    """

    def __init__(self, room: OffloadManager | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        self._found: dict[int, StorageWeakRef] = {}
        self._others: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._found and storage._cdata not in self._others:
                self._others[storage._cdata] = StorageWeakRef(storage)
                if self._room:
                    self._room.share(storage._cdata)
        output = func(*args, **kwargs)
        for storage in _storages(output):
            if storage._cdata not in self._others and storage._cdata not in self._found:
                self._found[storage._cdata] = StorageWeakRef(storage)
        return output

    def share(self, key: int) -> bool:
        """Let go of a storage that others use as well; whether it was one of these."""
        return self._found.pop(key, None) is not None

    @property
    def storages(self) -> list[UntypedStorage]:
        """The storages still in use."""
        self._found = {key: ref for key, ref in self._found.items() if not ref.expired()}
        found = [UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self._found.values()]
        return [storage for storage in found if storage is not None]

    @property
    def num_bytes(self) -> int:
        """What they take."""
        return sum(storage.nbytes() for storage in self.storages)


class OffloadedStorages:
    """Storages whose contents lie elsewhere until `restore`: those of a GPU in main memory, or all in a file.

    Args:
        storages: Of one device. Their memory is given back.
    """

    def __init__(self, storages: list[UntypedStorage]) -> None:
        self._held = [(s, s.nbytes()) for s in storages if s.nbytes() and s.resizable()]
        self.num_bytes = sum(size for _, size in self._held)
        self._on_host: list[UntypedStorage] = []
        self._file: Path | None = None
        host = torch.device("cpu")
        if self._held and self._held[0][0].device != host and free_memory(host) > 2 * self.num_bytes:
            self._on_host = [storage.cpu() for storage, _ in self._held]
        elif self._held:
            self._file = self._written()
        for storage, _ in self._held:
            storage.resize_(0)

    def _written(self) -> Path:
        # a file that is not kept open: more forwards may wait than a process may have open files
        descriptor, name = tempfile.mkstemp(prefix="lightning_bn_")
        try:
            with open(descriptor, "wb") as file:
                for storage, _ in self._held:
                    file.write(_as_bytes(storage.cpu()))
        except BaseException:
            os.unlink(name)
            raise
        return Path(name)

    def restore(self) -> None:
        """Give every storage its memory and contents again."""
        if self._file is None:
            for (storage, size), copy in zip(self._held, self._on_host, strict=True):
                storage.resize_(size)
                storage.copy_(copy)
            return
        try:
            with open(self._file, "rb") as file:
                for storage, size in self._held:
                    storage.resize_(size)
                    on_host = storage if storage.device.type == "cpu" else UntypedStorage(size)
                    file.readinto(_as_bytes(on_host))
                    if on_host is not storage:
                        storage.copy_(on_host)
        finally:
            self._file.unlink()


class OffloadManager:
    """Room for what suspended forwards keep alive; the one that has waited longest makes way.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.spilled = 0
        """Bytes put elsewhere so far."""
        self._all: list[AllocationTracker] = []
        self._waiting: dict[AllocationTracker, int] = {}
        self._elsewhere: dict[AllocationTracker, OffloadedStorages] = {}
        self._thread = ThreadState()

    @contextmanager
    def keep_track(self) -> Iterator[AllocationTracker]:
        """A mode to run a forward under."""
        alive = AllocationTracker(self)
        self._all.append(alive)
        try:
            with alive:
                yield alive
        finally:
            self._all.remove(alive)

    def share(self, key: int) -> None:
        """A storage is used by another forward than allocated it, such as a cast of a weight: it stays from now on."""
        for alive in self._all:
            if alive.share(key):
                self._bring_back(alive)

    @contextmanager
    def waiting(self, alive: AllocationTracker, brought: Iterable[Tensor]) -> Iterator[None]:
        """While a forward waits, with what it keeps alive, all but what it ``brought`` to the others."""
        for tensor in brought:
            alive.share(tensor.untyped_storage()._cdata)
        self._waiting[alive] = alive.num_bytes
        while self._waiting and sum(self._waiting.values()) > self.limit:
            self._spill(next(iter(self._waiting)))
        try:
            yield
        finally:
            self._waiting.pop(alive, None)
            self._bring_back(alive)

    def _spill(self, alive: AllocationTracker) -> None:
        with self._thread.activate():  # the forward that runs must not be thought to use, or own, what is copied here
            self._elsewhere[alive] = OffloadedStorages(alive.storages)
        self.spilled += self._elsewhere[alive].num_bytes
        del self._waiting[alive]

    def _bring_back(self, alive: AllocationTracker) -> None:
        if alive in self._elsewhere:
            with self._thread.activate():
                self._elsewhere.pop(alive).restore()


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device: on the host, what its memory and this process's container allow."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + cached
    import psutil  # which only those need who let the memory decide

    return min(psutil.virtual_memory().available, *_left_in_container())


def _left_in_container() -> Iterator[int]:
    """By the limits of control groups (v2, v1), where there are any."""
    v1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit, usage in (("memory.max", "memory.current"), v1):
        try:
            yield int((Path("/sys/fs/cgroup") / limit).read_text()) - int((Path("/sys/fs/cgroup") / usage).read_text())
        except (OSError, ValueError):  # none, or "max"
            continue


def _as_bytes(storage: UntypedStorage) -> ctypes.Array[ctypes.c_ubyte]:
    # NumPy's way in would mark it as of a fixed size
    return (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())


def _storages(tree: Any) -> Iterator[UntypedStorage]:
    # sparse tensors have none of their own
    return (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor) and torch._C._has_storage(x))
