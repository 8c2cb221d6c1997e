"""The one place where a layer's forward computes: its call of ``torch.nn.functional.batch_norm``.

torch's own layers and those subclasses that add something (timm's ``BatchNormAct2d`` applies an activation behind it)
all make that call. What is to compute something else takes its place; everything around it stays the layer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class replaced_batch_norm(TorchFunctionMode):
    """While active, calls of ``torch.nn.functional.batch_norm`` go to another function, with their arguments.

    Costs 11 us a forward of a torch layer and 25 us of timm's, as measured, on one slow CPU core. What the function
    itself calls is not replaced again.

    Args:
        name: Qualified name of the layer whose forward runs.
        layer: That layer.
        instead: Called with the arguments of ``torch.nn.functional.batch_norm``, as the layer gives them.

    Raises:
        TypeError: On leaving, if no such call was made: the layer computes in a way that cannot be replaced.
    """

    def __init__(self, name: str, layer: nn.Module, instead: Callable[..., Tensor]) -> None:
        super().__init__()
        self._name = name
        self._layer = layer
        self._instead = instead
        self._called = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        self._called = True
        return self._instead(*args, **(kwargs or {}))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        cast(Any, super()).__exit__(kind, error, traceback)
        if error is None and not self._called:
            raise TypeError(
                f"Layer {self._name!r}, a {type(self._layer).__name__}, does not call torch.nn.functional.batch_norm "
                "in its forward, so what it computes cannot be changed: leave it out by layers=."
            )
