"""Windows of offsets split into lag and noise, add up, and are the same as torchmetrics."""

from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_bn import DeadChannels, MeanGap, Moments, NonFiniteChannels, VarGap
from lightning_bn.tracking.drift import split
from lightning_bn.tracking.history import MAX_ROWS, History, Traces
from lightning_bn.tracking.recovery import ema_decay, solve_batch_stats

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batches(steps: int, channels: int) -> list[Batch]:
    rows = torch.randn(steps, 2, channels, dtype=torch.float64), torch.rand(steps, 2, channels, dtype=torch.float64)
    return [(m[0], v[0] + 0.1, m[1], v[1] + 0.1) for m, v in zip(*rows, strict=True)]


@given(st.integers(1, 7), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_gap_lag_and_noise_are_those_of_each_layer_alone(steps: int, sizes: list[int]) -> None:
    offsets = torch.randn(steps, sum(sizes), dtype=torch.float64)
    window = reduce(Moments.__add__, (Moments(torch.ones_like(o), o, torch.zeros_like(o)) for o in offsets))
    drift = split(window, sizes)
    for layer, part in enumerate(offsets.split(sizes, 1)):
        assert drift.gap[layer].item() == pytest.approx(part.square().mean().sqrt().item(), rel=1e-9)
        assert drift.lag[layer].item() == pytest.approx(part.mean(0).square().mean().sqrt().item(), rel=1e-9)
        spread = part.var(0, correction=0).mean().sqrt().item()
        assert drift.noise[layer].item() == pytest.approx(spread, rel=1e-9, abs=1e-12)


@given(st.sampled_from([0.01, 0.1, 0.5, 1.0, None]), st.integers(1, 4), st.integers(0, 50))
def test_what_is_recovered_is_what_went_in(momentum: float | None, calls: int, tracked: int) -> None:
    batch = torch.randn(6, dtype=torch.float64)
    before = after = torch.randn(6, dtype=torch.float64)
    for number in range(calls):
        share = momentum if momentum is not None else 1 / (tracked + number + 1)
        after = (1 - share) * after + share * batch
    m = torch.tensor(momentum if momentum is not None else torch.nan, dtype=torch.float64)
    kept = ema_decay(m, torch.tensor(calls), torch.tensor(tracked))
    assert torch.allclose(solve_batch_stats(before, after, kept), batch, rtol=0, atol=1e-11)


def test_metrics_are_the_functions_over_all_updates_and_their_forward_gives_the_batchs() -> None:
    seen = batches(5, 3)
    metrics = MetricCollection({part: MeanGap(3, part=part) for part in ("gap", "lag", "noise")} | {"var": VarGap(3)})
    offsets = torch.stack([(mean - ema) / var.sqrt() for mean, _, ema, var in seen])
    for batch, offset in zip(seen, offsets, strict=True):
        of_batch = metrics(*batch)
        assert of_batch["gap"].item() == pytest.approx(offset.square().mean().sqrt().item(), rel=1e-12)
    expected = {
        "gap": offsets.square().mean().sqrt(),
        "lag": offsets.mean(0).square().mean().sqrt(),
        "noise": offsets.var(0, correction=0).mean().sqrt(),
        "var": torch.stack([(var / ema).log() for _, var, _, ema in seen]).square().mean().sqrt(),
    }
    for name, value in metrics.compute().items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-12), name


def test_a_metric_refuses_other_channels_and_parts() -> None:
    with pytest.raises(ValueError, match=r"MeanGap was made for 3 channels.*\(4,\)"):
        MeanGap(3).update(*batches(1, 4)[0])
    with pytest.raises(ValueError, match="part must be 'gap', 'lag' or 'noise' but is 'drift'"):
        VarGap(3, part="drift")


def test_dead_and_nonfinite_channels_are_fractions() -> None:
    dead, bad, one = DeadChannels(eps=1e-3), NonFiniteChannels(2), torch.ones(2)
    for var, ema in ((torch.tensor([1e-6, 1.0]), one), (one, torch.tensor([1.0, torch.nan]))):
        dead.update(one, var, one, one)
        bad.update(one, one, ema, one)
    assert (dead.compute().item(), bad.compute().item()) == (0.25, 0.5)


@pytest.mark.parametrize("rows", [1, MAX_ROWS, MAX_ROWS + 1, 3000])
def test_history_keeps_all_of_a_run_at_one_resolution_and_its_exact_mean(rows: int) -> None:
    history, resumed = History(["gap"], layers=2), History(["gap"], layers=2)
    first = torch.tensor([2.0, torch.nan])
    for step in range(rows):
        if step == rows // 2:
            resumed.load_state_dict(history.state_dict())
        row = {"gap": first if step < rows * 0.8 else torch.tensor([0.0, 1.0])}
        history.add(step, row)
        if step >= rows // 2:
            resumed.add(step, row)
    assert len(history.steps) == len(history["gap"]) <= MAX_ROWS and history.rows_seen == rows
    spans = torch.tensor([-1, *history.steps]).diff()
    assert (spans[:-1] == spans[0]).all() and spans[-1] <= spans[0]
    early = -(-8 * rows // 10)
    assert history.overall("gap")[0].item() == pytest.approx(2 * (early / rows) ** 0.5, rel=1e-4)
    assert history.overall("gap")[1].item() == pytest.approx(1.0 if early < rows else torch.nan, nan_ok=True)
    assert torch.equal(history["gap"].nan_to_num(9.0), resumed["gap"].nan_to_num(9.0))


def test_merging_rows_takes_the_one_that_was_measured_and_traces_stay_bounded() -> None:
    history, traces = History(["gap"], layers=1), Traces()
    for step in range(MAX_ROWS + 1):
        history.add(step, {"gap": torch.tensor([torch.nan if step % 2 else 2.0])})
    assert torch.equal(history["gap"], torch.full((MAX_ROWS // 2 + 1, 1), 2.0))
    for step in range(10 * MAX_ROWS):
        traces.add(step, torch.zeros(2, 1))
    assert len(traces.steps) == len(traces.points) <= 4 * MAX_ROWS
    assert set(torch.tensor(traces.steps).diff().tolist()) == {4}, "all of the run at one resolution"
