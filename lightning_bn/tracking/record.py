"""The record of a monitored run: the rows for loggers, and the data of its figures and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.checks import check_int
from lightning_bn.core.population import LayerStatistics
from lightning_bn.tracking.drift import Observation
from lightning_bn.tracking.history import History
from lightning_bn.tracking.observer import Observer

# of the table; NBS is in samples, gaps in sigma or log ratios, dead and not finite are fractions
COLUMNS = [
    *("index", "layer", "channels", "momentum", "NBS", "batch statistics", "mean gap", "lag", "noise", "variance gap"),
    *("dead", "not finite", "EMA to precise, mean gap", "EMA to precise, variance gap"),
]


class DriftRecord:
    """Holds all observations of some layers.

    ``keys`` maps layers with keys of their own to a part of these, and ``quantities`` are logged for them. By default,
    ``channels`` are traced in the first, the middle and the last layer. ``prefix`` starts all keys.
    """

    def __init__(
        self,
        layers: Mapping[str, _BatchNorm],
        keys: Mapping[str, str],
        quantities: Sequence[str],
        channels: Mapping[str, int] | None,
        prefix: str,
    ) -> None:
        self.layers, self.names = dict(layers), list(layers)
        self.keys, self.quantities, self.prefix = dict(keys), tuple(quantities), prefix
        self.channels = _traced_channels(layers, channels)
        sizes = [layer.get_buffer("running_mean").numel() for layer in layers.values()]
        starts = dict(zip(layers, accumulate(sizes, initial=0), strict=False))
        self.observer = Observer(layers, [starts[name] + channel for name, channel in self.channels])
        self.traces = self.observer.traces
        self.history = History(("mean_gap", "var_gap", "lag", "noise"), len(layers))
        self.last: Observation | None = None
        # layer name -> sums of squared mean gap and variance gap from EMA to precise statistics, and number of passes
        self.moved: dict[str, tuple[float, float, int]] = {}
        self.nonfinite_warned = False
        self.nbs: dict[str, float] = dict.fromkeys(layers, torch.nan)  # normalization batch sizes in samples

    def take_row(self, step: int) -> dict[str, float]:
        """Return the row of the window that ends here, by full keys; the keys are always the same."""
        self.last = self.observer.take()
        of_layers = self.last.per_layer()
        self.history.add(step, of_layers)
        row = {f"{self.prefix}_agg/{name}": value for name, value in self.last.aggregates().items()}
        for quantity in self.quantities:
            values = dict(zip(self.names, of_layers[quantity].tolist(), strict=True))
            row.update({f"{self.prefix}_{quantity}/{key}": values[name] for name, key in self.keys.items()})
        return row

    def note_pass(
        self, step: int, statistics: Mapping[str, LayerStatistics], moved: Mapping[str, tuple[float, float]]
    ) -> None:
        """Add recomputed population statistics, and each layer's gaps from its EMA to them."""
        for name, (mean_gap, var_gap) in moved.items():
            if name in self.layers:
                mean_squares, var_squares, passes = self.moved.get(name, (0.0, 0.0, 0))
                self.moved[name] = mean_squares + mean_gap**2, var_squares + var_gap**2, passes + 1
        means = [float(statistics[n].mean[c]) if n in statistics else torch.nan for n, c in self.channels]
        self.traces.precise[step] = torch.tensor(means)

    def precise_gaps(self) -> Tensor:
        """Return the gaps of each layer from EMA to precise statistics, ``(2, L)``: rms over all passes."""
        sums = torch.tensor([self.moved.get(name, (0.0, 0.0, 0)) for name in self.names]).T
        return (sums[:2] / sums[2]).sqrt()

    def table(self) -> list[list[Any]]:
        """Return one row per layer, with `COLUMNS`."""
        assert self.last is not None  # drawn after the first row
        of_layers, rows = self.last.per_layer(), []
        values = [of_layers[name] for name in ("mean_gap", "lag", "noise", "var_gap", "dead", "nonfinite")]
        values += self.precise_gaps()
        for i, (name, layer) in enumerate(self.layers.items()):
            recovered = "no batch to compare" if values[0][i].isnan() else "recovered"
            source = self.last.direct.get(name, recovered)
            first = [i, name, layer.num_features, layer.momentum, self.nbs[name], source]
            rows.append([*first, *(float(value[i]) for value in values)])
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {
            "layers": {name: layer.num_features for name, layer in self.layers.items()},
            "channels": [list(channel) for channel in self.channels],
            "nonfinite_warned": self.nonfinite_warned,
            "observer": self.observer.state_dict(),
            "history": self.history.state_dict(),
            "traces": self.traces.state_dict(),
            "moved": dict(self.moved),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; drop traces of other channels."""
        if state["layers"] != {name: layer.num_features for name, layer in self.layers.items()}:
            raise ValueError("The checkpoint's record is one of other layers.")
        self.nonfinite_warned = state["nonfinite_warned"]
        self.observer.load_state_dict(state["observer"])
        self.history.load_state_dict(state["history"])
        if state["channels"] == [list(channel) for channel in self.channels]:
            self.traces.load_state_dict(state["traces"])
        self.moved = dict(state["moved"])


def check_channels(channels: Any) -> None:
    """Raise TypeError or ValueError for ``trace_channels`` that are wrong for any model."""
    if channels is not None and not isinstance(channels, Mapping):
        raise TypeError(f"trace_channels must map layer names to channels, or be None, but is {channels!r}.")
    if channels is not None and not channels:
        raise ValueError("trace_channels is empty: name at least one layer, or use None.")
    for name, channel in (channels or {}).items():
        check_int(f"trace_channels: the channel of layer {name!r}", channel, at_least=0)


def _traced_channels(layers: Mapping[str, _BatchNorm], channels: Mapping[str, int] | None) -> list[tuple[str, int]]:
    names = list(layers)
    if channels is None:
        return [(name, 0) for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1]))]
    for name, channel in channels.items():
        if name not in layers:
            raise ValueError(f"trace_channels: there is no observed layer {name!r}. There are: {', '.join(names)}.")
        last = layers[name].num_features - 1
        if channel > last:
            raise ValueError(f"trace_channels: layer {name!r} has channels 0 to {last}, and no {channel}.")
    return list(channels.items())
