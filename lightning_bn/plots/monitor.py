"""The pictures of a monitored run, made from its record."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from lightning_bn.plots.channels import ChannelTrace, channels_over_steps
from lightning_bn.plots.drift import drift_overview, gap_heatmap, lag_against_noise
from lightning_bn.tracking.record import DriftRecord


def pictures_of(record: DriftRecord) -> Mapping[str, Figure]:
    """The gap by layer and step, the traced channels, and lag against noise; by the last part of their keys."""
    assert record.last is not None
    history, last = record.history, record.last
    return {
        "heatmap": gap_heatmap(
            history.steps, record.names, history["mean_gap"].numpy(), title="How far the EMA is from the batches"
        ),
        "channels": channels_over_steps(_traces(record), title="EMA and batch means"),
        "lag_noise": lag_against_noise(
            record.names, last.means.lag.numpy(), last.means.noise.numpy(), marked=last.direct, title="Why"
        ),
    }


def overview_of(record: DriftRecord) -> Figure:
    """The whole run in one picture."""
    assert record.last is not None
    history, last = record.history, record.last
    sizes = np.array([layer.num_features for layer in record.layers.values()])
    return drift_overview(
        history.steps,
        record.names,
        history["mean_gap"].numpy(),
        history["var_gap"].numpy(),
        history.overall("lag").numpy(),
        history.overall("noise").numpy(),
        precise_gap=record.precise_gaps()[0].numpy() if record.moved else None,
        dead=np.round(last.dead.numpy() * sizes),
        marked=last.direct,
        title="EMA against batch statistics",
    )


def _traces(record: DriftRecord) -> list[ChannelTrace]:
    points = [point.tolist() for point in record.traces.points]
    batches: list[dict[int, list[float]]] = [{} for _ in record.channels]
    for step, (_, means) in zip(record.traces.steps, points, strict=True):
        for of_channel, mean in zip(batches, means, strict=True):
            of_channel.setdefault(step, []).append(mean)
    return [
        ChannelTrace(
            title=f"{name}, channel {channel}",
            steps=record.traces.steps,
            ema=[emas[index] for emas, _ in points],
            batches=batches[index],
            precise={step: float(means[index]) for step, means in record.traces.precise.items()},
        )
        for index, (name, channel) in enumerate(record.channels)
    ]
