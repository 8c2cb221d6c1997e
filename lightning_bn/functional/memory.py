"""What a suspended forward keeps alive, how much room there is for it, and how to put it elsewhere meanwhile.

A tensor's memory can be given back and taken again behind its back: the storage is shrunk to nothing and grown again,
and every reference to the tensor, in whatever frame or closure of the network, stays as good as it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Knows the memory that was allocated while it was active, and of it what is still in use.

    Args:
        room: Told of every storage used that was not allocated here.

    Example:
        >>> import torch
        >>> with (alive := Alive()):
        ...     kept = torch.zeros(1000) + torch.ones(1000)
        >>> alive.num_bytes
        4000
    """

    def __init__(self, room: Room | None = None) -> None:
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


class Spilled:
    """Storages whose contents lie elsewhere until `bring_back`: in main memory, or in a file where that is short.

    Args:
        storages: Their memory is given back.
    """

    def __init__(self, storages: list[UntypedStorage]) -> None:
        self.num_bytes = 0
        self._held: list[tuple[UntypedStorage, int, UntypedStorage | IO[bytes]]] = []
        for storage in storages:
            size = storage.nbytes()
            if size and storage.resizable():
                self._held.append((storage, size, _put_away(storage)))
                self.num_bytes += size
                storage.resize_(0)

    def bring_back(self) -> None:
        """Give every storage its memory and contents again."""
        for storage, size, elsewhere in self._held:
            storage.resize_(size)
            if isinstance(elsewhere, UntypedStorage):
                storage.copy_(elsewhere)
            else:
                with elsewhere as file:
                    file.seek(0)
                    file.readinto(_as_bytes(storage))  # type: ignore[attr-defined]
        self._held.clear()


class Room:
    """Room for what suspended forwards keep alive; the one that has waited longest makes way.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.spilled = 0
        """Bytes put elsewhere so far."""
        self._all: list[Alive] = []
        self._waiting: dict[Alive, int] = {}
        self._elsewhere: dict[Alive, Spilled] = {}

    def keep_track(self) -> Alive:
        """A mode to run a forward under."""
        self._all.append(Alive(self))
        return self._all[-1]

    def share(self, key: int) -> None:
        """A storage is used by another forward than allocated it, such as a cast of a weight: it stays from now on."""
        for alive in self._all:
            if alive.share(key) and alive in self._elsewhere:
                self._elsewhere.pop(alive).bring_back()

    @contextmanager
    def waiting(self, alive: Alive, brought: Iterable[Tensor]) -> Iterator[None]:
        """While a forward waits, with what it keeps alive, all but what it ``brought`` to the others."""
        for tensor in brought:
            alive.share(tensor.untyped_storage()._cdata)
        self._waiting[alive] = alive.num_bytes
        while self._waiting and sum(self._waiting.values()) > self.limit:
            first = next(iter(self._waiting))
            self._elsewhere[first] = Spilled(first.storages)
            self.spilled += self._elsewhere[first].num_bytes
            del self._waiting[first]
        try:
            yield
        finally:
            self._waiting.pop(alive, None)
            if alive in self._elsewhere:
                self._elsewhere.pop(alive).bring_back()


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device: on the host, what its memory and this process's container allow."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + cached
    return min(psutil.virtual_memory().available, *_left_in_container())


def _left_in_container() -> Iterator[int]:
    """By the limits of control groups (v2, v1), where there are any."""
    v1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit, usage in (("memory.max", "memory.current"), v1):
        try:
            yield int((Path("/sys/fs/cgroup") / limit).read_text()) - int((Path("/sys/fs/cgroup") / usage).read_text())
        except (OSError, ValueError):  # none, or "max"
            continue


def _put_away(storage: UntypedStorage) -> UntypedStorage | IO[bytes]:
    if storage.device.type != "cpu" and free_memory(torch.device("cpu")) > 2 * storage.nbytes():
        return UntypedStorage(storage.nbytes()).copy_(storage)
    file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by whoever brings it back
    file.write(_as_bytes(storage.cpu() if storage.device.type != "cpu" else storage))
    return file


def _as_bytes(storage: UntypedStorage) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data


def _storages(tree: Any) -> Iterator[UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
