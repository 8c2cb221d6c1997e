"""Adding up batches: calls, layers and gaps between them, and how sure the result is of its mean."""

import torch
from torch import Tensor

from lightning_bn.core.population import Accumulator, PopulationStatistics


def fill(seen: Accumulator, name: str, x: Tensor) -> None:
    """Report one call of a layer whose input was ``x`` of shape (N, C)."""
    mean, var = seen.slot(name, len(x))
    mean.copy_(x.mean(0))
    var.copy_(x.var(0))


def assert_statistics_of(x: Tensor, name: str, seen: Accumulator, calls: int) -> None:
    found = seen.statistics()[0][name]
    torch.testing.assert_close(found.mean, x.mean(0).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.var, x.var(0, correction=0).double(), rtol=1e-6, atol=1e-6)
    assert found.count == len(x) and found.calls == calls


def test_batches_of_unequal_size_weigh_by_their_count() -> None:
    seen, x = Accumulator({"bn": 3}), torch.randn(23, 3)
    for batch in x.split([10, 2, 11]):
        fill(seen, "bn", batch)
        seen.end_of_batch()
    assert_statistics_of(x, "bn", seen, calls=3)


def test_every_call_of_a_layer_counts() -> None:
    seen, a, b = Accumulator({"a": 2, "b": 4}), torch.randn(30, 2), torch.randn(6, 4)
    for i in range(3):
        fill(seen, "b", b[2 * i : 2 * i + 2])
        for j in range(i + 1):  # 1, 2, then 3 calls
            start = sum(range(i + 1)) + j
            fill(seen, "a", a[5 * start : 5 * start + 5])
        seen.end_of_batch()
    assert_statistics_of(a, "a", seen, calls=6)
    assert_statistics_of(b, "b", seen, calls=3)


def test_a_layer_skipped_in_some_batches_counts_only_those_that_reached_it() -> None:
    seen, x = Accumulator({"always": 2, "sometimes": 2}), torch.randn(40, 2)
    for i, batch in enumerate(x.split(10)):
        fill(seen, "always", batch)
        if i % 2:
            fill(seen, "sometimes", batch)
        seen.end_of_batch()
    assert_statistics_of(x, "always", seen, calls=4)
    assert_statistics_of(torch.cat([x[10:20], x[30:]]), "sometimes", seen, calls=2)


def test_a_layer_never_reached_has_no_statistics() -> None:
    seen = Accumulator({"reached": 2, "unreached": 2})
    fill(seen, "reached", torch.randn(4, 2))
    seen.end_of_batch()
    assert list(seen.statistics()[0]) == ["reached"]


def test_an_unfinished_batch_does_not_count() -> None:
    seen, x = Accumulator({"bn": 2}), torch.randn(8, 2)
    fill(seen, "bn", x)
    seen.end_of_batch()
    fill(seen, "bn", torch.full((3, 2), 100.0))
    assert seen.statistics()[0]["bn"].count == 8


def test_a_call_with_one_value_has_no_variance_of_its_own() -> None:
    seen, x = Accumulator({"bn": 2}), torch.randn(5, 2)
    for row in x.split(1):
        mean, var = seen.slot("bn", 1)
        mean.copy_(row[0])
        var.zero_()
        seen.end_of_batch()
    assert_statistics_of(x, "bn", seen, calls=5)


def test_standard_error_of_equal_batches_is_the_textbook_one() -> None:
    seen, x = Accumulator({"bn": 3}), torch.randn(20, 16, 3)
    for batch in x:
        fill(seen, "bn", batch)
        seen.end_of_batch()
    textbook = x.mean(1).std(0, correction=1) / 20**0.5
    in_sigmas = textbook / x.reshape(-1, 3).std(0, correction=0)
    torch.testing.assert_close(seen.statistics()[0]["bn"].standard_error, in_sigmas.double(), rtol=1e-5, atol=0)


def test_standard_error_foretells_the_spread_of_the_mean_over_draws_of_unequal_batches() -> None:
    sizes, foretold, means = [4, 64, 16, 128, 4, 32], [], []
    for _ in range(200):
        seen = Accumulator({"bn": 50})
        for size in sizes:
            fill(seen, "bn", torch.randn(size, 50))
            seen.end_of_batch()
        found = seen.statistics()[0]["bn"]
        foretold.append(found.standard_error)
        means.append(found.mean)
    spread = torch.stack(means).std()
    rms = torch.stack(foretold).square().mean().sqrt()
    assert 0.75 < rms / spread < 1.2


def test_standard_error_of_a_single_call_is_unknown() -> None:
    seen = Accumulator({"bn": 3})
    fill(seen, "bn", torch.randn(9, 3))
    seen.end_of_batch()
    assert seen.statistics()[0]["bn"].standard_error.isnan().all()


def test_statistics_are_a_mapping_that_knows_what_it_was_shown() -> None:
    seen = Accumulator({"a": 1, "b": 1})
    for name in ("a", "b"):
        fill(seen, name, torch.randn(4, 1))
    seen.end_of_batch()
    statistics = PopulationStatistics(seen.statistics()[0], num_samples=4, num_batches=1, batch_size=4)
    assert list(statistics) == ["a", "b"] and len(statistics) == 2 and "c" not in statistics
    assert repr(statistics) == "PopulationStatistics(2 layers, 4 samples in 1 batches)"


def test_statistics_do_not_change_when_more_is_added() -> None:
    seen = Accumulator({"bn": 1})
    fill(seen, "bn", torch.ones(4, 1))
    seen.end_of_batch()
    before = seen.statistics()[0]["bn"].mean
    fill(seen, "bn", torch.zeros(4, 1))
    seen.end_of_batch()
    assert before.item() == 1
