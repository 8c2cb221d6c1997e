"""`batch_leakage` sees what each layer normalizes together in training, on the model with population statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import batch_leakage, find_bn, freeze_bn, ghost_bn, sync_bn
from lightning_bn.functional.leakage import measure_leakage
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


def test_the_correlation_is_that_of_the_inputs_means() -> None:
    net, images = model().eval(), shuffled(classes(4, 96))
    groups = torch.arange(12).repeat_interleave(8)
    with torch.no_grad():
        inputs = {"1": net[0](images), "5": net[:5](images)}
    found = batch_leakage(net, images.split(8)).icc
    for name, x in inputs.items():
        assert found[name] == pytest.approx(icc(leading_components(x.mean((2, 3))), groups), abs=1e-4)


def test_the_model_is_as_before_and_its_mode_too() -> None:
    net = model()
    before, random = digest(net.state_dict()), digest(torch.get_rng_state())
    batch_leakage(net, classes(4, 64).split(8))
    assert (digest(net.state_dict()), digest(torch.get_rng_state())) == (before, random)
    assert all(m.training and not behaviors_of(m) for m in net.modules())


def test_interleaved_ghosts_break_neighbors_up_and_contiguous_ones_keep_them() -> None:
    """Batches c0, c0, c1, c1, ... as in Fig. 8; a ghost of 2 holds two of one class, or of two."""
    generator = torch.Generator().manual_seed(1)
    means = 2 * torch.randn(64, 3, 1, 1, generator=generator)
    pairs = torch.stack([torch.randperm(64, generator=generator)[:16].repeat_interleave(2) for _ in range(16)])
    images = means[pairs.flatten()] + torch.randn(512, 3, 8, 8, generator=generator)
    found = {}
    for grouping in ("interleaved", "contiguous"):
        net = model()
        with ghost_bn(net, size=2, grouping=grouping):
            found[grouping] = batch_leakage(net, images.split(32), layers="1")
    assert found["contiguous"].icc["1"] > 0.3 and found["contiguous"].p_value < 0.001
    assert abs(found["interleaved"].icc["1"]) < 3 * found["interleaved"].noise["1"]


@pytest.mark.parametrize(("grouping", "rows"), [("interleaved", 13), ("contiguous", 13), ("contiguous", 3)])
def test_the_groups_of_ghosts_are_those_that_are_normalized_together(grouping: Any, rows: int) -> None:
    """Oracle: rows of one ghost, and no others, share a mean of zero in the output."""
    layer = nn.BatchNorm1d(1, affine=False)
    x = torch.randn(rows, 1).exp()
    with ghost_bn(layer, size=4, grouping=grouping):
        (behavior,) = behaviors_of(layer)
        groups, y = behavior.normalization_groups(x), layer(x)
    assert groups is not None
    for group in groups.unique():
        assert y[groups == group].mean().abs() < 1e-5


def test_frozen_layers_are_left_out_and_nothing_else_than_those_is_refused() -> None:
    net = model()
    with freeze_bn(net, layers="1"):
        assert list(batch_leakage(net, classes(4, 64).split(8)).icc) == ["5"]
    with freeze_bn(net), pytest.raises(ValueError, match="nothing leaks"):
        batch_leakage(net, classes(4, 64).split(8))


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
        self.apart(x[:, :1]), self.apart(x[:, :1] + 5)
        self.other(x)


def test_calls_of_a_layer_are_not_compared_with_each_other() -> None:
    """That they differ is a matter of domains (Sec. 5), not of leakage."""
    found = batch_leakage(Twice(), torch.randn(256, 2).split(16), layers="apart")
    assert found.p_value > 0.01 and list(found.icc) == ["apart"]


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_calls_the_most_extreme_is_reported(first: int) -> None:
    """One is balanced, the other random."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_that_depends_on_a_rows_place_in_the_batch_is_no_leak(dtype: torch.dtype) -> None:
    """Sums of equal rows are added up in another order at the end of a batch than at its beginning."""

    class Place(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + torch.finfo(x.dtype).eps * (torch.arange(len(x)) % 4 == 0).to(x)[:, None])

    net = nn.Sequential(Place(), nn.BatchNorm1d(4)).to(dtype)
    with pytest.raises(ValueError, match="differ by more than rounding"):
        batch_leakage(net, [torch.ones(16, 4, dtype=dtype)] * 32)
    with pytest.raises(ValueError, match="one of them of two rows or more"):
        batch_leakage(net, torch.randn(32, 4).to(dtype).split(1))


def test_dead_and_non_finite_channels_and_layers_without_rows_are_left_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.some, self.nothing = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> None:
            self.some(x), self.nothing(x[:0])

    x = torch.randn(64, 1)
    rows = torch.cat([x, torch.full_like(x, torch.nan), torch.ones_like(x)], 1)
    found = batch_leakage(Model(), rows.split(8))
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


# ------------------------------------------------------------------------------------ a sample is several rows
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
    """A shuffled loader does not alarm, a sorted one does, and the correlation is that of the samples' means."""
    net, x = nn.Sequential(nn.BatchNorm1d(4)), rows_of_samples(384)
    found = batch_leakage(net, x.split(16), forward=lambda m, b: m(layout(b)))
    groups = torch.arange(24).repeat_interleave(16)
    assert found.p_value > 0.01 and not found.left_out
    assert found.icc["0"] == pytest.approx(icc(leading_components(x.mean(1)), groups), abs=1e-6)
    ordered = x[x.mean((1, 2)).argsort()].split(16)
    assert batch_leakage(net, ordered, forward=lambda m, b: m(layout(b))).p_value < 0.001


@pytest.mark.parametrize("layout", list(LAYOUTS.values())[:2], ids=list(LAYOUTS)[:2])
def test_batches_of_other_sizes_and_sequences_of_other_lengths_are_samples_too(layout: Any) -> None:
    net, x = nn.BatchNorm1d(4), rows_of_samples(193)
    batches = [batch[:, : 3 + i % 3] for i, batch in enumerate(x.split(16))]  # the last batch is a single sample
    found = batch_leakage(net, batches, forward=lambda m, b: m(layout(b)))
    means = torch.cat([batch.mean(1) for batch in batches])
    assert found.icc[""] == pytest.approx(icc(leading_components(means), torch.arange(193) // 16), abs=1e-6)


class TwoLayers(nn.Module):
    """One layer on samples, and one on rows of them."""

    def __init__(self) -> None:
        super().__init__()
        self.samples, self.rows = nn.BatchNorm1d(4), nn.BatchNorm1d(4)


UNTOLD: dict[str, Any] = {
    "graphs of other numbers of nodes": lambda x: torch.cat([g[: 1 + i % 5] for i, g in enumerate(x)]),
    "fewer rows than samples": lambda x: x[:-3, 0],
    "rows that the batch does not show": lambda x: torch.randn(2 * len(x), 4),
    "rows that are ever the same": lambda x: torch.linspace(0, 1, 8 * len(x)).view(-1, 4),
}


@pytest.mark.parametrize("rows", UNTOLD.values(), ids=UNTOLD)
def test_a_layer_whose_rows_cannot_be_told_apart_by_sample_is_left_out_and_named(rows: Any) -> None:
    def forward(model: TwoLayers, x: Tensor) -> None:
        model.samples(x.mean(1)), model.rows(rows(x))

    batches = rows_of_samples(128).split(16)
    found = batch_leakage(TwoLayers(), batches, forward=forward)
    assert set(found.icc) == {"samples"} and set(found.left_out) == {"rows"}
    with pytest.raises(ValueError, match=r"Layer 'rows' is left out: .* pass batch_size_fn="):
        batch_leakage(TwoLayers(), batches, forward=forward, layers="rows")


def test_ghosts_that_cut_through_samples_are_left_out_and_others_are_not() -> None:
    x = rows_of_samples(128)
    net = TwoLayers()

    def forward(model: TwoLayers, x: Tensor) -> None:
        model.samples(x.mean(1)), model.rows(x.flatten(0, 1))

    with ghost_bn(net, size=24, grouping="interleaved", layers="rows"):
        assert "ghosts" in batch_leakage(net, x.split(16), forward=forward).left_out["rows"]
    with ghost_bn(net, size=24, grouping="contiguous", layers="rows"):
        found = batch_leakage(net, x.split(16), forward=forward)
    groups = torch.arange(32).repeat_interleave(4)
    assert found.icc["rows"] == pytest.approx(icc(leading_components(x.mean(1)), groups), abs=1e-6)


def test_batches_of_a_single_samples_rows_are_a_leak() -> None:
    """As in an R-CNN head on the regions of one image (Table 3): no other sample is there to tell them from."""
    net, x = nn.BatchNorm1d(4), rows_of_samples(64)
    found = batch_leakage(net, x.split(1), forward=lambda m, b: m(b.flatten(0, 1)))
    groups = torch.arange(64).repeat_interleave(6)
    assert found.p_value < 0.001
    assert found.icc[""] == pytest.approx(icc(leading_components(x.flatten(0, 1)), groups), abs=1e-6)


def test_count_says_what_a_sample_is() -> None:
    """Tensors whose first dimension is that of rows: sixteen rows a sample."""
    net, x = nn.BatchNorm1d(4), rows_of_samples(48, rows=16).flatten(0, 1)
    assert batch_leakage(net, x.split(32)).p_value < 0.001, "each row counts as a sample"
    with pytest.raises(ValueError, match="32 rows cannot be assigned to 2 samples"):
        batch_leakage(net, x.split(32), batch_size_fn=lambda batch: len(batch) // 16)


def test_only_one_batch_is_run_once_more_and_none_if_rows_are_samples() -> None:
    runs = {}
    for name, forward in (("rows", lambda m, x: m(x.flatten(0, 1))), ("samples", lambda m, x: m(x.mean(1)))):
        runs[name] = 0

        def counted(model: nn.Module, x: Tensor, name: str = name, forward: Any = forward) -> None:
            runs[name] += 1
            forward(model, x)

        batch_leakage(nn.BatchNorm1d(4), rows_of_samples(128).split(16), forward=counted)
    assert runs == {"rows": 9, "samples": 8}


# ------------------------------------------------------------------------------------------------------------ ranks
def on_rank(synced: bool) -> tuple[float, dict[str, float], dict[str, float]]:
    """Classes spread over ranks: rank 0 has the first half, rank 1 the second; two samples on rank 1 are missing."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    net = model()
    halves = sorted_by_class(8, 128).split(64)
    images = shuffled(halves[rank])
    batches = [*images.split(8)[: 8 - rank]]
    if synced:
        with sync_bn(net):
            found = batch_leakage(net, batches)
    else:
        found = batch_leakage(net, batches)
    return found.p_value, found.icc, found.noise


@pytest.mark.ddp
@pytest.mark.parametrize("synced", [False, True])
def test_ranks_agree_with_each_other_and_with_one_process_on_all_batches(synced: bool) -> None:
    first, second = run_on_ranks(on_rank, 2, synced)
    assert first == second
    torch.manual_seed(0)
    net = model()
    of_rank = [shuffled(half).split(8)[:7] for half in sorted_by_class(8, 128).split(64)]
    batches = [torch.cat(b) for b in zip(*of_rank, strict=True)] if synced else [*of_rank[0], *of_rank[1]]
    alone = batch_leakage(net, batches)
    assert first[1] == pytest.approx(alone.icc, abs=1e-6) and first[2] == pytest.approx(alone.noise)
    assert (first[0] > 0.001) == synced, "batches of all ranks hold all classes, those of one rank a half"


def test_all_layers_are_measured_on_one_run_of_each_batch_without_gradients() -> None:
    net = model().eval()
    shown: list[tuple[int, bool]] = []

    def run(batch: Tensor) -> None:
        shown.append((len(batch), net(batch).requires_grad))

    measure_leakage(find_bn(net), classes(4, 64).split(8), run, len)
    assert shown == [(8, False)] * 8


def raising_on_rank(where: str) -> str:
    """Rank 1 meets an error at its third batch: in the batches, in counting, or in the model."""
    third = 2 if torch.distributed.get_rank() == 1 else -1

    def batches() -> Any:
        for i in range(6):
            if where == "batches" and i == third:
                raise OSError("no such file")
            yield i, torch.randn(8, 3, 8, 8)

    def count(batch: Any) -> int:
        return len(batch[1])

    def forward(net: nn.Module, batch: Any) -> None:
        if where == "model" and batch[0] == third:
            raise OSError("no such file")
        net(batch[1])

    try:
        batch_leakage(model(), batches(), forward=forward, batch_size_fn=count)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.ddp
@pytest.mark.parametrize("where", ["batches", "model"])
def test_an_error_on_one_rank_is_one_on_all_and_leaves_none_waiting(where: str) -> None:
    first, second = run_on_ranks(raising_on_rank, 2, where, timeout=60)
    assert second == "OSError: no such file"
    assert first == "AnotherRankFailedError: Another rank failed in the pass; its error says why."


def ragged_on_rank() -> tuple[dict[str, float], list[str]]:
    """Rank 1 is given rows that are not its samples, and has to run a batch once more; rank 0 is not."""
    net, second = TwoLayers(), torch.distributed.get_rank() == 1

    def forward(net: TwoLayers, x: Tensor) -> None:
        net.samples(x.mean(1))
        net.rows(x.flatten(0, 1)[:-1] if second else x.mean(1))
        net.samples(x.flatten(0, 1) if second else x.mean(1))

    found = batch_leakage(net, rows_of_samples(64).split(8), forward=forward)
    return found.icc, list(found.left_out)


@pytest.mark.ddp
def test_ranks_agree_on_what_is_left_out() -> None:
    first, second = run_on_ranks(ragged_on_rank, 2)
    assert first == second and first[1] == ["rows"] and set(first[0]) == {"samples"}
