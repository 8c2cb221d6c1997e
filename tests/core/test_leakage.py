"""Intra-class correlation, regrouping and the evidence of a run, against what is known of them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor

from lightning_bn.functional.leakage_test import EProcess, icc, icc_noise, leading_components, permutation_test


def numbers(sizes: list[int]) -> Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def textbook_icc(x: Tensor, sizes: list[int]) -> float:
    """One-way analysis of variance, group by group, of one component."""
    groups = x[:, 0].double().split(sizes)
    n, k = sum(sizes), len(sizes)
    between = sum(len(g) * (g.mean() - x[:, 0].mean()) ** 2 for g in groups) / (k - 1)
    within = sum(((g - g.mean()) ** 2).sum() for g in groups) / (n - k)
    size = (n - sum(m * m for m in sizes) / n) / (k - 1)
    return float((between - within) / (between + (size - 1) * within))


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6).filter(lambda sizes: max(sizes) > 1), st.integers(0, 10**6))
def test_the_correlation_is_that_of_analysis_of_variance(sizes: list[int], seed: int) -> None:
    x = torch.randn(sum(sizes), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean()
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    groups = numbers(sizes)
    assert icc(x, groups) == pytest.approx(textbook_icc(x, sizes), rel=1e-9, abs=1e-9)
    assert icc(x[shuffled], groups[shuffled]) == pytest.approx(icc(x, groups), rel=1e-9, abs=1e-9)


def test_the_correlation_is_that_of_the_rows_and_the_noise_the_spread_over_random_groups() -> None:
    shared, own = torch.randn(4000, 1, 3), torch.randn(4000, 8, 3)
    rows = (0.3**0.5 * shared + 0.7**0.5 * own).flatten(0, 1).double()
    assert icc(rows - rows.mean(0), numbers([8] * 4000)) == pytest.approx(0.3, abs=0.01)
    rows, groups = leading_components(torch.randn(400, 6)), numbers([8] * 50)
    found = torch.tensor([icc(rows[torch.randperm(400)], groups) for _ in range(400)])
    assert float(found.std()) == pytest.approx(icc_noise(rows, groups), rel=0.15)
    assert abs(float(found.mean())) < 0.2 * icc_noise(rows, groups)


@pytest.mark.parametrize("shape", [(200, 12), (60, 90)], ids=["tall", "wide"])
def test_components_are_the_leading_ones_of_standardized_channels(shape: tuple[int, int]) -> None:
    rows = torch.randn(shape) @ torch.randn(shape[1], shape[1]) + 1e4
    x = rows.double()
    theirs = PCA(5, whiten=True).fit_transform(((x - x.mean(0)) / x.std(0)).numpy())
    theirs = torch.from_numpy(theirs) / (len(rows) - 1) ** 0.5
    agree = (leading_components(rows, 5).T @ theirs).abs()
    torch.testing.assert_close(agree, torch.eye(5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_channels_that_are_dead_or_differ_by_rounding_alone_are_left_out() -> None:
    assert leading_components(torch.cat([torch.ones(50, 2), torch.randn(50, 1)], 1)).shape == (50, 1)
    assert leading_components(torch.ones(50, 3)).shape == (50, 0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        eps = torch.finfo(dtype).eps
        rounded = 3 * (1 + eps * torch.randint(0, 2, (50, 4), dtype=torch.float64))
        real = 1 + 10 * max(eps, 1e-5) * torch.randn(50, 2, dtype=torch.float64)
        assert leading_components(torch.cat([rounded, real], 1), eps=eps).shape == (50, 2)
        assert leading_components(1e-9 * torch.randn(50, 2), eps=eps).shape == (50, 2), "small, but no rounding"


def test_the_p_value_is_the_share_of_all_regroupings() -> None:
    rows = leading_components(torch.tensor([[0.0], [0.1], [1.0], [1.3], [5.0], [5.2]]))
    groups = numbers([2, 2, 2])

    def statistic(order: tuple[int, ...]) -> float:
        c = icc(rows[list(order)], groups)
        return abs(torch.tensor((1 + c) / (1 - c)).log().item())  # of pairs, mean square ratio in terms of the ICC

    ways = list(itertools.permutations(range(6)))
    share = sum(statistic(order) >= statistic(tuple(range(6))) - 1e-9 for order in ways) / len(ways)
    assert permutation_test([rows], groups, permutations=4000) == pytest.approx(share, rel=0.6)
    assert share == pytest.approx(1 / 15)


def test_one_layer_of_many_and_few_components_suffice() -> None:
    rows = [leading_components(torch.randn(256, 1)) for _ in range(20)]
    shared = torch.randn(32, 1, 16).expand(32, 8, 16).flatten(0, 1)
    rows[13] = leading_components(torch.randn(256, 16) + 0.35 * shared)
    assert permutation_test(rows, numbers([8] * 32), permutations=2000) < 0.001
    # as many components as rows, less one, would span all: every grouping would explain as much of them
    pairs = torch.randn(6, 1, 50).expand(6, 2, 50).flatten(0, 1) + 0.1 * torch.randn(12, 50)
    assert permutation_test([leading_components(pairs)], numbers([2] * 6), permutations=2000) < 0.001


def test_p_values_of_dependent_heavy_tailed_layers_are_uniform() -> None:
    found = []
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(60, 3, generator=generator).pow(3)
        layers = [first, first + 0.1 * torch.randn(60, 3, generator=generator), first.abs()]
        found.append(permutation_test([leading_components(x) for x in layers], numbers([2, 10, 20, 28]), 199, seed))
    share = [(sum(p <= level for p in found) / len(found), level) for level in (0.05, 0.2, 0.5)]
    assert all(abs(s - level) < 4 * (level * (1 - level) / 150) ** 0.5 for s, level in share)


def test_groups_of_equal_rows_and_of_equal_means_are_no_numbers_that_break_it() -> None:
    equal = torch.tensor([[1.0], [1.0], [-1.0], [-1.0], [2.0], [2.0], [0.5], [0.5]])
    rows = leading_components(equal)
    assert icc(rows, numbers([2] * 4)) == pytest.approx(1)
    assert permutation_test([rows], numbers([2] * 4)) == pytest.approx(1 / 105, rel=0.6), "one of 105 pairings"
    for seed in range(5):  # of each another is rounded to a little more or less than nothing
        values = torch.randn(4, 1, generator=torch.Generator().manual_seed(seed)).repeat_interleave(2, 0)
        assert permutation_test([leading_components(values)], numbers([2] * 4), 1000) == pytest.approx(1 / 105, rel=0.6)
    opposite = leading_components(torch.tensor([[1.0], [-1.0]] * 4))
    assert icc(opposite, numbers([2] * 4)) == pytest.approx(-1)
    assert permutation_test([opposite], numbers([2] * 4)) == pytest.approx(24 / 105, rel=0.6)


def capital(p_values: list[float]) -> float:
    """The formula of `EProcess`, term by term."""
    found = 1 / (len(p_values) + 1)
    for first in range(1, len(p_values) + 1):
        stake = 1 / (first * (first + 1))
        for p in p_values[first - 1 :]:
            stake *= p ** (-7 / 8) / 8
        found += stake
    return found


@given(st.lists(st.floats(5e-5, 1), min_size=1, max_size=12))
def test_evidence_is_the_formula(p_values: list[float]) -> None:
    evidence, largest = EProcess(), 1.0
    for n, p in enumerate(p_values, 1):
        evidence.add(p)
        largest = max(largest, capital(p_values[:n]))
    assert evidence.p_value == pytest.approx(1 / largest, rel=1e-9)


def evidence_of(p_values: list[float]) -> float:
    evidence = EProcess()
    for p in p_values:
        evidence.add(p)
    return evidence.p_value


def test_runs_of_any_length_keep_the_level_and_a_weak_leak_that_lasts_and_a_late_one_are_found() -> None:
    uniform = torch.rand(2_000, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert sum(evidence_of(p_values) <= 0.01 for p_values in uniform.tolist()) / 2_000 < 0.01
    assert evidence_of([0.02] * 5) <= 0.01
    assert evidence_of([0.5] * 30 + [0.0005] * 3) <= 0.01
