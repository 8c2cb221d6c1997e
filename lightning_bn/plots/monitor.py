"""The figures of `BNStatsMonitor`, drawn from its record."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
from matplotlib.figure import Figure

from lightning_bn.plots.channels import ChannelTrace, channels_over_steps
from lightning_bn.plots.drift import drift_overview, gap_heatmap
from lightning_bn.plots.lag import lag_against_noise
from lightning_bn.tracking.record import DriftRecord


def pictures_of(record: DriftRecord) -> Mapping[str, Figure]:
    """Draws the mean gap by layer and step, the traced channels, and lag against noise; by the last part of the key."""
    assert record.last is not None
    steps, gaps, means = record.history.steps, record.history["mean_gap"].numpy(), record.last.means
    return {
        "heatmap": gap_heatmap(steps, layers=record.names, gaps=gaps, title="How far the EMA is from the batches"),
        "channels": channels_over_steps(list(_traces(record)), title="EMA and batch means"),
        "lag_noise": lag_against_noise(
            record.names, lag=means.lag.numpy(), noise=means.noise.numpy(), marked=record.last.direct, title="Why"
        ),
    }


def overview_of(record: DriftRecord) -> Figure:
    """Draws the whole run in one figure."""
    assert record.last is not None
    history = record.history
    sizes = np.array([layer.num_features for layer in record.layers.values()])
    return drift_overview(
        history.steps,
        layers=record.names,
        mean_gap=history["mean_gap"].numpy(),
        var_gap=history["var_gap"].numpy(),
        lag=history.overall("lag").numpy(),
        noise=history.overall("noise").numpy(),
        precise_gap=record.precise_gaps()[0].numpy() if record.moved else None,
        dead=np.round(record.last.dead.numpy() * sizes),
        marked=record.last.direct,
        title="EMA against batch statistics",
    )


def _traces(record: DriftRecord) -> Iterator[ChannelTrace]:
    steps, precise = record.traces.steps, record.traces.precise
    points = [point.tolist() for point in record.traces.points]
    for index, (name, channel) in enumerate(record.channels):
        batches = defaultdict(list)
        for step, (_, means) in zip(steps, points, strict=True):
            batches[step].append(means[index])
        population = {step: float(means[index]) for step, means in precise.items()}
        ema = [emas[index] for emas, _ in points]
        yield ChannelTrace(f"{name}, channel {channel}", steps, ema, batches, population)
