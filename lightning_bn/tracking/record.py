"""The record of a monitored run: rows for loggers, and all that its pictures and its table are made from.

An `Observer` sees batches; the record turns its windows into rows and remembers them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.checks import check_int
from lightning_bn.core.population import LayerStatistics
from lightning_bn.tracking.drift import Observation
from lightning_bn.tracking.history import History, Traces
from lightning_bn.tracking.observer import Observer

COLUMNS = [
    *("index", "layer", "channels", "momentum", "NBS", "batch statistics", "mean gap", "lag", "noise", "variance gap"),
    *("dead", "not finite", "EMA to precise, mean gap", "EMA to precise, variance gap"),
]
"""Of the table: NBS in samples, gaps in sigma or log ratios, dead and not finite as fractions of the channels."""


class DriftRecord:
    """What has been seen of layers so far.

    Args:
        layers: Qualified name -> layer.
        keys: Layer name -> its part of metric keys, for those that get keys of their own.
        quantities: What is logged of these.
        channels: Layer name -> channel to trace; None for the first of the first, the middle and the last layer.
        prefix: Start of all keys.

    Attributes:
        layers: The layers by name.
        names: Their names.
        observer: Sees the batches.
        history: Gaps of every row.
        traces: The traced channels.
        last: The last row's observation.
        moved: Layer name -> squares of the mean gap and variance gap from its EMA to its precise statistics, added up
            over passes, and the number of passes.
        nonfinite_said: Whether anybody has been told of non-finite statistics.
        nbs: Layer name -> its normalization batch size, in samples; NaN where nobody has said.

    Raises:
        ValueError: If there is no such channel.
    """

    def __init__(
        self,
        layers: Mapping[str, _BatchNorm],
        keys: Mapping[str, str],
        quantities: Sequence[str],
        channels: Mapping[str, int] | None,
        prefix: str,
    ) -> None:
        self.names = list(layers)
        self.keys = dict(keys)
        self.quantities = tuple(quantities)
        self.prefix = prefix
        self.layers = dict(layers)
        self.channels = _checked(layers, channels)
        starts = dict(
            zip(layers, _cumulative(layer.get_buffer("running_mean").numel() for layer in layers.values()), strict=True)
        )
        self.observer = Observer(layers, [starts[name] + channel for name, channel in self.channels])
        self.history = History(("mean_gap", "var_gap", "lag", "noise"), len(layers))
        self.traces = Traces()
        self.last: Observation | None = None
        self.moved: dict[str, tuple[float, float, int]] = {}
        self.nonfinite_said = False
        self.nbs: dict[str, float] = dict.fromkeys(layers, torch.nan)

    def after_batch(self, step: int) -> None:
        """Call after every batch; those that were not observed count for nothing."""
        if self.observer.after_batch():
            self.traces.add(step, self.observer.traced)

    def take_row(self, step: int) -> dict[str, float]:
        """The row of the window that ends here, by full keys; always the same keys."""
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
        """Note that population statistics were recomputed, and by how much they moved."""
        for name, (mean_gap, var_gap) in moved.items():
            if name in self.layers:
                mean_squares, var_squares, passes = self.moved.get(name, (0.0, 0.0, 0))
                self.moved[name] = mean_squares + mean_gap**2, var_squares + var_gap**2, passes + 1
        means = [float(statistics[n].mean[c]) if n in statistics else torch.nan for n, c in self.channels]
        self.traces.precise[step] = torch.tensor(means)

    def precise_gaps(self) -> Tensor:
        """Mean gap and variance gap of each layer from EMA to precise statistics, ``(2, L)``: rms over all passes."""
        mean_squares, var_squares, passes = torch.tensor([self.moved.get(n, (0.0, 0.0, 0)) for n in self.names]).T
        gaps: Tensor = (torch.stack([mean_squares, var_squares]) / passes).sqrt()
        return gaps

    def table(self) -> list[list[Any]]:
        """A row a layer; see `COLUMNS`."""
        assert self.last is not None  # drawn after the first row
        of_layers = {quantity: values.tolist() for quantity, values in self.last.per_layer().items()}
        rows, precise = [], self.precise_gaps()
        for i, (name, layer) in enumerate(self.layers.items()):
            measured = [of_layers[q][i] for q in ("mean_gap", "lag", "noise", "var_gap", "dead", "nonfinite")]
            uncalled = of_layers["mean_gap"][i] != of_layers["mean_gap"][i]  # NaN
            source = self.last.direct.get(name, "no batch to compare" if uncalled else "recovered")
            first = [i, name, layer.num_features, layer.momentum, self.nbs[name], source]
            rows.append([*first, *measured, *precise[:, i].tolist()])
        return rows

    def state_dict(self) -> dict[str, Any]:
        """All of it but the last row, in plain types and tensors."""
        return {
            "layers": {name: layer.num_features for name, layer in self.layers.items()},
            "channels": [list(channel) for channel in self.channels],
            "nonfinite_said": self.nonfinite_said,
            "observer": self.observer.state_dict(),
            "history": self.history.state_dict(),
            "traces": self.traces.state_dict(),
            "moved": dict(self.moved),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back, but for traces of other channels.

        Raises:
            ValueError: If it is a record of other layers; nothing is then taken.
        """
        if state["layers"] != {name: layer.num_features for name, layer in self.layers.items()}:
            raise ValueError("The checkpoint's record is one of other layers.")
        self.nonfinite_said = state["nonfinite_said"]
        self.observer.load_state_dict(state["observer"])
        self.history.load_state_dict(state["history"])
        if state["channels"] == [list(channel) for channel in self.channels]:
            self.traces.load_state_dict(state["traces"])
        self.moved = dict(state["moved"])


def check_channels(channels: Any) -> None:
    """Refuse what no model can have: channels to trace that are no mapping from layer name to number.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is empty, or a channel is negative.
    """
    if channels is None:
        return
    if not isinstance(channels, Mapping):
        raise TypeError(f"trace_channels must map layer names to channels, or be None, but is {channels!r}.")
    if not channels:
        raise ValueError("trace_channels is empty: name at least one, or leave it None.")
    for name, channel in channels.items():
        check_int(f"trace_channels: that of layer {name!r}", channel, at_least=0)


def _checked(layers: Mapping[str, _BatchNorm], channels: Mapping[str, int] | None) -> list[tuple[str, int]]:
    names = list(layers)
    if channels is None:
        return [(name, 0) for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1]))]
    for name, channel in channels.items():
        if name not in layers:
            raise ValueError(f"trace_channels: there is no observed layer {name!r}. There are: {', '.join(names)}.")
        if channel >= layers[name].num_features:
            raise ValueError(
                f"trace_channels: layer {name!r} has channels 0 to {layers[name].num_features - 1}, and no {channel}."
            )
    return list(channels.items())


def _cumulative(sizes: Iterable[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts[:-1]
