"""GhostBNCallback: a training whose groups are normalized one by one, held against one written out by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bn import GhostBNCallback
from tests.callbacks.zoo import At, Evaluated, TinyNet, fit, said, statistics_of, train_loader


class ByHand(TinyNet):
    """TinyNet whose layers normalize, in training, each of ``groups`` by itself with `F.batch_norm`."""

    def __init__(self, groups: list[list[int]], layers: str = "bn1 bn2") -> None:
        super().__init__()
        self.groups, self.chosen = groups, layers.split()

    def normalized(self, name: str, x: Tensor) -> Tensor:
        bn = self.get_submodule(name)
        if not self.training or name not in self.chosen:
            return bn(x)
        output = torch.empty_like(x)
        for rows in self.groups:
            output[rows] = F.batch_norm(x[rows], None, None, bn.weight, bn.bias, True)
        with torch.no_grad():
            F.batch_norm(x, bn.running_mean, bn.running_var, None, None, True)  # by the whole batch
            bn.num_batches_tracked += 1
        return output

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.normalized("bn1", self.conv1(x)))
        return F.relu(self.normalized("bn2", self.conv2(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("callback", "groups", "layers"),
    [
        (GhostBNCallback(size=3), [[0, 3, 6], [1, 4, 7], [2, 5]], "bn1 bn2"),
        (GhostBNCallback(splits=2, grouping="contiguous"), [[0, 1, 2, 3], [4, 5, 6, 7]], "bn1 bn2"),
        (GhostBNCallback(splits=4, layers="*2"), [[0, 4], [1, 5], [2, 6], [3, 7]], "bn2"),
    ],
    ids=["three of unequal size", "contiguous", "of one layer"],
)
def test_a_whole_training_is_that_of_groups_normalized_by_hand(callback: Any, groups: Any, layers: str) -> None:
    ghosts, by_hand, plain = TinyNet(), ByHand(groups, layers), TinyNet()
    evaluated, by_hand_evaluated = Evaluated(), Evaluated()
    fit(ghosts, [callback, evaluated], precision="64-true")
    fit(by_hand, by_hand_evaluated, precision="64-true")
    fit(plain, precision="64-true")
    ours, theirs = ghosts.state_dict(), by_hand.state_dict()
    for key in (*dict(ghosts.named_parameters()), *statistics_of(ghosts), "bn1.num_batches_tracked"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-11, msg=key)
    assert evaluated.metrics == [pytest.approx(row) for row in by_hand_evaluated.metrics]
    assert not torch.allclose(ghosts.conv2.weight, plain.conv2.weight, rtol=1e-4)


@pytest.mark.parametrize(("batch_size", "options"), [(4, {"size": 4}), (3, {"splits": 1})])
def test_it_warns_once_where_a_batch_is_no_larger_than_a_ghost(batch_size: int, options: Any) -> None:
    loader, ghosts = train_loader(12, batch_size), GhostBNCallback(**options)
    (message,) = said("changes nothing", TinyNet(), ghosts, loader, accumulate_grad_batches=4)
    assert f"the {batch_size} samples" in message


def test_it_warns_of_frozen_layers_and_not_where_it_divides() -> None:
    frozen = At(lambda _, module: [module.bn1.eval(), module.bn2.eval()], "on_train_start")
    assert said("changes nothing: all of its layers are frozen", TinyNet(), [frozen, GhostBNCallback(size=4)])
    assert not said("changes nothing", TinyNet(), GhostBNCallback(size=7), max_epochs=1)
