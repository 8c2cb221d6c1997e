"""The one ``batch_norm`` call inside a layer's forward, replaced.

What changes the computation, and not only which statistics it uses, enters here: before the call a subclass may count
batches, behind it timm's `BatchNormAct2d` applies its activation, and all of that stays the layer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def with_batch_norm(
    replacement: Callable[..., Tensor], layer: str, forward: Callable[[Tensor], Tensor], input: Tensor
) -> Tensor:
    """Run a layer's own forward, with another function in the place of ``torch.nn.functional.batch_norm``.

    Args:
        replacement: Takes the arguments of ``batch_norm``. What it calls itself is not replaced.
        layer: Qualified name, for the error.
        forward: The layer's own forward.
        input: Its input.

    Raises:
        TypeError: If ``forward`` did not call ``batch_norm``.

    Example:
        >>> import torch
        >>> with_batch_norm(lambda input, *args, **kwargs: input + 1, "bn", torch.nn.BatchNorm1d(1), torch.zeros(2, 1))
        tensor([[1.],
                [1.]])
    """
    calls = []

    def instead(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(True)
        return replacement(*args, **kwargs)

    with _Instead(instead):
        output = forward(input)
    if not calls:
        raise TypeError(
            f"The forward of layer {layer!r} does not call torch.nn.functional.batch_norm, so lightning_bn cannot "
            "change how it normalises. Leave it out by layers=."
        )
    return output


class _Instead(TorchFunctionMode):
    """While active, ``batch_norm`` is another function. It keeps no state, so that torch.compile traces through it."""

    def __init__(self, replacement: Callable[..., Tensor]) -> None:
        super().__init__()
        self._replacement = replacement

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (self._replacement if func is F.batch_norm else func)(*args, **(kwargs or {}))
