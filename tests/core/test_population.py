"""Adding up batches: calls, layers and gaps between them, and how sure the result is of its mean."""

import pytest
import torch
from torch import Tensor

from lightning_bn.core.population import Accumulator, PopulationStatistics


def fill(seen: Accumulator, name: str, x: Tensor) -> None:
    """Report one call of a layer whose input was ``x`` of shape (N, C)."""
    mean, var = seen.slot(name, len(x))
    mean.copy_(x.mean(0))
    var.copy_(x.var(0) if len(x) > 1 else torch.zeros_like(var))


def filled(batches: list[Tensor]) -> Accumulator:
    seen = Accumulator({"bn": batches[0].shape[1]})
    for batch in batches:
        fill(seen, "bn", batch)
        seen.end_of_batch()
    return seen


@pytest.mark.parametrize(
    "batches",
    [
        {"bn": [[10], [2], [11]]},  # unequal sizes
        {"bn": [[1]] * 5},  # a call with one value has no variance of its own
        {"a": [[5], [5, 5], [5, 5, 5]], "b": [[2], [2], [2]]},  # every call counts
        {"always": [[10], [10], [10], [10]], "sometimes": [[], [10], [], [10]]},
    ],
)
def test_statistics_are_those_of_all_calls(batches: dict[str, list[list[int]]]) -> None:
    seen = Accumulator({"never": 2, **{name: 2 + i for i, name in enumerate(batches)}})
    given: dict[str, list[Tensor]] = {name: [] for name in batches}
    for of_batch in zip(*batches.values(), strict=True):
        for i, (name, sizes) in enumerate(zip(batches, of_batch, strict=True)):
            for size in sizes:
                given[name].append(torch.randn(size, 2 + i) * 3 + 1)
                fill(seen, name, given[name][-1])
        seen.end_of_batch()
    fill(seen, next(iter(batches)), torch.full((3, 2), 100.0))  # of an unfinished batch
    statistics = seen.statistics()[0]
    assert set(statistics) == set(batches), "a layer that was never called has none"
    for name, parts in given.items():
        x, found = torch.cat(parts), statistics[name]
        torch.testing.assert_close(found.mean, x.mean(0).double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.var, x.var(0, correction=0).double(), rtol=1e-5, atol=1e-5)
        assert found.count == len(x) and found.calls == len(parts)


def test_standard_error_of_equal_batches_is_the_textbook_one_and_of_a_single_call_unknown() -> None:
    x = torch.randn(20, 16, 3)
    textbook = x.mean(1).std(0, correction=1) / 20**0.5
    in_sigmas = textbook / x.reshape(-1, 3).std(0, correction=0)
    found = filled(list(x)).statistics()[0]["bn"].standard_error
    torch.testing.assert_close(found, in_sigmas.double(), rtol=1e-5, atol=0)
    assert filled([x[0]]).statistics()[0]["bn"].standard_error.isnan().all()


def test_statistics_are_a_mapping_that_does_not_change_when_more_is_added() -> None:
    seen = filled([torch.ones(4, 1)])
    statistics = PopulationStatistics(seen.statistics()[0], num_samples=4, num_batches=1, batch_size=4)
    fill(seen, "bn", torch.zeros(4, 1))
    seen.end_of_batch()
    assert list(statistics) == ["bn"] and len(statistics) == 1 and "c" not in statistics
    assert repr(statistics) == "PopulationStatistics(1 layers, 4 samples in 1 batches)"
    assert statistics["bn"].mean.item() == 1
