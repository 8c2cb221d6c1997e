"""The memory of micro-batches that wait: known beforehand, refused where it is not there, and put to disk if asked."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage, nn

from lightning_bn import PopulationStatistics, precise_bn
from lightning_bn.lockstep.offload import AllocationTracker, OffloadedStorages, OffloadManager, free_memory
from tests.memory import growth
from tests.ranks import run_on_ranks
from tests.zoo import CASES, case, cnn, images


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# --- what is alive ----------------------------------------------------------------------------------------------------


def test_what_is_alive_is_what_was_made_and_is_still_held() -> None:
    outside = torch.zeros(500)
    with (alive := AllocationTracker()):
        kept = torch.zeros(1000) + 1
        view, in_place = kept[:10], kept.add_(1)
        outside.add_(1)
        torch.zeros(10_000)
    assert alive.num_bytes == 4000
    del kept, in_place
    assert alive.num_bytes == 4000, "a view holds all"
    del view
    assert alive.num_bytes == 0


def test_sparse_tensors_are_passed_over() -> None:
    with (alive := AllocationTracker()):
        sparse = torch.eye(3).to_sparse()
        kept = sparse @ torch.ones(3, 4)
    assert kept.nbytes <= alive.num_bytes < 200


# --- elsewhere --------------------------------------------------------------------------------------------------------


def storages(*tensors: Tensor) -> list[UntypedStorage]:
    return [t.untyped_storage() for t in tensors]


def test_contents_come_back_as_they_were(folder: Path) -> None:
    tensors = [torch.randn(300), torch.randn(4, 5).bfloat16(), torch.arange(7), torch.zeros(0), torch.tensor([True])]
    views = [t[1:] for t in tensors]
    before = [t.clone() for t in tensors]
    spilled = OffloadedStorages(storages(*tensors))
    assert spilled.num_bytes == sum(t.nbytes for t in before)
    assert all(t.untyped_storage().nbytes() == 0 for t in tensors)
    (file,) = folder.iterdir()
    assert file.stat().st_size == spilled.num_bytes and not file.stat().st_mode & 0o077, "nobody else's to read"
    spilled.restore()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert all(torch.equal(a, b[1:]) for a, b in zip(views, before, strict=True))
    assert not list(folder.iterdir())


def test_more_may_lie_elsewhere_than_a_process_may_have_open_files() -> None:
    descriptors = Path("/proc/self/fd")
    tensors = [torch.randn(3) for _ in range(50)]
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    spilled = [OffloadedStorages(storages(t)) for t in tensors]
    if descriptors.exists():
        assert len(list(descriptors.iterdir())) == before
    for s in spilled:
        s.restore()


def test_a_disk_that_is_full_is_an_error_and_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(300), torch.randn(5)]
    before = [t.clone() for t in tensors]

    def full(storage: UntypedStorage) -> bytes:
        if storage.nbytes() < 100:
            raise OSError(28, "No space left on device")
        return b""

    monkeypatch.setattr("lightning_bn.lockstep.offload._as_bytes", full)
    with pytest.raises(OSError, match="No space"):
        OffloadedStorages(storages(*tensors))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert not list(folder.iterdir())


def test_room_is_made_by_the_one_that_has_waited_longest() -> None:
    room = OffloadManager(1000)
    with room.keep_track() as one:
        a = torch.zeros(200)
    with room.keep_track() as two:
        b = torch.ones(150)
    room._all = [one, two]
    with room.waiting(one, []):
        assert a.untyped_storage().nbytes() == 800
        with room.waiting(two, []):
            assert a.untyped_storage().nbytes() == 0 and b.untyped_storage().nbytes() == 600
            assert room.spilled == 800
        assert a.untyped_storage().nbytes() == 0
    assert torch.equal(a, torch.zeros(200))


def test_what_another_uses_comes_back_and_stays() -> None:
    room = OffloadManager(100)
    with room.keep_track() as one:
        a, own = torch.arange(200.0), torch.arange(300.0)
        with room.waiting(one, []):
            assert a.untyped_storage().nbytes() == own.untyped_storage().nbytes() == 0
            with room.keep_track():
                assert torch.equal(a + 1, torch.arange(200.0) + 1)
            with room.keep_track() as three, room.waiting(three, []):
                assert a.untyped_storage().nbytes() == 800
        with room.waiting(one, []):
            assert a.untyped_storage().nbytes() == 800 and own.untyped_storage().nbytes() == 0


# --- a pass -----------------------------------------------------------------------------------------------------------


def assert_same_bits(a: PopulationStatistics, b: PopulationStatistics) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name].mean, b[name].mean) and torch.equal(a[name].var, b[name].var), name


@pytest.mark.parametrize("name", CASES)
def test_a_limit_changes_no_bit(name: str, folder: Path) -> None:
    model, batches = case(name)
    batches = [part for x in batches for part in x.split(2)]
    unlimited = precise_bn(copy.deepcopy(model), batches, normalization_batch_size="population")
    assert unlimited.spilled == 0
    for limit in (1, 5000):
        limited = precise_bn(copy.deepcopy(model), batches, normalization_batch_size="population", memory_limit=limit)
        assert_same_bits(limited, unlimited)
        assert limited.spilled > 0 or limit > 1 or name == "one value per channel" or "float64 layers" in name
    assert not list(folder.iterdir())
    assert torch.utils._python_dispatch._is_in_torch_dispatch_mode is False, "torch.compile would not compile any more"


class Caching(nn.Module):
    """Makes a tensor once, and keeps it for all; hands on its input, and what it had before."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.two, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.linspace(-1, 1, x.shape[-1]).expand(1, 1, 1, -1).contiguous() * 3
        y = self.bn1(self.one(x + self.grid))
        return self.bn2(self.two(y.relu()) + y + self.grid[..., 1:-1])


def test_a_tensor_that_micro_batches_share_is_there_when_one_needs_it() -> None:
    batches = images(2, 1, 2, 1)
    torch.manual_seed(0)
    model = Caching()
    unlimited = precise_bn(copy.deepcopy(model), batches, normalization_batch_size="population")
    limited = precise_bn(model, batches, normalization_batch_size="population", memory_limit=1)
    assert_same_bits(limited, unlimited)
    assert model.grid is not None and model.grid.isfinite().all() and model.grid.untyped_storage().nbytes()

    class Afresh(Caching):
        def forward(self, x: Tensor) -> Tensor:
            if x[0, 0, 0, 0] == batches[0][0, 0, 0, 0]:
                self.grid = None  # made inside of the pass, by the one that waits longest
            return super().forward(x)

    afresh = Afresh()
    afresh.load_state_dict(model.state_dict())
    assert_same_bits(precise_bn(afresh, batches, normalization_batch_size="population", memory_limit=1), unlimited)


class Trouble(Exception):
    pass


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
def test_an_error_leaves_no_file_and_keeps_what_others_hold(folder: Path, error: type[BaseException]) -> None:
    model, held, files = cnn(), [], []

    def forward(model: Any, x: Tensor) -> None:
        held.append(model[0](x))
        model[1](held[-1])
        files.append(len(list(folder.iterdir())))
        if len(x) == 1:
            raise error

    with pytest.raises(error):
        precise_bn(model, images(3, 3, 1), forward=forward, normalization_batch_size="population", memory_limit=1)
    assert files[0] == 0 and max(files) > 0
    assert not list(folder.iterdir())
    assert all(t.untyped_storage().nbytes() == t.nbytes and t.isfinite().all() for t in held)


def test_too_little_memory_is_an_error_that_gives_both_numbers_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batches = cnn(), images(4, 4, 4, 4)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("lightning_bn.lockstep.pooled.free_memory", lambda device: 30_000)
    with pytest.raises(MemoryError, match=r"about [\d,]+ bytes alive at the widest BatchNorm layer, and 30,000") as e:
        precise_bn(model, batches, normalization_batch_size="population")
    assert "memory_limit=" in str(e.value) and "batch_size" in str(e.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert precise_bn(model, batches, normalization_batch_size="population", memory_limit=10_000).spilled > 0


def test_free_memory_is_at_most_that_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = free_memory(torch.device("cpu"))
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- as measured in another process -----------------------------------------------------------------------------------

ACTIVATION = 8
"""MiB of a micro-batch's activation at the widest layer."""


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 1),
        nn.BatchNorm2d(16),
        nn.MaxPool2d(8),
        nn.Conv2d(16, 4, 1),
        nn.BatchNorm2d(4),
    ).eval()


def peak(batch_size: Any, memory_limit: int | None, folder: str) -> tuple[float, int, float]:
    """MiB by which this process grew at most; bytes spilled; MiB that were predicted."""

    from lightning_bn.lockstep import trial

    predicted, spilled = [0.0], list[int]()
    estimate: Callable[..., Any] = trial.Trial.memory

    def spy(self: Any, own: Any) -> Any:
        found = estimate(self, own)
        predicted[0] = found.num_bytes * 12 / 2**20
        return found

    model = _network()
    batches = torch.randn(12, 2, 3, 256, 256).unbind()
    kwargs = {"normalization_batch_size": batch_size, "memory_limit": memory_limit}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        patch.setattr(trial.Trial, "memory", spy)
        precise_bn(model, [torch.randn(2, 3, 16, 16)] * 2, **kwargs)  # loads what is loaded once
        grown = growth(lambda: spilled.append(precise_bn(model, batches, **kwargs).spilled), of_its_own=2**18)
    return grown, spilled[0], predicted[0]


@pytest.mark.ddp  # for the processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and asks glibc")
def test_memory_is_as_predicted_and_a_limit_is_kept(folder: Path) -> None:
    ((one_pass, _, _),) = run_on_ranks(peak, 1, "loader", None, str(folder))
    ((unlimited, nothing, predicted),) = run_on_ranks(peak, 1, "population", None, str(folder))
    ((limited, spilled, _),) = run_on_ranks(peak, 1, "population", 2 * ACTIVATION * 2**20, str(folder))
    assert one_pass < 4 * ACTIVATION
    assert nothing == 0 and 11 * ACTIVATION < unlimited < 16 * ACTIVATION, "one activation for each, and the last one's"
    assert 0.8 * unlimited < predicted + ACTIVATION < 1.5 * unlimited
    assert spilled > 10 * ACTIVATION * 2**20
    assert limited < 6 * ACTIVATION, "two that wait, one that runs"
