"""How many samples a pass of PreciseBNCallback normalizes together: B of the paper's Table 2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor
from torch.testing import assert_close

import lightning_bn.lockstep.pooled as pooled
import lightning_bn.lockstep.trial as trial
from lightning_bn import PreciseBNCallback
from tests.callbacks.zoo import TinyNet, digest, exact_statistics, fit, said, statistics_of, train_loader

SAMPLES = 232  # 29 batches of 8: two groups of 104 samples and one of 24


def together(batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    x, y = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y)


def fitted(precise: Any, module: TinyNet | None = None, **trainer: Any) -> TinyNet:
    module = module or TinyNet()
    fit(module, precise, train_loader(SAMPLES), max_epochs=1, **trainer)
    return module


def assert_measured(module: TinyNet, precise: PreciseBNCallback, batches: list[Any]) -> None:
    """What was measured and written is what float64 gives on these batches, each normalized by itself."""
    assert precise.result is not None
    for name, (mean, var) in exact_statistics(module, batches, together=False).items():
        assert_close(precise.result[name].mean, mean, rtol=1e-5, atol=1e-5)
        assert_close(precise.result[name].var, var, rtol=1e-5, atol=1e-5)
        assert digest(module.get_submodule(name).running_mean) == digest(precise.result[name].mean.float())


@pytest.mark.parametrize(
    ("normalization_batch_size", "batch_size", "group"),
    [
        ("auto", 8, 13),
        ("auto", 31, 4),
        ("auto", 32, 1),
        ("loader", 8, 1),
        (9, 8, 2),
        (100, 32, 4),
        ("population", 8, 29),
    ],
)
def test_whole_batches_are_normalized_together_until_they_hold_enough(
    normalization_batch_size: Any, batch_size: int, group: int
) -> None:
    options = {"normalization_batch_size": normalization_batch_size, "tolerance": None}
    precise, module = PreciseBNCallback(SAMPLES, **options), TinyNet()
    batches = list(train_loader(SAMPLES, batch_size))
    fit(module, precise, train_loader(SAMPLES, batch_size), max_epochs=1)
    groups = [together(batches[i : i + group]) for i in range(0, len(batches), group)]
    assert_measured(module, precise, groups)
    assert precise.result.batch_size == SAMPLES / len(groups)
    assert (precise.result.num_samples, precise.result.num_batches) == (SAMPLES, len(batches))


class Diverging(TinyNet):
    """Skips a layer for some batches."""

    def features(self, x: Tensor) -> Tensor:
        skipped = x.flatten()[0] > 0
        x = self.conv2(F.relu(self.bn1(self.conv1(x))))
        return F.relu(x if skipped else self.bn2(x)).mean((2, 3))


def test_auto_takes_the_batches_alone_with_one_warning_if_they_cannot_wait_for_each_other() -> None:
    precise, module = PreciseBNCallback(SAMPLES), Diverging()
    (found,) = said("opulation", module, precise, train_loader(SAMPLES), max_epochs=2, val_check_interval=15)
    assert "normalizes each batch alone" in found
    assert ("bn2" in found and "their end" in found) or "had ended" in found
    alone, plain = PreciseBNCallback(SAMPLES, normalization_batch_size="loader"), Diverging()
    fit(plain, alone, train_loader(SAMPLES), max_epochs=2, val_check_interval=15)
    assert digest(statistics_of(module)) == digest(statistics_of(plain))


def test_a_chosen_size_that_is_not_possible_is_an_error_that_leaves_everything_as_it_was() -> None:
    class Before(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            self.state = digest({key: value.clone() for key, value in module.state_dict().items()})

    module, before = Diverging(), Before()
    with pytest.raises(RuntimeError, match=r"diverge.*bn2.*layers="):
        fitted([PreciseBNCallback(SAMPLES, normalization_batch_size=64), before], module)
    assert digest(module.state_dict()) == before.state
    assert type(module.bn1) is torch.nn.BatchNorm2d


def test_auto_takes_what_fits_into_half_of_the_free_memory_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    needs: list[trial.MemoryEstimate] = []
    look = trial.Trial.memory
    monkeypatch.setattr(trial.Trial, "memory", lambda self, own: needs.append(look(self, own)) or needs[-1])
    fitted(PreciseBNCallback(SAMPLES))
    monkeypatch.setattr(pooled, "free_memory", lambda device: 2 * 4 * needs[0].num_bytes + 10)  # 4 batches in half
    precise = PreciseBNCallback(SAMPLES)
    module = TinyNet()
    (found,) = said("PreciseBN", module, precise, train_loader(SAMPLES), max_epochs=1, val_check_interval=15)
    assert "of 32 samples, not of 100" in found and "memory_limit=" in found
    batches = list(train_loader(SAMPLES))
    assert_measured(module, precise, [together(batches[i : i + 4]) for i in range(0, 29, 4)])


def test_a_memory_limit_changes_no_number_and_is_reported() -> None:
    plain, limited = PreciseBNCallback(SAMPLES), PreciseBNCallback(SAMPLES, memory_limit=5_000)
    one, other = fitted(plain), fitted(limited)
    assert digest(statistics_of(one)) == digest(statistics_of(other))
    assert plain.result.spilled == 0 < limited.result.spilled


def test_a_tolerance_stops_as_soon_as_the_standard_errors_are_below_it() -> None:
    exact, rough, hopeless = (
        PreciseBNCallback(SAMPLES, normalization_batch_size="loader", tolerance=tolerance)
        for tolerance in (None, 0.2, 1e-6)
    )
    for precise in (exact, rough, hopeless):
        fitted(precise)
    assert hopeless.result.num_samples == exact.result.num_samples == SAMPLES
    assert 8 * 8 <= rough.result.num_samples < SAMPLES
    for measured in rough.result.values():
        for error in (measured.standard_error, measured.var_standard_error):
            assert error.square().mean().sqrt() < 0.2


@pytest.mark.parametrize("batch_size", [8, 32])
def test_from_32_samples_on_auto_runs_batches_plainly_each_once(batch_size: int) -> None:
    """Smaller ones cost a trial forward, which tells whether they can wait for each other."""

    forwards: list[int] = []

    class Counts(TinyNet):
        def features(self, x: Tensor) -> Tensor:
            forwards.append(len(x))
            return super().features(x)

    fit(Counts(), PreciseBNCallback(64, tolerance=None), train_loader(64, batch_size), val=None, max_epochs=1)
    in_training_and_pass = 2 * 64 // batch_size
    assert (len(forwards) == in_training_and_pass) == (batch_size == 32)
