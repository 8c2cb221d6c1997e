"""Which calls of a layer count: those that would have moved its running statistics in training, and no others.

Random programs of calls stand for training steps. The truth runs the same program by its definition, in float64.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_bn import precise_bn
from tests.hand_written import state
from tests.truth import assert_close_to

CHANNELS = 2
Call = tuple[int, str, str]
"""Number of the layer, what it is called under, and on which samples."""
TRACKED = ("plain", "no_grad")
WITH_THE_BATCH = (*TRACKED, "track_running_stats", "momentum")
HOW = (*WITH_THE_BATCH, "layer.eval", "net.eval", "net.eval, flag by flag", "teacher")
PARTS = ("all", "some", "one", "none")


class Program(nn.Module):
    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self.calls = calls
        self.layers, self.teacher = (nn.ModuleList(nn.BatchNorm1d(CHANNELS) for _ in range(3)) for _ in "12")
        for layer in (*self.layers, *self.teacher):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, number = x[:, :CHANNELS], x[:, CHANNELS]
        for place, how, part in self.calls:
            layer = (self.teacher if how == "teacher" else self.layers)[place]
            rows = chosen(number, part)
            with self.under(how, layer):
                h = with_answer(h, rows, layer(h[rows]))
        return h

    @contextmanager
    def under(self, how: str, layer: Any) -> Iterator[None]:
        flags = [m.training for m in self.modules()]
        old = getattr(layer, how, None)
        if how in ("track_running_stats", "momentum"):
            setattr(layer, how, 0.0 if how == "momentum" else False)
        elif how == "layer.eval":
            layer.eval()
        elif how == "teacher":
            self.teacher.eval()
        elif how.startswith("net.eval"):
            self.eval()
        with torch.no_grad() if how == "no_grad" else nullcontext():
            yield
        if how in ("track_running_stats", "momentum"):
            setattr(layer, how, old)
        elif how in ("layer.eval", "net.eval"):
            (layer if how == "layer.eval" else self).train()
        elif how == "net.eval, flag by flag":
            for m, mode in zip(self.modules(), flags, strict=True):
                m.training = mode


def chosen(number: Tensor, part: str) -> Tensor:
    """Which samples take part, by their number in the population."""
    return {"all": number >= 0, "some": number % 3 != 1, "one": number == 2, "none": number < 0}[part]


def with_answer(h: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    h = h.clone()
    h[rows] = h[rows] / 2 + torch.tanh(y + y.square() / 3)
    return h


def inputs_that_count(net: Program, groups: Sequence[Tensor]) -> dict[str, Tensor]:
    """By definition: each group of batches is one batch, and each call normalizes its own input."""
    found: dict[str, list[Tensor]] = {}
    for x in groups:
        h, number = x[:, :CHANNELS], x[:, CHANNELS]
        for place, how, part in net.calls:
            layer: Any = (net.teacher if how == "teacher" else net.layers)[place]
            rows = chosen(number, part)
            given = h[rows]
            mean, var = layer.running_mean, layer.running_var
            if how in WITH_THE_BATCH and len(given):
                mean, var = given.mean(0), given.var(0, correction=0)
            if how in TRACKED and len(given):
                found.setdefault(f"layers.{place}", []).append(given)
            h = with_answer(h, rows, (given - mean) / (var + layer.eps).sqrt())
    return {name: torch.cat(inputs) for name, inputs in found.items()}


def grouped(data: Sequence[Tensor], wanted: float) -> list[Tensor]:
    """As few whole batches as hold so many samples."""
    groups: list[list[Tensor]] = []
    for x in (x for x in data if len(x)):
        if groups and sum(map(len, groups[-1])) < wanted:
            groups[-1].append(x)
        else:
            groups.append([x])
    return [torch.cat(group) for group in groups]


@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(HOW), st.sampled_from(PARTS)), min_size=1, max_size=6),
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.sampled_from(["loader", 3, "population"]),
)
@example([(0, "net.eval, flag by flag", "all"), (0, "plain", "some"), (1, "momentum", "all")], [1, 2, 0, 1], 3)
@example([(0, "track_running_stats", "all"), (0, "plain", "all"), (1, "plain", "one")], [1, 1, 1, 1], "population")
def test_statistics_are_those_of_the_tracked_calls(calls: list[Call], sizes: list[int], batch_size: Any) -> None:
    torch.manual_seed(0)
    net = Program(calls).double()
    numbers = torch.arange(sum(sizes), dtype=torch.float64)
    x = torch.cat([torch.randn(len(numbers), CHANNELS).double() * 2 + numbers[:, None] / 3, numbers[:, None]], 1)
    data = list(x.split(sizes))
    before, stored = state(net), copy.deepcopy(net.state_dict())
    wanted = {"loader": 0.0, "population": float("inf")}.get(batch_size, batch_size)
    truth = inputs_that_count(net, grouped(data, wanted))
    if not truth or any(len(rows) == 1 for rows in truth.values()):
        with pytest.raises(ValueError, match=r"No batch reached|one value per channel"):
            precise_bn(net, data, normalization_batch_size=batch_size)
    else:
        assert_close_to(precise_bn(net, data, normalization_batch_size=batch_size), truth, sigma=1e-9, var=1e-9)
        stored.update({k: v for k, v in net.state_dict().items() if k.rpartition(".")[0] in truth})
    assert state(net) == before
    assert all(torch.equal(v, stored[k]) for k, v in net.state_dict().items())
