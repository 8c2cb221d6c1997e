"""How many samples a pass of PreciseBNCallback normalizes together: B of the paper's Table 2.

What `lightning_bn.precise_bn` makes of B, a tolerance and a memory limit is tested with the function.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from lightning_bn import PreciseBNCallback
from tests.callbacks.zoo import TinyNet, digest, exact_statistics, fit, said, statistics_of, train_loader

SAMPLES = 232  # 29 batches of 8: two groups of 104 samples and one of 24


def fitted(module: TinyNet, precise: PreciseBNCallback, group: int, batch_size: int = 8) -> list[str]:
    """Warnings of a fit in which so many batches are normalized together; what is written must be float64's of that."""
    train = train_loader(SAMPLES, batch_size)
    found = said("samples", module, precise, train, max_epochs=1)
    batches = list(train)
    groups = [[torch.cat(t) for t in zip(*batches[i : i + group], strict=True)] for i in range(0, len(batches), group)]
    for name, (mean, var) in exact_statistics(module, groups, together=False).items():
        assert_close(precise.result[name].mean, mean, rtol=1e-5, atol=1e-5)
        assert_close(precise.result[name].var, var, rtol=1e-5, atol=1e-5)
        assert digest(module.get_submodule(name).running_mean) == digest(precise.result[name].mean.float())
    assert precise.result.batch_size == SAMPLES / len(groups)
    assert (precise.result.num_samples, precise.result.num_batches) == (SAMPLES, len(batches))
    return found


@pytest.mark.parametrize(
    ("size", "batch_size", "group"),
    [("auto", 8, 13), ("auto", 31, 4), ("auto", 32, 1), ("loader", 8, 1), (9, 8, 2), ("population", 8, 29)],
)
def test_whole_batches_are_normalized_together_until_they_hold_enough(size: Any, batch_size: int, group: int) -> None:
    precise = PreciseBNCallback(SAMPLES, normalization_batch_size=size, tolerance=None)
    assert not fitted(TinyNet(), precise, group, batch_size)


class Diverging(TinyNet):
    """Skips a layer for some batches."""

    def features(self, x: Tensor) -> Tensor:
        skipped = x.flatten()[0] > 0
        x = self.conv2(F.relu(self.bn1(self.conv1(x))))
        return F.relu(x if skipped else self.bn2(x)).mean((2, 3))


def test_auto_takes_the_batches_alone_with_one_warning_if_they_cannot_wait_for_each_other() -> None:
    module, plain = Diverging(), Diverging()
    alone = PreciseBNCallback(64, normalization_batch_size="loader")
    (found,) = said("normalizes each batch alone", module, PreciseBNCallback(64), train_loader(64))
    assert ("bn2" in found and "their end" in found) or "had ended" in found
    fit(plain, alone, train_loader(64))
    assert digest(statistics_of(module)) == digest(statistics_of(plain))


def test_a_memory_limit_changes_no_number_and_a_tolerance_stops_a_pass() -> None:
    options = [{}, {"memory_limit": 5_000}, {"normalization_batch_size": "loader", "tolerance": 0.2}]
    plain, limited, rough = (PreciseBNCallback(SAMPLES, **each) for each in options)
    modules = [TinyNet(), TinyNet(), TinyNet()]
    for module, precise in zip(modules, (plain, limited, rough), strict=True):
        fit(module, precise, train_loader(SAMPLES), max_epochs=1)
    assert digest(statistics_of(modules[0])) == digest(statistics_of(modules[1]))
    assert plain.result.spilled == 0 < limited.result.spilled
    assert 8 * 8 <= rough.result.num_samples < SAMPLES
