"""Behaviors change what a layer computes, and replace no module, parameter or buffer.

A layer with behaviors gets a generated subclass whose `forward` applies them, innermost first. A behavior changes
attributes of the layer only while its forward runs. So between forwards the state dict, pickles and copies are those
of the plain layer, and handles can be undone in any order.
"""

from __future__ import annotations

import copy
import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from inspect import signature
from types import TracebackType
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import _pop_mode_temporarily
from typing_extensions import Self

from lightning_bn.core.ranks import get_rank
from lightning_bn.layers.override import is_replaced

_LIST = "_behaviors"


class Behavior(ABC):
    """Wraps the forward of every BatchNorm layer that it is attached to."""

    kind = ""
    """Feature: a key of `lightning_bn.layers.conflicts.FEATURES`."""
    name: str
    """Suffix of the layer's ``repr``."""
    outermost = False
    """Wraps all other behaviors, later ones included: it chooses the layer's input."""
    innermost = False
    """All other behaviors wrap it: it gets the layer's ``batch_norm`` call before others change it."""
    not_copied = ""
    """Warning for a deep copy, which is a plain layer; empty if the copy evaluates like the original."""

    @abstractmethod
    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Compute the output for ``input`` (any type); ``forward`` is the layer's own, wrapped by inner behaviors."""

    def normalization_batch(self, samples: float) -> float:
        """Return the samples normalized together in train mode; without this behavior they are ``samples``."""
        return samples

    def domain(self, layer: _BatchNorm) -> int | None:
        """Return the domain of the layer's current input, if this behavior keeps statistics per domain."""
        return None

    def normalization_groups(self, input: Tensor) -> Tensor | None:
        """Return the normalization batch of each row of ``input``, ``(N,)``; None if there is one batch."""
        return None


class ModuleBehavior(Behavior):
    """Wraps every call of a module of any class.

    It wraps no forward, because Lightning sets the ``forward`` of a LightningModule on the instance.
    """

    @abstractmethod
    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the module's output; ``call`` is the plain call, hooks included."""

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        return self.call(layer, forward, input)


def behaviors_of(layer: nn.Module) -> tuple[Behavior, ...]:
    """Return the behaviors of a layer, innermost first."""
    return tuple(vars(layer).get(_LIST, ()))


def has_behavior(layer: nn.Module, *kinds: str) -> bool:
    """Return True if a layer has a behavior of one of these kinds."""
    return any(behavior.kind in kinds for behavior in behaviors_of(layer))


def own_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class of a layer without its behaviors."""
    return type(layer).__bases__[1] if behaviors_of(layer) else type(layer)


def attach(layer: nn.Module, behavior: Behavior) -> None:
    """Add a behavior around those that the layer or module has."""
    behaviors = behaviors_of(layer)
    if not behaviors:
        # bypasses the slow `nn.Module.__setattr__`
        object.__setattr__(layer, "__class__", _behaving_class(type(layer)))  # type: ignore[arg-type]  # is hashable
    vars(layer)[_LIST] = tuple(sorted((*behaviors, behavior), key=lambda b: b.outermost - b.innermost))


def detach(layer: nn.Module, behavior: Behavior) -> None:
    """Remove a behavior; without any left, the layer gets its own class back."""
    left = tuple(b for b in behaviors_of(layer) if b is not behavior)
    vars(layer)[_LIST] = left
    if not left:
        del vars(layer)[_LIST]
        object.__setattr__(layer, "__class__", type(layer).__bases__[1])


class Handle:
    """Detaches a behavior from its layers, by ``undo()`` or at the end of a ``with`` block.

    Args:
        layers: Layers or modules that get the behavior.
        behavior: What to attach.
        also: Functions that ``undo()`` calls, too.

    Example:
        >>> from torch import nn
        >>> from lightning_bn import freeze_bn
        >>> model = nn.Sequential(nn.BatchNorm1d(2))
        >>> with freeze_bn(model):
        ...     "frozen" in repr(model)
        True
        >>> "frozen" in repr(model)
        False
    """

    def __init__(self, layers: Iterable[nn.Module], behavior: Behavior, also: Iterable[Callable[[], Any]] = ()) -> None:
        self._undo: list[Callable[[], Any]] = list(also)
        for layer in layers:
            self._attach(layer, behavior)

    def _attach(self, layer: nn.Module, behavior: Behavior) -> None:
        attach(layer, behavior)
        self._undo.append(functools.partial(detach, layer, behavior))

    def undo(self) -> None:
        """Detach the behavior; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


class _BehavingClass(nn.Module):  # first base of a generated class; the second is the module's own class
    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), *(b.name for b in behaviors_of(self))]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: nn.Module = object.__new__(type(self).__bases__[1])
        vars(plain).update({key: value for key, value in vars(self).items() if key != _LIST})
        rebuild, *rest = cast("tuple[Any, ...]", plain.__reduce_ex__(protocol))
        # pickle accepts copyreg's __newobj__ only for the class of the pickled object
        return (object.__new__ if getattr(rebuild, "__name__", "") == "__newobj__" else rebuild, *rest)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        for warning in [b.not_copied for b in behaviors_of(self) if b.not_copied]:
            if warning not in memo and get_rank() == 0:  # once per copy of a model
                warnings.warn(warning, stacklevel=3)
            memo[warning] = warning
        own_deepcopy = getattr(super(), "__deepcopy__", None)  # as torch.fx.GraphModule has
        if own_deepcopy is not None:
            return own_deepcopy(memo)
        memo[id(self)] = twin = copy.copy(self)  # before its values are copied, because they may refer to it
        vars(twin).update(copy.deepcopy(vars(twin), memo))
        return twin


class _BehavingLayer(_BehavingClass):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_replaced():  # inside another layer (timm's SplitBatchNorm2d): this call is not the outer layer's
            with _pop_mode_temporarily():
                return self.forward(*args, **kwargs)
        layer, behaviors = cast(_BatchNorm, self), behaviors_of(self)
        forward: Callable[[Any], Any] = super().forward
        if len(args) == 1 and not kwargs:
            (input,) = args
        else:
            forward, input = _bind_rest(forward, args, kwargs)
        if len(behaviors) == 1:  # the usual case, without another frame
            return behaviors[0].forward(layer, forward, input)
        for behavior in behaviors:
            forward = functools.partial(behavior.forward, layer, forward)
        return forward(input)


class _BehavingModule(_BehavingClass):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not behaviors_of(self):  # torch.compile kept a bound call from when there were behaviors
            return type(self).__call__(self, *args, **kwargs)
        call: Callable[..., Any] = super().__call__
        for behavior in behaviors_of(self):
            call = functools.partial(cast(ModuleBehavior, behavior).call, self, call)
        return call(*args, **kwargs)


def _bind_rest(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[Any], Any], Any]:
    # the first argument is left; it may be passed by keyword, under any name
    if args:
        return lambda input: forward(input, *args[1:], **kwargs), args[0]
    name = next(iter(signature(forward).parameters))
    rest = {key: value for key, value in kwargs.items() if key != name}
    return lambda input: forward(input, **rest), kwargs[name]


@functools.cache
def _behaving_class(original: type[nn.Module]) -> type[nn.Module]:
    return type(
        original.__name__,
        (_BehavingLayer if issubclass(original, _BatchNorm) else _BehavingModule, original),
        {"__module__": original.__module__, "__doc__": original.__doc__},
    )
