"""The figures of drift show every number they were given, however many layers, and whatever is missing."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_bn import plots
from lightning_bn.plots.drift import MAX_COLUMNS
from lightning_bn.plots.style import EMA, PRECISE, short_names

LONG = [f"model.backbone.encoder.stages.{i // 12}.blocks.{i % 12}.residual_branch.norm_{i % 2}" for i in range(60)]


def mesh(figure: Figure) -> QuadMesh:
    return next(c for axes in figure.axes for c in axes.collections if isinstance(c, QuadMesh))


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title("left") == title)


def cells(figure: Figure) -> np.ma.MaskedArray:
    return np.ma.asarray(mesh(figure).get_array())


def extents(figure: Figure, texts: list[Text]) -> list[Any]:
    """Where texts are drawn, without their arrows."""
    plots.to_rgb(figure)
    return [Text.get_window_extent(text, figure.canvas.get_renderer()) for text in texts]  # type: ignore[attr-defined]


def overview(steps: Any, layers: Any, gap: Any, **options: Any) -> Figure:
    options = dict.fromkeys(("lag", "noise"), np.ones(len(layers))) | options
    return plots.drift_overview(steps, layers=layers, mean_gap=gap, var_gap=gap, **options)


def test_a_heatmap_has_a_row_per_layer_from_the_input_down_and_hatches_what_was_not_measured() -> None:
    gaps = [[0.1, 0.2, np.nan], [0.3, np.inf, 0.6]]
    figure = plots.gap_heatmap([10, 20], layers=["stem", "middle", "head"], gaps=gaps)
    drawn = cells(figure)
    assert drawn.mask.tolist() == [[False, False], [False, False], [True, False]]
    assert drawn[0].tolist() == [0.1, 0.3] and drawn[2, 1] == 0.6
    assert drawn[1, 1] == mesh(figure).norm.vmax, "infinite is the darkest, not missing"
    axes = figure.axes[0]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first layer is on top"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stem", "middle", "head"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["not measured"]


def test_a_color_is_the_same_gap_in_most_heatmaps_and_the_largest_of_every_group_of_steps_is_drawn() -> None:
    for row in ([0.02, 0.3], [0.05, 0.9]):
        norm = mesh(plots.gap_heatmap([1], layers=["a", "b"], gaps=[row])).norm
        assert (norm.vmin, norm.vmax) == (0.01, 1)
    gaps = np.full((5000, 2), 0.1)
    gaps[3333, 1] = 7.0
    gaps[:, 0] = np.nan
    drawn = cells(plots.gap_heatmap(range(5000), layers=["a", "b"], gaps=gaps))
    assert drawn.shape == (2, MAX_COLUMNS) and drawn[1].max() == 7.0 and drawn.mask[0].all()


@pytest.mark.parametrize("layers", [1, 60, 200])
def test_names_beside_a_heatmap_do_not_overlap(layers: int) -> None:
    names = [f"backbone.layer{i}.bn" for i in range(layers)]
    figure = plots.gap_heatmap([1, 2], layers=names, gaps=np.ones((2, layers)))
    boxes = extents(figure, figure.axes[0].get_yticklabels())
    assert all(lower.y1 <= upper.y0 + 1.0 for upper, lower in pairwise(boxes))
    assert len(boxes) == layers if layers <= 60 else len(boxes) >= 60


def test_an_array_of_the_wrong_shape_is_an_error_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"gaps needs .*, \(2, 3\); its shape is \(3, 2\)"):
        plots.gap_heatmap([1, 2], layers=["a", "b", "c"], gaps=np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"lag .* 2 layers"):
        plots.lag_against_noise(["a", "b"], lag=[1.0], noise=[1.0, 2.0])


def test_lag_against_noise_draws_every_finite_layer_in_its_place_and_counts_the_others() -> None:
    lag, noise = [0.5, 0.02, np.nan, 0.1], [0.05, 0.2, 0.1, 0.1]
    axes = plots.lag_against_noise(["a", "b", "c", "d"], lag=lag, noise=noise, marked=["d"]).axes[0]
    points = [np.asarray(c.get_offsets()) for c in axes.collections if isinstance(c, PathCollection)]
    assert np.concatenate(points).tolist() == [[0.05, 0.5], [0.2, 0.02], [0.1, 0.1]]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["measured directly or frozen", "1 of 4 layers without a finite value"]
    stale, noisy, _ = np.concatenate([c.get_facecolor() for c in axes.collections[2:]])
    assert not np.allclose(stale, noisy), "the two sides of the diagonal differ in color"
    for none_positive in ([0.0, 0.0], [np.nan, np.nan], [np.inf, 0.1]):
        low, high = plots.lag_against_noise(["a", "b"], lag=none_positive, noise=[0.0, 0.0]).axes[0].get_xlim()
        assert 0 < low < high


def test_the_names_of_the_worst_layers_do_not_overlap() -> None:
    lag = np.full(60, 0.5) + np.linspace(0, 1e-3, 60)
    figure = plots.lag_against_noise(LONG, lag=lag, noise=np.full(60, 0.1))
    names = [text for text in figure.axes[0].texts if text.get_text() in short_names(LONG)]
    assert [text.get_text() for text in names] == short_names(LONG)[:53:-1]
    boxes = sorted(extents(figure, names), key=lambda box: box.y0)
    assert all(upper.y0 >= lower.y1 for lower, upper in pairwise(boxes))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def test_the_overview_ranks_layers_by_their_gap_over_the_run_in_the_colors_of_all_figures() -> None:
    layers = [f"bn{i}" for i in range(12)]
    mean = np.vstack([np.arange(12.0), np.arange(12.0)[::-1]])
    mean[1, 11] = np.nan  # measured once, as 11
    dead = np.zeros(12)
    dead[11] = 3
    figure = overview([1, 2], layers, mean, precise_gap=np.full(12, 2.0), dead=dead)
    worst = panel(figure, "Worst layers over the run")
    assert [label.get_text() for label in worst.get_yticklabels()][:3] == ["bn11", "bn0", "bn1"]
    ema, precise = worst.containers
    assert [bar.get_width() for bar in ema][:2] == [11, pytest.approx(11 / 2**0.5)]
    assert {bar.get_width() for bar in precise} == {2}
    assert (ema[0].get_facecolor(), precise[0].get_facecolor()) == (to_rgba(EMA), to_rgba(PRECISE))
    assert any("3 dead channels" in text.get_text() for text in worst.texts)
    over = panel(figure, "Mean gap over the layers")
    assert {str(line.get_label()): list(line.get_ydata()) for line in over.lines}["max"] == [11, 11]
    assert cells(figure)[:, 0].tolist()[1:] == list(range(1, 12)), "the variance gap, layer by layer"


@pytest.mark.parametrize(("value", "layers"), [(0.0, 1), (np.nan, 3), (np.inf, 3), (1e-30, 3), (1e30, 1)])
def test_the_overview_of_a_single_row_of_anything_can_be_drawn(value: float, layers: int) -> None:
    row, names = np.full(layers, value), [f"bn{i}" for i in range(layers)]
    figure = overview([7], names, row[None], lag=row, noise=row, precise_gap=row, dead=row)
    assert len(np.unique(plots.to_rgb(figure))) > 10


def test_aggregates_share_a_panel_by_quantity_and_worst_layer_is_not_drawn() -> None:
    names = ("mean_gap_p50", "mean_gap_max", "lag_max", "noise_max", "worst_layer", "dead_channels")
    figure = plots.aggregates_over_steps({name: ([1, 2], [0.0, 3.0]) for name in names})
    labels = {axes.get_ylabel(): [str(line.get_label()) for line in axes.lines] for axes in figure.axes}
    worst, how_many = {"worst lag and worst noise (σ)": ["lag", "noise"]}, {"how many": ["dead channels"]}
    assert labels == {"mean gap (σ)": ["p50", "max"], **worst, **how_many}
    with pytest.raises(ValueError, match=r"draws mean_gap_p50.* series has loss"):
        plots.aggregates_over_steps({"loss": ([1], [1.0])})


def test_short_names_stay_different_and_lose_only_what_all_share() -> None:
    assert short_names(["bn1", "layer1.bn"]) == ["bn1", "layer1.bn"]
    short = short_names(LONG, max_length=30)
    assert len(set(short)) == 60 and max(map(len, short)) <= 42
    assert all("model.backbone" not in name and name[-6:] == full[-6:] for name, full in zip(short, LONG, strict=True))
    assert short_names(["a" * 60]) == ["a" * 13 + "…" + "a" * 26]
