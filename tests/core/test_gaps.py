"""Gaps: a layer's distance from other statistics, by the definition in the docs."""

import math

import pytest
import torch

from lightning_bn.core.gaps import mean_gap, var_gap


def test_gaps_are_the_rms_over_channels_in_sigmas_of_the_old_statistics_and_of_the_log_ratio_up_or_down() -> None:
    gap = mean_gap(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([4.0, 9.0]))
    assert gap.item() == pytest.approx(math.sqrt((1 + 0) / 2), rel=1e-12)
    gap = var_gap(torch.tensor([2.0, 0.5]), torch.tensor([1.0, 1.0]))
    assert gap.item() == pytest.approx(math.log(2), rel=1e-12)
    half = torch.tensor([1000.0, 0.0], dtype=torch.bfloat16)
    assert mean_gap(half.double() + 0.5, half, torch.ones(2)).item() == pytest.approx(0.5), "in float64"


def test_equal_statistics_have_no_gap_and_dead_channels_a_finite_one() -> None:
    zero = torch.zeros(1)
    for mean, var in ((torch.randn(8), torch.rand(8) + 0.1), (zero, zero)):
        assert mean_gap(mean, mean, var).item() == 0 and var_gap(var, var).item() == 0
    assert var_gap(torch.ones(1), zero).isfinite()
