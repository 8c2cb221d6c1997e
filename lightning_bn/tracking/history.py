"""History of a run in bounded memory: values of each layer by row, and a few channels by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_ROWS = 512  # twice the columns of a figure


class History:
    """Holds root mean squares of quantities of each layer by row; a full one merges neighboring rows."""

    def __init__(self, quantities: Sequence[str], layers: int) -> None:
        self.steps: list[int] = []  # the last step of each row
        self.rows_seen = 0
        self._stride, self._in_last = 1, 1
        # quantity -> for each row, the sum of squares and the number of rows in which a layer was measured
        self._sums = {name: torch.empty(0, 2, layers) for name in quantities}

    def __getitem__(self, quantity: str) -> Tensor:
        """Return all rows of a quantity, ``(rows, L)``; NaN where a layer was not measured."""
        squares, numbers = self._sums[quantity].unbind(1)
        return (squares / numbers).sqrt()

    def overall(self, quantity: str) -> Tensor:
        """Return the root mean square over all rows ever added, ``(L,)``."""
        squares, numbers = self._sums[quantity].sum(0).unbind()
        return (squares / numbers).sqrt()

    def add(self, step: int, row: Mapping[str, Tensor]) -> None:
        """Add a row; NaN values are ignored."""
        self.rows_seen += 1
        is_new = not self.steps or self._in_last == self._stride
        if is_new and len(self.steps) == MAX_ROWS:
            self.steps, self._stride = self.steps[1::2], 2 * self._stride
            self._sums = {name: sums.unflatten(0, (-1, 2)).sum(1) for name, sums in self._sums.items()}
        self._in_last = 1 if is_new else self._in_last + 1
        self.steps = [*self.steps, step] if is_new else [*self.steps[:-1], step]
        for name, sums in self._sums.items():
            measured = ~row[name].isnan()
            added = torch.stack([row[name].nan_to_num(0.0).square(), measured]).float()
            self._sums[name] = torch.cat([sums, added[None]]) if is_new else torch.cat([sums[:-1], sums[-1:] + added])

    def state_dict(self) -> dict[str, Any]:
        position = {"steps": list(self.steps), "rows_seen": self.rows_seen}
        return {**position, "stride": self._stride, "in_last": self._in_last, "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.rows_seen, self._sums = list(state["steps"]), state["rows_seen"], dict(state["sums"])
        self._stride, self._in_last = state["stride"], state["in_last"]


class Traces:
    """Holds EMA and batch means of a few channels by batch, and precise means: the paper's Fig. 2."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.points: list[Tensor] = []  # EMA before each batch and mean of the batch, (2, k)
        self.precise: dict[int, Tensor] = {}  # step -> population means
        self._stride, self._seen = 1, 0

    def add(self, step: int, point: Tensor) -> None:
        """Add a batch; of a long run every n-th batch is kept."""
        if self._seen % self._stride == 0:
            if len(self.steps) == 4 * MAX_ROWS:
                self.steps, self.points, self._stride = self.steps[::2], self.points[::2], 2 * self._stride
            self.steps.append(step)
            self.points.append(point)
        self._seen += 1

    def state_dict(self) -> dict[str, Any]:
        points = torch.stack(self.points) if self.points else torch.empty(0)
        position = {"steps": list(self.steps), "stride": self._stride, "seen": self._seen}
        return {**position, "points": points, "precise": dict(self.precise)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.points, self.precise = list(state["steps"]), list(state["points"]), dict(state["precise"])
        self._stride, self._seen = state["stride"], state["seen"]
