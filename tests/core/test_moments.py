"""Moments: as accurate as they say for every layout and mean, and indifferent to how a population is cut up."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_bn import Moments
from lightning_bn.core.moments import batch_statistics, kernel_was_accurate, may_use_kernel

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "NCHW": lambda: torch.randn(8, 5, 9, 7),
    "NCHW of one sample": lambda: torch.randn(1, 5, 2, 2),
    "NCHW of many samples": lambda: torch.randn(300, 3, 8, 8),
    "channels_last": lambda: torch.randn(8, 5, 9, 7).to(memory_format=torch.channels_last),
    "channels_last of many samples": lambda: torch.randn(300, 3, 16, 16).to(memory_format=torch.channels_last),
    "channels_last of one channel": lambda: torch.randn(8, 1, 9, 7).to(memory_format=torch.channels_last),
    "rows": lambda: torch.randn(33, 5),
    "30 rows of many channels": lambda: torch.randn(30, 20_000),
    "1,000 rows of many channels": lambda: torch.randn(1000, 1000),
    "two rows": lambda: torch.randn(2, 5),
    "one row": lambda: torch.randn(1, 5),
    "as many rows as the kernel gets at once, and one": lambda: torch.randn(2049, 5),
    "400,000 rows": lambda: torch.randn(400_000, 3),
    "sequences": lambda: torch.randn(16, 5, 11),
    "transposed sequences": lambda: torch.randn(16, 500, 5).transpose(1, 2),
    "volumes": lambda: torch.randn(4, 5, 3, 6, 7),
    "channels_last volumes": lambda: torch.randn(4, 5, 9, 6, 12).to(memory_format=torch.channels_last_3d),
    "every other pixel": lambda: torch.randn(8, 5, 18, 7)[:, :, ::2],
    "some of the channels": lambda: torch.randn(8, 12, 9, 7)[:, 2:7],
    "one sample, expanded": lambda: torch.randn(1, 5, 9, 7).expand(8, -1, -1, -1),
    "one pixel, expanded": lambda: torch.randn(64, 5, 1, 1).expand(-1, -1, 9, 7),
}


def truth(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in float64."""
    rows = x.double().movedim(1, -1).reshape(-1, x.shape[1])
    return rows.mean(0), rows.var(0, correction=0)


def assert_as_accurate_as_stated(mean: Tensor, var: Tensor, x: Tensor, kernel: bool = False) -> None:
    true_mean, true_var = truth(x)
    if kernel:
        assert ((mean.double() - true_mean).abs() <= 1e-4 * true_var.sqrt() + 2**-22 * true_mean.abs()).all()
        assert ((var.double() - true_var).abs() <= 1e-3 * true_var + (2**-22 * true_mean) ** 2).all()
        return
    sigma = 1e-6 if x.ndim > 2 and x.is_contiguous() else 4e-6
    assert ((mean.double() - true_mean).abs() <= sigma * true_var.sqrt() + 2**-22 * true_mean.abs()).all()
    assert ((var.double() - true_var).abs() <= 1e-5 * true_var + (2**-22 * true_mean) ** 2).all()


def kernel_is_trusted_and_accurate(x: Tensor) -> bool:
    """Whether the kernel's statistics of ``x`` are used; if so, they must be as accurate as stated."""
    count = x.numel() // x.shape[1]
    if count == 1 or not may_use_kernel(x):
        return False
    running_mean, running_var = torch.zeros(2, x.shape[1])
    torch.nn.functional.batch_norm(x, running_mean, running_var, training=True, momentum=1.0)
    if not kernel_was_accurate(x, running_mean, running_var):
        return False
    assert_as_accurate_as_stated(running_mean, running_var.double() * (count - 1) / count, x, kernel=True)
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_statistics_and_the_kernel_are_as_accurate_as_stated(layout: str) -> None:
    for mean in (0, 1, 2.5, 100, 1e4):
        x = LAYOUTS[layout]() + mean
        assert_as_accurate_as_stated(*batch_statistics(x), x)
        usual = {"NCHW": [1e4], "NCHW of many samples": [1], "rows": [0], "channels_last": [1]}  # or read twice
        assert kernel_is_trusted_and_accurate(x) or mean not in usual.get(layout, [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_statistics_are_as_accurate_for_other_precisions(layout: str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = (LAYOUTS[layout]() + 3).to(dtype)
        mean, var = batch_statistics(x)
        assert_as_accurate_as_stated(mean, var, x)
        assert mean.dtype in (torch.float32, torch.float64) and var.dtype in (torch.float32, torch.float64)


def test_batch_statistics_hold_when_only_one_channel_has_a_large_mean_and_leave_their_input_alone() -> None:
    x = torch.randn(5000, 4) * torch.tensor([1, 1e-3, 1e3, 1]) + torch.tensor([0, 1, 0, -1e4])
    before = x.clone()
    assert_as_accurate_as_stated(*batch_statistics(x), x)
    assert torch.equal(x, before)


@given(
    rows=st.integers(2, 5000),
    mean=st.floats(-4, 4).map(lambda exponent: 10**exponent),
    scale=st.floats(-3, 3).map(lambda exponent: 10**exponent),
    seed=st.integers(0, 2**31),
)
def test_any_number_of_rows_at_any_mean_is_accurate(rows: int, mean: float, scale: float, seed: int) -> None:
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)) * scale + mean
    assert_as_accurate_as_stated(*batch_statistics(x), x)
    kernel_is_trusted_and_accurate(x)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "rows"])
def test_batch_statistics_of_non_finite_values_are_not_finite(layout: str) -> None:
    for value in (torch.nan, torch.inf):
        x = LAYOUTS[layout]()
        x[0, 1] = value
        mean, var = batch_statistics(x)
        assert (mean.isfinite() & var.isfinite()).tolist() == [True, False, True, True, True]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    mean=st.sampled_from([0.0, 1.0, -100.0, 1e4]),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**31),
)
def test_partitions_of_one_population_merge_to_the_same_moments(
    sizes: list[int], mean: float, scale: float, order: object, seed: int
) -> None:
    x = mean + scale * torch.randn(sum(sizes), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pieces = [Moments.of(piece) for piece in x.split(sizes)]
    order.shuffle(pieces)  # type: ignore[attr-defined]
    merged = Moments.empty(1)
    for piece in pieces:
        merged = merged + piece

    exact = [Fraction(v) for v in x.flatten().tolist()]
    exact_mean = sum(exact) / len(exact)
    exact_m2 = sum((v - exact_mean) ** 2 for v in exact)
    sigma = float(exact_m2 / len(exact)) ** 0.5
    tolerance = 1e-12 * (1 + abs(mean) / scale)  # float64 knows a mean to 1e-16 of itself
    assert merged.count.item() == len(exact)
    assert abs(Fraction(merged.mean.item()) - exact_mean) <= tolerance * scale
    assert abs(Fraction(merged.m2.item()) - exact_m2) <= tolerance * max(float(exact_m2), scale * sigma)


def test_moments_of_nothing_have_no_nan_and_population_variance_is_biased_and_includes_that_of_means() -> None:
    nothing = Moments.empty(3) + Moments.empty(3)
    assert torch.equal(nothing.mean, torch.zeros(3).double()) and torch.equal(nothing.var, torch.zeros(3).double())
    sorted_data = Moments.of(torch.tensor([[0.0], [0.0]])) + Moments.of(torch.tensor([[2.0], [2.0]]))
    assert sorted_data.mean.item() == 1 and sorted_data.var.item() == 1
