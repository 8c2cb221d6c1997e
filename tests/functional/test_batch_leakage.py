"""`batch_leakage` sees what each layer normalizes together in training, on the model with population statistics."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import batch_leakage, find_bn, freeze_bn, ghost_bn, sync_bn
from lightning_bn.functional.leakage_rows import RowMeans, Rows
from lightning_bn.functional.leakage_test import icc, leading_components
from lightning_bn.layers.behavior import Handle, behaviors_of
from tests.callbacks.zoo import digest
from tests.ranks import run_on_ranks
from tests.zoo import cnn


def model() -> nn.Module:
    return cnn().train()


def classes(number: int, samples: int) -> Tensor:
    """Images of some classes, c0, c1, c2, ..., c0, c1, ..."""
    generator = torch.Generator().manual_seed(0)
    of_class = torch.randn(number, 3, 1, 1, generator=generator)
    noise = torch.randn(samples, 3, 8, 8, generator=generator)
    return noise + of_class[torch.arange(samples) % number]


def sorted_by_class(number: int, samples: int) -> Tensor:
    return classes(number, samples).view(-1, number, 3, 8, 8).transpose(0, 1).flatten(0, 1)


def shuffled(images: Tensor) -> Tensor:
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def test_random_batches_of_classes_pass_and_batches_of_one_class_do_not() -> None:
    random = batch_leakage(model(), shuffled(classes(8, 512)).split(32))
    ordered = batch_leakage(model(), sorted_by_class(8, 512).split(32))
    balanced = batch_leakage(model(), classes(8, 512).split(8))
    assert random.p_value > 0.01 and ordered.p_value == balanced.p_value == 1 / 20_000
    assert min(ordered.icc.values()) > 0.05 and max(balanced.icc.values()) < 0
    assert list(random.icc) == list(random.noise) == ["1", "5"]


@torch.no_grad()
def test_the_correlation_is_that_of_the_inputs_means() -> None:
    net, images = model().eval(), shuffled(classes(4, 96))
    groups, inputs = torch.arange(12).repeat_interleave(8), {"1": net[0](images), "5": net[:5](images)}
    found = batch_leakage(net, images.split(8)).icc
    for name, x in inputs.items():
        assert found[name] == pytest.approx(icc(leading_components(x.mean((2, 3))), groups), abs=1e-4)


def test_the_model_is_as_before_and_frozen_layers_are_left_out() -> None:
    net, batches = model(), classes(4, 64).split(8)
    before = digest(net.state_dict()), digest(torch.get_rng_state())
    with freeze_bn(net, layers="1"):
        assert list(batch_leakage(net, batches).icc) == ["5"]
    assert (digest(net.state_dict()), digest(torch.get_rng_state())) == before
    assert all(m.training and not behaviors_of(m) for m in net.modules())
    with freeze_bn(net), pytest.raises(ValueError, match="nothing leaks"):
        batch_leakage(net, batches)


@pytest.mark.parametrize(("grouping", "rows"), [("interleaved", 13), ("contiguous", 13), ("contiguous", 3)])
def test_the_groups_of_ghosts_are_those_that_are_normalized_together(grouping: Any, rows: int) -> None:
    layer = nn.BatchNorm1d(1, affine=False)
    x = torch.randn(rows, 1).exp()
    with ghost_bn(layer, size=4, grouping=grouping):
        (behavior,) = behaviors_of(layer)
        groups, y = behavior.normalization_groups(x), layer(x)
    assert groups is not None
    for group in groups.unique():
        assert y[groups == group].mean().abs() < 1e-5


@pytest.mark.parametrize("batches", [[], [torch.randn(8, 3, 8, 8)], [torch.full((4, 3, 8, 8), torch.nan)] * 3])
def test_nothing_to_compare_is_an_error(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="two normalization batches or more"):
        batch_leakage(model(), batches)


class Twice(nn.Module):
    """A layer on two feature maps of very different mean, and one on another."""

    def __init__(self) -> None:
        super().__init__()
        self.apart, self.other = nn.BatchNorm1d(1), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> None:
        self.apart(x[:, :1]), self.apart(x[:, :1] + 5), self.other(x)


def test_calls_of_a_layer_are_not_compared_with_each_other() -> None:
    """That they differ is a matter of domains (Sec. 5), not of leakage."""
    found = batch_leakage(Twice(), torch.randn(256, 2).split(16), layers="apart")
    assert found.p_value > 0.01 and list(found.icc) == ["apart"]


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_calls_the_most_extreme_is_reported(first: int) -> None:
    balanced = torch.linspace(-1, 1, 8).repeat(8) + 0.3 * torch.randn(64)
    x = torch.stack([balanced, torch.randn(64)], 1)

    def forward(model: nn.Module, x: Tensor) -> None:
        model(x[:, first : first + 1]), model(x[:, 1 - first : 2 - first])

    found = batch_leakage(nn.BatchNorm1d(1), x.split(8), forward=forward).icc[""]
    alone = batch_leakage(nn.BatchNorm1d(1), x[:, :1].split(8)).icc[""]
    assert found == alone < -0.05


def test_layers_of_other_batches_are_tested_by_themselves_and_the_smallest_p_value_counts_twice() -> None:
    batches = (torch.randn(256, 2) + 0.1 * torch.randn(16, 1, 2).expand(16, 16, 2).flatten(0, 1)).split(16)
    net = Twice()
    with ghost_bn(net, size=8, layers="other"):
        apart, other, both = (batch_leakage(net, batches, layers=name).p_value for name in ("apart", "other", None))
    assert both == 2 * min(apart, other) < 0.5 and apart != other


class Place(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + torch.finfo(x.dtype).eps * (torch.arange(len(x)) % 4 == 0).to(x)[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_that_depends_on_a_rows_place_in_the_batch_is_no_leak(dtype: torch.dtype) -> None:
    """Sums of equal rows are added up in another order at the end of a batch than at its beginning."""
    net = nn.Sequential(Place(), nn.BatchNorm1d(4)).to(dtype)
    with pytest.raises(ValueError, match="differ by more than rounding"):
        batch_leakage(net, [torch.ones(16, 4, dtype=dtype)] * 32)
    with pytest.raises(ValueError, match="one of them of two rows or more"):
        batch_leakage(net, torch.randn(32, 4).to(dtype).split(1))


def test_dead_and_non_finite_channels_and_layers_without_rows_are_left_out() -> None:
    net = nn.ModuleDict({"some": nn.BatchNorm1d(3), "nothing": nn.BatchNorm1d(3)})
    x = torch.randn(64, 1)
    rows = torch.cat([x, torch.full_like(x, torch.nan), torch.ones_like(x)], 1)
    found = batch_leakage(net, rows.split(8), forward=lambda m, x: (m["some"](x), m["nothing"](x[:0])))
    assert found.icc == pytest.approx({"some": batch_leakage(nn.BatchNorm1d(1), x.split(8)).icc[""]}, abs=1e-6)


def test_large_inputs_are_thinned_alike_in_all_layers() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    layers = find_bn(net)
    rows = RowMeans(layers)
    with Handle(layers.values(), rows), torch.no_grad():
        for _ in range(3):
            rows.next_batch(samples=1000)
            net(torch.randn(1000, 3))
    first, second = (Rows(*map(torch.cat, zip(*seen, strict=True))) for seen in rows.rows.values())
    assert len(first.means) == len(second.means) == 3 * 256
    assert torch.equal(first.batches, second.batches) and torch.equal(first.samples, second.samples)
    torch.testing.assert_close(net[1](net[0](first.means)), second.means)


LAYOUTS: dict[str, Any] = {
    "a sample's rows together": lambda x: x.flatten(0, 1),
    "a row of each sample, then the next of each": lambda x: x.transpose(0, 1).flatten(0, 1),
    "two views, a sample's rows together in each": lambda x: x.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2),
}


def rows_of_samples(samples: int, rows: int = 6) -> Tensor:
    """``(samples, rows, 4)``: independent samples, whose rows are alike, and differ by their place as well."""
    generator = torch.Generator().manual_seed(0)
    of_sample, of_place = torch.randn(samples, 1, 4, generator=generator), torch.randn(rows, 4, generator=generator)
    return of_sample + of_place + 0.5 * torch.randn(samples, rows, 4, generator=generator)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_of_a_sample_are_one_sample_however_they_come(layout: Any) -> None:
    net, x = nn.Sequential(nn.BatchNorm1d(4)), rows_of_samples(384)
    found = batch_leakage(net, x.split(16), forward=lambda m, b: m(layout(b)))
    groups = torch.arange(24).repeat_interleave(16)
    assert found.p_value > 0.01 and not found.left_out
    assert found.icc["0"] == pytest.approx(icc(leading_components(x.mean(1)), groups), abs=1e-6)
    ordered = x[x.mean((1, 2)).argsort()].split(16)
    assert batch_leakage(net, ordered, forward=lambda m, b: m(layout(b))).p_value < 0.001


@pytest.mark.parametrize("layout", list(LAYOUTS.values())[:2], ids=list(LAYOUTS)[:2])
def test_batches_of_other_sizes_and_sequences_of_other_lengths_are_samples_too(layout: Any) -> None:
    x = rows_of_samples(193)
    batches = [batch[:, : 3 + i % 3] for i, batch in enumerate(x.split(16))]  # the last batch is a single sample
    found = batch_leakage(nn.BatchNorm1d(4), batches, forward=lambda m, b: m(layout(b)))
    means = torch.cat([batch.mean(1) for batch in batches])
    assert found.icc[""] == pytest.approx(icc(leading_components(means), torch.arange(193) // 16), abs=1e-6)


def two_layers() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.BatchNorm1d(4) for name in ("samples", "rows")})


UNTOLD: dict[str, Any] = {
    "graphs of other numbers of nodes": lambda x: torch.cat([g[: 1 + i % 5] for i, g in enumerate(x)]),
    "fewer rows than samples": lambda x: x[:-3, 0],
    "rows that the batch does not show": lambda x: torch.randn(2 * len(x), 4),
    "rows that are ever the same": lambda x: torch.linspace(0, 1, 8 * len(x)).view(-1, 4),
}


@pytest.mark.parametrize("rows", UNTOLD.values(), ids=UNTOLD)
def test_a_layer_whose_rows_cannot_be_told_apart_by_sample_is_left_out_and_named(rows: Any) -> None:
    def forward(model: Any, x: Tensor) -> None:
        model["samples"](x.mean(1)), model["rows"](rows(x))

    batches = rows_of_samples(128).split(16)
    found = batch_leakage(two_layers(), batches, forward=forward)
    assert set(found.icc) == {"samples"} and set(found.left_out) == {"rows"}
    with pytest.raises(ValueError, match=r"Layer 'rows' is left out: .* pass batch_size_fn="):
        batch_leakage(two_layers(), batches, forward=forward, layers="rows")


def test_ghosts_that_cut_through_samples_are_left_out_and_others_are_not() -> None:
    x, net = rows_of_samples(128), nn.BatchNorm1d(4)
    forward = lambda m, b: m(b.flatten(0, 1))  # noqa: E731
    with ghost_bn(net, size=24, grouping="interleaved"), pytest.raises(ValueError, match="ghosts"):
        batch_leakage(net, x.split(16), forward=forward)
    with ghost_bn(net, size=24, grouping="contiguous"):
        found = batch_leakage(net, x.split(16), forward=forward)
    groups = torch.arange(32).repeat_interleave(4)
    assert found.icc[""] == pytest.approx(icc(leading_components(x.mean(1)), groups), abs=1e-6)


def test_batches_of_a_single_samples_rows_are_a_leak() -> None:
    """As in an R-CNN head on the regions of one image (Table 3): no other sample is there to tell them from."""
    net, x = nn.BatchNorm1d(4), rows_of_samples(64)
    found = batch_leakage(net, x.split(1), forward=lambda m, b: m(b.flatten(0, 1)))
    groups = torch.arange(64).repeat_interleave(6)
    assert found.p_value < 0.001
    assert found.icc[""] == pytest.approx(icc(leading_components(x.flatten(0, 1)), groups), abs=1e-6)


def test_count_says_what_a_sample_is() -> None:
    """Tensors whose first dimension is that of rows: sixteen rows a sample."""
    net, x = nn.BatchNorm1d(4), rows_of_samples(24, rows=16).flatten(0, 1)
    assert batch_leakage(net, x.split(32)).p_value < 0.001, "each row counts as a sample"
    with pytest.raises(ValueError, match="32 rows cannot be assigned to 2 samples"):
        batch_leakage(net, x.split(32), batch_size_fn=lambda batch: len(batch) // 16)


def spread_over_ranks() -> list[list[Tensor]]:
    """Classes spread over two ranks: rank 0 has the first half, rank 1 the second."""
    return [list(shuffled(half).split(8)) for half in sorted_by_class(8, 128).split(64)]


def on_rank() -> dict[str, Any]:
    rank, found = torch.distributed.get_rank(), {}
    for synced in (False, True):
        torch.manual_seed(0)
        net = model()
        batches = spread_over_ranks()[rank][: 8 - rank]  # a batch of rank 1 is missing
        with sync_bn(net) if synced else nullcontext():
            leakage = batch_leakage(net, batches)
        found[f"{synced=}"] = leakage.p_value, leakage.icc, leakage.noise

    def ragged(net: Any, x: Tensor) -> None:
        """Rank 1 is given rows that are not its samples, and has to run a batch once more; rank 0 is not."""
        net["samples"](x.mean(1))
        net["rows"](x.flatten(0, 1)[:-1] if rank else x.mean(1))
        net["samples"](x.flatten(0, 1) if rank else x.mean(1))

    leakage = batch_leakage(two_layers(), rows_of_samples(64).split(8), forward=ragged)
    found["ragged"] = leakage.icc, list(leakage.left_out)
    return found


@pytest.mark.ddp
def test_ranks_agree_with_each_other_and_with_one_process_on_all_batches() -> None:
    first, second = run_on_ranks(on_rank, 2)
    for synced in (False, True):
        found = first[f"{synced=}"]
        assert found == second[f"{synced=}"]
        torch.manual_seed(0)
        net, (one, other) = model(), (batches[:7] for batches in spread_over_ranks())
        together = [torch.cat(both) for both in zip(one, other, strict=True)]
        alone = batch_leakage(net, together if synced else [*one, *other])
        assert found[1] == pytest.approx(alone.icc, abs=1e-6) and found[2] == pytest.approx(alone.noise)
        assert (found[0] > 0.001) == synced, "batches of all ranks hold all classes, those of one rank a half"
    assert first["ragged"] == second["ragged"]
    assert first["ragged"][1] == ["rows"] and set(first["ragged"][0]) == {"samples"}
