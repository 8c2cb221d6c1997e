"""Behaviors: a layer does something else for a while, and stays the object it is.

No module, parameter or buffer is replaced. A layer's class becomes one derived from its own, whose forward asks the
layer's behaviors, innermost first; each may lend the layer other values *while its own forward runs* and no longer. So
between forwards nothing of ours can be seen in the layer: `train()` and `eval()` mean what they always did, the state
dict is the plain model's, a pickle or a deep copy holds the plain layer, and handles can be undone in any order.

A module that is no BatchNorm layer can be given a behavior as well, a `ModuleBehavior`: it wraps the whole call.
"""

from __future__ import annotations

import copy
import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
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
    """What a layer does differently: wraps the forward of every layer it is given to."""

    name: str
    """Shown in ``repr(model)`` behind the layer's own description."""
    outermost = False
    """Whether it wraps all others, those that are given later among them: it says what a layer is shown."""
    innermost = False
    """Whether all others wrap it: it sees the ``batch_norm`` call as the layer makes it, before others change it."""
    not_copied = ""
    """What to say of a deep copy, which is plain, if that evaluates otherwise than the layer does with this."""

    @abstractmethod
    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """Run the layer's own ``forward`` on its first argument, under whatever this behavior changes.

        A subclass of a BatchNorm layer may take and return something else than a tensor.
        """

    def normalization_batch(self, samples: float) -> float:
        """Samples that a layer in train mode normalizes together with this, where without it it would ``samples``."""
        return samples

    def domain(self, layer: _BatchNorm) -> int | None:
        """Which of several domains the layer is shown, if this behavior tells domains apart."""
        return None

    def normalization_groups(self, input: Tensor) -> Tensor | None:
        """Which rows of ``input`` a layer in train mode normalizes together: numbers ``(N,)``; None for all of them."""
        return None


class ModuleBehavior(Behavior):
    """What a module of any class does differently: wraps every call of it; of a BatchNorm layer, its forward.

    It is the call, hooks included, because Lightning sets the ``forward`` of a LightningModule on the instance, where
    a class has no say.
    """

    @abstractmethod
    def call(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do what ``call`` does to the arguments, under whatever this behavior changes."""

    def forward(self, layer: _BatchNorm, forward: Callable[[Any], Any], input: Any) -> Any:
        """The same of a BatchNorm layer."""
        return self.call(layer, forward, input)


def behaviors_of(layer: nn.Module) -> tuple[Behavior, ...]:
    """The behaviors a layer has at the moment, in the order in which it was given them, the outermost ones last."""
    return tuple(vars(layer).get(_LIST, ()))


def has_behavior(layer: nn.Module, *kinds: type[Behavior]) -> bool:
    """Whether a layer has a behavior of one of these kinds at the moment, wherever in its list."""
    return any(isinstance(behavior, kinds) for behavior in behaviors_of(layer))


def own_class(layer: nn.Module) -> type[nn.Module]:
    """The class that a layer has without behaviors."""
    return type(layer).__bases__[1] if behaviors_of(layer) else type(layer)


def attach(layer: nn.Module, behavior: Behavior) -> None:
    """Give a layer (or another module) a behavior, on top of those it has."""
    if not behaviors_of(layer):
        layer.__class__ = _behaving_class(type(layer))  # type: ignore[arg-type]  # mypy: a Module is not Hashable
    vars(layer)[_LIST] = tuple(sorted((*behaviors_of(layer), behavior), key=lambda b: b.outermost - b.innermost))


def detach(layer: nn.Module, behavior: Behavior) -> None:
    """Take a behavior back; without any left, the layer's class is its own again."""
    left = tuple(b for b in behaviors_of(layer) if b is not behavior)
    vars(layer)[_LIST] = left
    if not left:
        del vars(layer)[_LIST]
        layer.__class__ = type(layer).__bases__[1]


class Handle:
    """The one way back: takes a behavior back from the layers it was given to.

    A context manager; leaving it is ``undo()``. A second ``undo()`` does nothing.
    """

    def __init__(self, layers: Iterable[nn.Module], behavior: Behavior, also: Iterable[Callable[[], Any]] = ()) -> None:
        self._undo: list[Callable[[], Any]] = list(also)
        for layer in layers:
            attach(layer, behavior)
            self._undo.append(functools.partial(detach, layer, behavior))

    def undo(self) -> None:
        """Take the behavior back."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


class _BehavingClass(nn.Module):
    """First base of every derived class."""

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), *(b.name for b in behaviors_of(self))]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled, copied: as the plain module."""
        plain: nn.Module = object.__new__(type(self).__bases__[1])
        vars(plain).update({key: value for key, value in vars(self).items() if key != _LIST})
        rebuild, *rest = cast("tuple[Any, ...]", plain.__reduce_ex__(protocol))
        # pickle takes copyreg's __newobj__ only for the very class of the object it was asked to pickle
        return (object.__new__ if getattr(rebuild, "__name__", "") == "__newobj__" else rebuild, *rest)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        """As the plain module, too, which may evaluate otherwise: somebody is about to use it."""
        for said in [b.not_copied for b in behaviors_of(self) if b.not_copied]:
            if said not in memo and get_rank() == 0:  # once a copy, whatever the number of layers
                warnings.warn(said, stacklevel=3)
            memo[said] = said
        of_its_own = getattr(super(), "__deepcopy__", None)  # as torch.fx.GraphModule has
        if of_its_own is not None:
            return of_its_own(memo)
        memo[id(self)] = twin = copy.copy(self)  # noted before its values are copied, among which it may be itself
        vars(twin).update(copy.deepcopy(vars(twin), memo))
        return twin


class _BehavingLayer(_BehavingClass):
    """Of a BatchNorm layer: behaviors wrap its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_replaced():  # a layer within a layer (timm's SplitBatchNorm2d), whose call is none of the outer one's
            with _pop_mode_temporarily():
                return self.forward(*args, **kwargs)
        behaviors = behaviors_of(self)
        if len(args) == 1 == len(behaviors) and not kwargs:  # most calls, and in a pass they are many
            return behaviors[0].forward(cast(_BatchNorm, self), super().forward, args[0])
        forward, input = _bind_rest(super().forward, args, kwargs)
        for behavior in behaviors:
            forward = functools.partial(behavior.forward, cast(_BatchNorm, self), forward)
        return forward(input)


class _BehavingModule(_BehavingClass):
    """Of any other module: behaviors wrap its calls."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not behaviors_of(self):  # a call that torch.compile took hold of while there were some
            return type(self).__call__(self, *args, **kwargs)
        call: Callable[..., Any] = super().__call__
        for behavior in behaviors_of(self):
            if isinstance(behavior, ModuleBehavior):
                call = functools.partial(behavior.call, self, call)
            else:
                call = functools.partial(_around_first, behavior, self, call)
        return call(*args, **kwargs)


def _around_first(behavior: Behavior, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    call, input = _bind_rest(call, args, kwargs, type(module).forward.__get__(module))
    return behavior.forward(cast(_BatchNorm, module), call, input)


def _bind_rest(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    signed: Callable[..., Any] | None = None,
) -> tuple[Callable[[Any], Any], Any]:
    """A call as a function of its first argument, and that; which may come by keyword, under whatever name it has."""
    if args:
        first, *rest = args
    else:
        name = next(iter(signature(signed or function).parameters))
        first, rest = kwargs[name], []
        kwargs = {key: value for key, value in kwargs.items() if key != name}
    return lambda input: function(input, *rest, **kwargs), first


@functools.cache
def _behaving_class(original: type[nn.Module]) -> type[nn.Module]:
    return type(
        original.__name__,
        (_BehavingLayer if issubclass(original, _BatchNorm) else _BehavingModule, original),
        {"__module__": original.__module__, "__doc__": original.__doc__},
    )
