"""PreciseBN against the tools there are: it agrees with what they do right and has none of their known defects."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_bn import precise_bn
from tests.truth import assert_close_to, in_double
from tests.zoo import Shared, case, cnn, images


def test_ragged_batches_and_population_variance_agree_with_fvcore() -> None:
    model, batches = case("ragged batches")
    theirs = copy.deepcopy(model)
    theirs[3].eval()  # their caller's business
    update_bn_stats(theirs, batches, num_iters=len(batches))
    precise_bn(model, batches, normalization_batch_size="loader")
    for ours, other in ((model[1], theirs[1]), (model[5], theirs[5])):
        torch.testing.assert_close(ours.running_mean, other.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.running_var, other.running_var, rtol=1e-4, atol=0)


# --- fvcore -----------------------------------------------------------------------------------------------------------


class WithUnused(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        return self[0](x)


def test_an_unused_layer_is_not_zeroed() -> None:
    def model() -> WithUnused:
        return WithUnused(nn.BatchNorm1d(3), nn.BatchNorm1d(3))

    ours, theirs, batches = model(), model(), [torch.randn(8, 3)]
    update_bn_stats(theirs, batches, num_iters=1)
    precise_bn(ours, batches, normalization_batch_size="loader")
    assert theirs[1].running_var.eq(0).all(), "fvcore no longer has the defect"
    assert ours[1].running_var.eq(1).all() and ours[1].running_mean.eq(0).all()


def test_an_exception_leaves_neither_momentum_nor_hooks_behind() -> None:
    def broken(batches: list[Tensor]) -> Any:
        yield batches[0]
        raise OSError

    ours, theirs, batches = cnn(), cnn(), images(4)
    for model, run in (
        (theirs, lambda: update_bn_stats(theirs, broken(batches), 2)),
        (ours, lambda: precise_bn(ours, broken(batches), normalization_batch_size="loader")),
    ):
        with pytest.raises(OSError):
            run()
        left = model[1].momentum == 1 and len(model[1]._forward_pre_hooks) == 1
        assert left is (model is theirs)
    assert ours[1].momentum == 0.1 and not ours[1]._forward_pre_hooks


def test_a_large_mean_does_not_cancel() -> None:
    ours, theirs = nn.Sequential(nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(4))
    batches = [torch.randn(64, 4) + 1e4 for _ in range(20)]
    truth = torch.cat(batches).double().var(0, correction=0)
    update_bn_stats(theirs, batches, num_iters=20)
    precise_bn(ours, batches, normalization_batch_size="loader")
    assert (theirs[0].running_var - truth).abs().max() > 0.5, "fvcore no longer has the defect"
    torch.testing.assert_close(ours[0].running_var.double(), truth, rtol=2e-3, atol=0)


def test_buffers_are_written_in_place() -> None:
    model, batches = case("ragged batches")
    before = dict(model.named_buffers())
    address = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    precise_bn(model, batches, normalization_batch_size="loader")
    for name, buffer in model.named_buffers():
        assert buffer is before[name] and buffer.data_ptr() == address[name]


def test_a_shared_layer_is_not_refused() -> None:
    batches = images(4)
    with pytest.raises(AssertionError, match="reused"):
        update_bn_stats(Shared(), batches, num_iters=1)
    assert precise_bn(Shared(), batches, normalization_batch_size="loader")["bn"].calls == 2


def test_an_iterable_that_ends_early_is_not_an_error_that_loses_the_statistics() -> None:
    ours, theirs, batches = cnn(), cnn(), images(4, 4)
    truth = in_double(ours, batches)
    with pytest.raises(AssertionError, match="stops at"):
        update_bn_stats(theirs, batches, num_iters=10)
    assert_close_to(
        precise_bn(ours, batches, num_samples=1000, normalization_batch_size="loader"), truth, sigma=2e-5, var=1e-4
    )


# --- pycls, mmpretrain ------------------------------------------------------------------------------------------------


def test_fewer_samples_than_a_batch_take_the_whole_batch_and_zero_nothing() -> None:
    model, batches = case("ragged batches")
    truth = in_double(model, batches[:1])
    statistics = precise_bn(model, batches, num_samples=2, normalization_batch_size="loader")
    assert statistics.num_samples == 8
    assert_close_to(statistics, truth, sigma=2e-5, var=1e-4)
    assert model[1].running_var.gt(0).all()


def test_variance_between_batches_is_not_dropped() -> None:
    """The mean of batch variances is 0.01 here; sorted data and domains are like that."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    batches = [0.1 * torch.randn(500, 2) + mean for mean in (-1.0, 1.0)]
    precise_bn(model, batches, normalization_batch_size="loader")
    torch.testing.assert_close(model[0].running_var, torch.full((2,), 1.01), rtol=1e-2, atol=0)


# --- torch.optim.swa_utils --------------------------------------------------------------------------------------------


def test_batches_weigh_by_their_size() -> None:
    ours, theirs = nn.Sequential(nn.BatchNorm1d(1)), nn.Sequential(nn.BatchNorm1d(1))
    batches = [torch.zeros(9, 1), torch.ones(3, 1)]
    update_bn(batches, theirs)
    precise_bn(ours, batches, normalization_batch_size="loader")
    assert theirs[0].running_mean.item() == pytest.approx(0.5), "swa_utils no longer has the defect"
    assert ours[0].running_mean.item() == pytest.approx(0.25)


def test_dropout_is_off() -> None:
    """In front of a layer, it doubles the second moment of what the layer is given."""
    batches = [torch.randn(2000, 1) + 3]
    ours, theirs = (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1)) for _ in range(2))
    update_bn(batches, theirs)
    precise_bn(ours, batches, normalization_batch_size="loader")
    assert theirs[1].running_var.item() > 5, "swa_utils no longer has the defect"
    assert ours[1].running_var.item() == pytest.approx(1, rel=0.1)


def test_frozen_statistics_are_not_overwritten() -> None:
    batches = [torch.randn(50, 2) + 3]
    ours, theirs = (nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)) for _ in range(2))
    for model in (ours, theirs):
        model[0].eval()
        model[0].running_mean.fill_(1)
    update_bn(batches, theirs)
    precise_bn(ours, batches, normalization_batch_size="loader")
    assert not theirs[0].running_mean.eq(1).any(), "swa_utils no longer has the defect"
    assert ours[0].running_mean.eq(1).all()


def test_momentum_survives_an_error() -> None:
    ours, theirs, batches = cnn(), cnn(), [torch.zeros(2, 3, 8, 8), torch.zeros(1)]
    with pytest.raises(RuntimeError):
        update_bn(batches, theirs)
    with pytest.raises(RuntimeError):
        precise_bn(ours, batches, normalization_batch_size="loader")
    assert theirs[1].momentum is None, "swa_utils no longer has the defect"
    assert ours[1].momentum == 0.1
