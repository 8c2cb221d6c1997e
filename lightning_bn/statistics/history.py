"""History: what was seen of each layer, and of a few channels, over a whole run, in bounded memory.

A run of any length is drawn into a picture of some hundred columns, so not more than that need be kept: when the
history is full, neighbouring rows are merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 512
"""Twice the columns that a picture shows at least."""


class History:
    """Rows of quantities of each layer, and the step of each row.

    Args:
        quantities: Their names.
        layers: Number of layers.

    Attributes:
        steps: Step of each row, ascending.
        rows_seen: Rows ever added, those merged included.

    Example:
        >>> import torch
        >>> history = History(["gap"], layers=2)
        >>> history.add(49, {"gap": torch.tensor([0.5, 0.1])})
        >>> history.steps, history["gap"]
        ([49], tensor([[0.5000, 0.1000]]))
    """

    def __init__(self, quantities: Sequence[str], layers: int) -> None:
        self.steps: list[int] = []
        self.rows_seen = 0
        self._values = {name: torch.empty(0, layers) for name in quantities}

    def __getitem__(self, quantity: str) -> Tensor:
        """All rows of a quantity, ``(rows, L)`` float32."""
        return self._values[quantity]

    def add(self, step: int, row: Mapping[str, Tensor]) -> None:
        """Add a row; into a full history, after merging every second row with the next by their root mean square."""
        if len(self.steps) == MOST_ROWS:
            self.steps = self.steps[1::2]
            self._values = {name: _merged(values) for name, values in self._values.items()}
        self.steps.append(step)
        self.rows_seen += 1
        for name, values in self._values.items():
            self._values[name] = torch.cat([values, row[name].float()[None]])

    def state_dict(self) -> dict[str, Any]:
        """Everything, in plain types and tensors."""
        return {"steps": list(self.steps), "rows_seen": self.rows_seen, "values": dict(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.steps, self.rows_seen, self._values = list(state["steps"]), state["rows_seen"], dict(state["values"])


def _merged(values: Tensor) -> Tensor:
    """Root mean square of each pair of rows; where one is NaN, the other."""
    merged: Tensor = values.unflatten(0, (-1, 2)).square().nanmean(1).sqrt()
    return merged


class Traces:
    """EMA, batch means and precise means of a few channels, batch by batch: the paper's Fig. 2.

    Attributes:
        steps: Step of each point, ascending.
        points: For each, the channels' EMA before the batch and mean of the batch, ``(2, k)``.
        precise: Step -> the channels' population means, where they were measured.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.points: list[Tensor] = []
        self.precise: dict[int, Tensor] = {}

    def add(self, step: int, point: Tensor) -> None:
        """Add a batch; a full trace first lets go of every second one."""
        if len(self.steps) == 4 * MOST_ROWS:
            self.steps, self.points = self.steps[::2], self.points[::2]
        self.steps.append(step)
        self.points.append(point)

    def state_dict(self) -> dict[str, Any]:
        """Everything, in plain types and tensors."""
        return {"steps": list(self.steps), "points": list(self.points), "precise": dict(self.precise)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.steps, self.points, self.precise = list(state["steps"]), list(state["points"]), dict(state["precise"])
