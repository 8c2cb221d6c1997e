"""The memory of a pass is that of a bare forward; that of micro-batches that wait is known, and on disk if asked."""

import copy
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage, nn

from lightning_bn import PopulationStatistics, precise_bn
from lightning_bn.lockstep import trial
from lightning_bn.lockstep.offload import AllocationTracker, OffloadedStorages, OffloadManager
from tests.memory import growth
from tests.ranks import run_on_ranks
from tests.zoo import case, cnn, images

jointly = partial(precise_bn, normalization_batch_size="population")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


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


def storages(*tensors: Tensor) -> list[UntypedStorage]:
    return [t.untyped_storage() for t in tensors]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0


def test_contents_come_back_as_they_were(folder: Path) -> None:
    tensors = [torch.randn(300), torch.randn(4, 5).bfloat16(), torch.arange(7), torch.zeros(0), torch.tensor([True])]
    views = [t[1:] for t in tensors]
    before, files = [t.clone() for t in tensors], open_files()
    spilled = OffloadedStorages(storages(*tensors))
    assert open_files() == files, "there may be more than a process may have open"
    assert spilled.num_bytes == sum(t.nbytes for t in before)
    assert all(t.untyped_storage().nbytes() == 0 for t in tensors)
    (file,) = folder.iterdir()
    assert file.stat().st_size == spilled.num_bytes and not file.stat().st_mode & 0o077, "nobody else's to read"
    spilled.restore()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert all(torch.equal(a, b[1:]) for a, b in zip(views, before, strict=True))
    assert not list(folder.iterdir())


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


def assert_same_bits(a: PopulationStatistics, b: PopulationStatistics) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name].mean, b[name].mean) and torch.equal(a[name].var, b[name].var), name


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        *((name, 1) for name in ("ragged batches", "channels_last", "called several times", "timm BatchNormAct2d")),
        *(("bf16 model", 1), ("float32 and float64 layers", 1), ("one value per channel", 1), ("ragged batches", 5000)),
    ],
)
def test_a_limit_changes_no_bit(name: str, limit: int, folder: Path) -> None:
    model, batches = case(name)
    batches = [part for x in batches for part in x.split(2)]
    unlimited = jointly(copy.deepcopy(model), batches)
    assert unlimited.spilled == 0
    limited = jointly(model, batches, memory_limit=limit)
    assert_same_bits(limited, unlimited)
    assert limited.spilled > 0 or name in ("one value per channel", "float32 and float64 layers")
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
    unlimited = jointly(copy.deepcopy(model), batches)
    assert_same_bits(jointly(model, batches, memory_limit=1), unlimited)
    assert model.grid is not None and model.grid.isfinite().all() and model.grid.untyped_storage().nbytes()

    class Afresh(Caching):
        def forward(self, x: Tensor) -> Tensor:
            if x[0, 0, 0, 0] == batches[0][0, 0, 0, 0]:
                self.grid = None  # made inside of the pass, by the one that waits longest
            return super().forward(x)

    afresh = Afresh()
    afresh.load_state_dict(model.state_dict())
    assert_same_bits(jointly(afresh, batches, memory_limit=1), unlimited)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_leaves_no_file_and_keeps_what_others_hold(folder: Path, error: type[BaseException]) -> None:
    model, held, files = cnn(), [], []

    def forward(model: Any, x: Tensor) -> None:
        held.append(model[0](x))
        model[1](held[-1])
        files.append(len(list(folder.iterdir())))
        if len(x) == 1:
            raise error

    with pytest.raises(error):
        jointly(model, images(3, 3, 1), forward=forward, memory_limit=1)
    assert files[0] == 0 and max(files) > 0
    assert not list(folder.iterdir())
    assert all(t.untyped_storage().nbytes() == t.nbytes and t.isfinite().all() for t in held)


def test_too_little_memory_is_an_error_that_gives_both_numbers_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batches = cnn(), images(4, 4, 4, 4)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("lightning_bn.lockstep.pooled.free_memory", lambda device: 30_000)
    with pytest.raises(MemoryError, match=r"about [\d,]+ bytes alive at the widest BatchNorm layer, and 30,000") as e:
        jointly(model, batches)
    assert "memory_limit=" in str(e.value) and "batch_size" in str(e.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert jointly(model, batches, memory_limit=10_000).spilled > 0


def in_a_process(test: Any) -> Any:
    linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and asks glibc")
    return linux(pytest.mark.ddp(test))


LARGE, ACTIVATION = 25, 8
"""MiB of a batch's and of a micro-batch's activation at the widest layer."""


def network() -> nn.Module:
    wide = [nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)]
    return nn.Sequential(*wide, nn.MaxPool2d(8), nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4)).eval()


def peak(batch_size: Any, memory_limit: int | None, folder: str) -> tuple[float, int, float]:
    """MiB by which this process grew at most; bytes spilled; MiB that were predicted."""
    predicted, spilled = [0.0], list[int]()
    estimate: Callable[..., Any] = trial.Trial.memory

    def spy(self: Any, own: Any) -> Any:
        found = estimate(self, own)
        predicted[0] = found.num_bytes * 12 / 2**20
        return found

    model, batches = network(), torch.randn(12, 2, 3, 256, 256).unbind()
    kwargs = {"normalization_batch_size": batch_size, "memory_limit": memory_limit}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        patch.setattr(trial.Trial, "memory", spy)
        precise_bn(model, [torch.randn(2, 3, 16, 16)] * 2, **kwargs)  # loads what is loaded once
        grown = growth(lambda: spilled.append(precise_bn(model, batches, **kwargs).spilled), of_its_own=2**18)
    return grown, spilled[0], predicted[0]


@in_a_process
def test_memory_is_as_predicted_and_a_limit_is_kept(folder: Path) -> None:
    ((one_pass, _, _),) = run_on_ranks(peak, 1, "loader", None, str(folder))
    ((unlimited, nothing, predicted),) = run_on_ranks(peak, 1, "population", None, str(folder))
    ((limited, spilled, _),) = run_on_ranks(peak, 1, "population", 2 * ACTIVATION * 2**20, str(folder))
    assert one_pass < 4 * ACTIVATION
    assert nothing == 0 and 11 * ACTIVATION < unlimited < 17 * ACTIVATION, "one activation for each, and the last one's"
    assert 0.8 * unlimited < predicted + ACTIVATION < 1.5 * unlimited
    assert spilled > 10 * ACTIVATION * 2**20
    assert limited < 6 * ACTIVATION, "two that wait, one that runs"


BF16, CHANNELS_LAST = {"dtype": torch.bfloat16}, {"memory_format": torch.channels_last}


def peaks(layout: Any, mean: float) -> list[float]:
    """MiB by which this process grew at most while a network ran over a batch: barely, and in a pass."""
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.BatchNorm2d(32))
    nn.init.constant_(model[0].bias, mean)
    model = model.to(**layout).train()
    runs = (torch.no_grad()(lambda x: model(x)), lambda x: precise_bn(model, [x], normalization_batch_size="loader"))
    sizes = 1, 32 // model[0].weight.element_size()  # the first one loads what is loaded once
    small, large = (torch.randn(n, 3, 160, 160).to(**layout) for n in sizes)
    return [(run(small), growth(partial(run, large)))[1] for run in runs]


@in_a_process
@pytest.mark.parametrize(
    ("layout", "mean"), [({}, 0.0), ({}, 1e4), (CHANNELS_LAST, 1e4), (BF16, 1e4), (BF16 | CHANNELS_LAST, 0.0)]
)
def test_peak_memory_is_that_of_a_bare_forward(layout: Any, mean: float) -> None:
    ((bare, measured),) = run_on_ranks(peaks, 1, layout, mean)
    assert bare > 0.9 * LARGE, "the measurement sees activations"
    assert measured < bare + 0.25 * LARGE
