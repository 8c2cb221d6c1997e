"""Memory of suspended forwards: its size, the free memory, and offloading.

A storage can be shrunk to nothing and grown again: every reference to its tensors stays valid.
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
    """Tracks the storages that are allocated while it is active, and reports other storages that are used.

    Example:
        >>> import torch
        >>> with (tracker := AllocationTracker()):
        ...     kept = torch.zeros(1000) + torch.ones(1000)
        >>> tracker.num_bytes
        4000
    """

    def __init__(self, manager: OffloadManager | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._manager = manager
        self._allocated: dict[int, StorageWeakRef] = {}
        self._others: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._allocated and storage._cdata not in self._others:
                self._others[storage._cdata] = StorageWeakRef(storage)
                if self._manager:
                    self._manager.share(storage._cdata)
        output = func(*args, **kwargs)
        for storage in _storages(output):
            if storage._cdata not in self._others and storage._cdata not in self._allocated:
                self._allocated[storage._cdata] = StorageWeakRef(storage)
        return output

    def share(self, key: int) -> bool:
        """Stop tracking a storage that others use as well; return True if it was tracked."""
        return self._allocated.pop(key, None) is not None

    @property
    def storages(self) -> list[UntypedStorage]:
        """Return the storages still in use."""
        self._allocated = {key: ref for key, ref in self._allocated.items() if not ref.expired()}
        alive = [UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self._allocated.values()]
        return [storage for storage in alive if storage is not None]

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages)


class OffloadedStorages:
    """Keeps the contents of one device's storages until `restore`: in main memory (GPU only), or in a file."""

    def __init__(self, storages: list[UntypedStorage]) -> None:
        self._sizes = [(s, s.nbytes()) for s in storages if s.nbytes() and s.resizable()]
        self.num_bytes = sum(size for _, size in self._sizes)
        self._on_host: list[UntypedStorage] = []
        self._file: Path | None = None
        host = torch.device("cpu")
        if self._sizes and self._sizes[0][0].device != host and free_memory(host) > 2 * self.num_bytes:
            self._on_host = [storage.cpu() for storage, _ in self._sizes]
        elif self._sizes:
            self._file = self._write()
        for storage, _ in self._sizes:
            storage.resize_(0)

    def _write(self) -> Path:
        # closed, because a process can have only a limited number of open files
        descriptor, name = tempfile.mkstemp(prefix="lightning_bn_")
        try:
            with open(descriptor, "wb") as file:
                for storage, _ in self._sizes:
                    file.write(_as_bytes(storage.cpu()))
        except BaseException:
            os.unlink(name)
            raise
        return Path(name)

    def restore(self) -> None:
        """Allocate every storage again, with its contents."""
        if self._file is None:
            for (storage, size), copy in zip(self._sizes, self._on_host, strict=True):
                storage.resize_(size)
                storage.copy_(copy)
            return
        try:
            with open(self._file, "rb") as file:
                for storage, size in self._sizes:
                    storage.resize_(size)
                    on_host = storage if storage.device.type == "cpu" else UntypedStorage(size)
                    file.readinto(_as_bytes(on_host))
                    if on_host is not storage:
                        storage.copy_(on_host)
        finally:
            self._file.unlink()


class OffloadManager:
    """Keeps suspended forwards within ``limit`` bytes; it offloads the one that has waited longest first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.spilled = limit, 0
        self._trackers: list[AllocationTracker] = []
        self._waiting: dict[AllocationTracker, int] = {}
        self._offloaded: dict[AllocationTracker, OffloadedStorages] = {}
        self._thread = ThreadState()

    @contextmanager
    def keep_track(self) -> Iterator[AllocationTracker]:
        """Track the allocations of a forward."""
        tracker = AllocationTracker(self)
        self._trackers.append(tracker)
        try:
            with tracker:
                yield tracker
        finally:
            self._trackers.remove(tracker)

    def share(self, key: int) -> None:
        """Keep a storage that another forward uses as well, such as a cast of a weight."""
        for tracker in self._trackers:
            if tracker.share(key):
                self._restore(tracker)

    @contextmanager
    def waiting(self, tracker: AllocationTracker, shared: Iterable[Tensor]) -> Iterator[None]:
        """Allow offloading while a forward waits, except for the ``shared`` tensors."""
        for tensor in shared:
            tracker.share(tensor.untyped_storage()._cdata)
        self._waiting[tracker] = tracker.num_bytes
        while self._waiting and sum(self._waiting.values()) > self.limit:
            self._offload(next(iter(self._waiting)))
        try:
            yield
        finally:
            self._waiting.pop(tracker, None)
            self._restore(tracker)

    def _offload(self, tracker: AllocationTracker) -> None:
        with self._thread.activate():  # else the running forward's tracker would count these copies
            self._offloaded[tracker] = OffloadedStorages(tracker.storages)
        self.spilled += self._offloaded[tracker].num_bytes
        del self._waiting[tracker]

    def _restore(self, tracker: AllocationTracker) -> None:
        if tracker in self._offloaded:
            with self._thread.activate():
                self._offloaded.pop(tracker).restore()


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; on the host, the limit of the container counts as well."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + cached
    import psutil

    return min(psutil.virtual_memory().available, *_free_in_container())


def _free_in_container() -> Iterator[int]:
    # limits of control groups, v2 and v1
    v1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit, usage in (("memory.max", "memory.current"), v1):
        try:
            yield int((Path("/sys/fs/cgroup") / limit).read_text()) - int((Path("/sys/fs/cgroup") / usage).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue


def _as_bytes(storage: UntypedStorage) -> ctypes.Array[ctypes.c_ubyte]:
    # NumPy's view would make the storage's size fixed
    return (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())


def _storages(tree: Any) -> Iterator[UntypedStorage]:
    # sparse tensors have no storage
    return (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor) and torch._C._has_storage(x))
