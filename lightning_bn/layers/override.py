"""Replacement of a layer's ``batch_norm`` call.

The call's input is what the layer normalizes: a subclass may reshape or mask its own input first, and apply an
activation afterwards (timm's `BatchNormAct2d`). The rest of the layer's forward is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


class BatchNormCall(NamedTuple):
    """Holds the arguments of a ``batch_norm`` call."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    def run(self) -> Tensor:
        return F.batch_norm(*self)

    @property
    def values(self) -> int:
        """Return the values per channel in the input."""
        return self.input.numel() // max(self.input.shape[1], 1)

    def normalize_with(self, mean: Tensor, var: Tensor) -> Tensor:
        """Normalize the input with a mean and a biased variance; nothing is stored."""
        x, weight, bias = self.input, self.weight, self.bias
        if weight is None or weight.element_size() > 2:
            dtype = torch.promote_types(x.dtype, torch.float32) if weight is None else weight.dtype
            return F.batch_norm(x, mean.to(dtype), var.to(dtype), weight, bias, False, 0.0, self.eps)
        # with 16-bit parameters the kernel would round the statistics to 16 bits first
        weight, bias = (p if p is None else p.to(mean.dtype) for p in (weight, bias))
        return F.batch_norm(x.to(mean.dtype), mean, var, weight, bias, False, 0.0, self.eps).to(x.dtype)

    def normalize_by_itself(self) -> Tensor:
        """Normalize the input with its own statistics; nothing is stored."""
        return F.batch_norm(self.input, None, None, self.weight, self.bias, True, 0.0, self.eps)


PLAIN: frozenset[type[nn.Module]] = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})
"""Classes whose forward is nothing but a ``batch_norm`` call on the layer's input."""

OF_TORCH: frozenset[type[nn.Module]] = PLAIN | {nn.SyncBatchNorm}
"""Classes that update their running statistics and batch counter as torch does."""


def tracks(layer: _BatchNorm, call: BatchNormCall) -> bool:
    """Return True if this call would update the layer's running statistics in training.

    Steps switch tracking off by flag, by momentum, or by ``eval()``. A subclass that updates its running statistics
    itself passes none to the call.
    """
    own = vars(layer)
    return bool(
        call.training
        and own["training"]
        and own["track_running_stats"]
        and own["momentum"] != 0
        and (call.momentum != 0 or call.running_mean is None)
    )


def plain_call(layer: _BatchNorm, input: Tensor) -> BatchNormCall:
    """Return the call that the forward of a `PLAIN` class makes; its batch counter is not touched."""
    own, buffers, parameters = vars(layer), layer._buffers, layer._parameters
    mean, var = buffers["running_mean"], buffers["running_var"]
    training = own["training"]
    momentum = own["momentum"]
    if momentum is None:  # the plain average of all batches; without a counter torch updates nothing
        momentum = 0.0 if buffers["num_batches_tracked"] is None else 1.0
    if training and not own["track_running_stats"]:
        mean = var = None
    uses_batch = training or (mean is None and var is None)
    return BatchNormCall(input, mean, var, parameters["weight"], parameters["bias"], uses_batch, momentum, own["eps"])


def replace_batch_norm(
    replacement: Callable[[BatchNormCall], Tensor],
    layer: str,
    forward: Callable[[Any], Any],
    input: Any,
    required: bool = True,
) -> Any:
    """Run a layer's own forward, with another function instead of its ``batch_norm`` call.

    If ``required``, raise a TypeError if there is no such call. Calls within ``replacement`` are not replaced.

    Example:
        >>> import torch
        >>> replace_batch_norm(lambda call: call.input + 1, "bn", torch.nn.BatchNorm1d(1), torch.zeros(2, 1))
        tensor([[1.],
                [1.]])
    """
    calls = []

    def instead(call: BatchNormCall) -> Tensor:
        calls.append(True)
        return replacement(call)

    with _BatchNormOverride(instead):
        output = forward(input)
    if required and not calls:
        raise_not_visible(layer)
    return output


def is_replaced() -> bool:
    """Return True inside the forward of a layer whose ``batch_norm`` call is replaced."""
    depth = torch._C._len_torch_function_stack()
    return depth > 0 and isinstance(torch._C._get_function_stack_at(depth - 1), _BatchNormOverride)


def raise_not_visible(layer: str) -> NoReturn:
    """Raise for a layer that normalizes without a ``batch_norm`` call."""
    raise TypeError(
        f"The forward of layer {layer!r} does not call torch.nn.functional.batch_norm, so its normalization cannot be "
        "measured or changed. Leave it out by layers=, or have it call torch.nn.functional.batch_norm."
    )


class _BatchNormOverride(TorchFunctionMode):  # without state, so that torch.compile traces through it
    def __init__(self, replacement: Callable[[BatchNormCall], Tensor]) -> None:
        super().__init__()
        self._replacement = replacement

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            return self._replacement(BatchNormCall(*args, **(kwargs or {})))
        if func is torch.batch_norm:
            return self._replacement(_of_torch(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _of_torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> BatchNormCall:
    return BatchNormCall(input, running_mean, running_var, weight, bias, training, momentum, eps)
