"""Functions in lockstep get one answer together; whatever goes wrong in one, all are ended and nothing is left."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as example
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_bn import find_bn, precise_bn
from lightning_bn.lockstep.scheduler import Lockstep, LockstepError
from tests.zoo import cnn, images

Summing = Lockstep[str, int, int]


def summing() -> Summing:
    return Summing(lambda point, values: [sum(values)] * len(values))


# --- going together ---------------------------------------------------------------------------------------------------


@example(st.lists(st.integers(-9, 9), max_size=5), st.integers(0, 4))
def test_each_gets_the_answer_to_what_all_brought(values: list[int], points: int) -> None:
    lockstep = summing()

    def function(own: int) -> list[int]:
        return [lockstep.exchange(f"point {i}", own + i) for i in range(points)]

    results = lockstep.run([lambda v=v: function(v) for v in values])  # type: ignore[misc]
    assert results == [[sum(values) + len(values) * i for i in range(points)]] * len(values)


def test_answers_that_are_none_or_false_are_answers() -> None:
    lockstep = Lockstep[str, int, Any](lambda point, values: [None, 0, False, ""])
    assert lockstep.run([lambda: lockstep.exchange("a", 1)] * 4) == [None, 0, False, ""]


def test_each_function_has_context_variables_of_its_own() -> None:
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(7)
    lockstep = summing()

    def function(own: int) -> tuple[int, int]:
        before = variable.get()
        variable.set(own)
        lockstep.exchange("a", 0)
        return before, variable.get()

    assert lockstep.run([lambda: function(1), lambda: function(2)]) == [(7, 1), (7, 2)]
    assert variable.get() == 7


def test_an_exception_that_is_being_handled_stays_with_its_function() -> None:
    lockstep = summing()

    def function(own: int) -> str:
        try:
            raise KeyError(own)
        except KeyError:
            lockstep.exchange("a", 0)
            try:
                raise
            except KeyError as error:
                return str(error)

    assert lockstep.run([lambda: function(1), lambda: function(2)]) == ["1", "2"]


def test_functions_are_taken_one_by_one() -> None:
    """So that a loader is not asked for a batch before the last one waits."""
    lockstep, log = summing(), []

    def functions() -> Iterator[Callable[[], Any]]:
        for i in range(2):
            log.append(f"made {i}")
            yield lambda i=i: (log.append(f"began {i}"), lockstep.exchange("a", 0))

    lockstep.run(functions())
    assert log == ["made 0", "began 0", "made 1", "began 1"]


# --- going apart ------------------------------------------------------------------------------------------------------


def test_another_point_is_an_error_that_names_both() -> None:
    lockstep = Lockstep[str, int, int](lambda point, values: values, advice="Do something.")
    with pytest.raises(LockstepError, match=r"number 1 was at a when number 3 was at b\. Do something\."):
        lockstep.run([lambda p=p: lockstep.exchange(p, 0) for p in "aab"])  # type: ignore[misc]


def test_an_end_where_others_wait_is_an_error_that_names_both() -> None:
    lockstep = summing()
    with pytest.raises(LockstepError, match="number 1 was at a when number 2 had ended"):
        lockstep.run([lambda: lockstep.exchange("a", 0), lambda: 0])


def test_a_point_outside_of_run_is_an_error() -> None:
    with pytest.raises(LockstepError, match="a was reached outside"):
        summing().exchange("a", 0)


class Trouble(Exception):
    pass


class Log:
    """Functions that write down how they end; number ``bad`` raises at the second point."""

    def __init__(self, error: type[BaseException] | None, bad: int = 1) -> None:
        self.lockstep, self.error, self.bad = summing(), error, bad
        self.left: list[tuple[int, str]] = []

    @contextlib.contextmanager
    def inside(self, number: int) -> Iterator[None]:
        try:
            yield
        finally:
            self.left.append((number, "context"))

    def function(self, number: int) -> None:
        try:
            with self.inside(number), torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
                self.lockstep.exchange("a", 0)
                if self.error and number == self.bad:
                    raise self.error
                self.lockstep.exchange("b", 0)
        finally:
            self.left.append((number, "finally"))

    def run(self) -> None:
        self.lockstep.run([lambda n=n: self.function(n) for n in range(3)])  # type: ignore[misc]


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_in_one_ends_all_and_leaves_every_context(error: type[BaseException], bad: int) -> None:
    log = Log(error, bad)
    with pytest.raises(error):
        log.run()
    assert sorted(log.left) == sorted((n, part) for n in range(3) for part in ("context", "finally"))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
def test_an_error_in_the_answer_ends_all(error: type[BaseException]) -> None:
    log = Log(None)

    def answer(point: str, values: list[int]) -> list[int]:
        if point == "b":
            raise error
        return values

    log.lockstep = Lockstep(answer)
    with pytest.raises(error):
        log.run()
    assert len(log.left) == 6


def test_an_error_in_what_makes_the_functions_ends_those_that_wait() -> None:
    log = Log(None)

    def functions() -> Iterator[Callable[[], None]]:
        yield lambda: log.function(0)
        raise Trouble

    with pytest.raises(Trouble):
        log.lockstep.run(functions())
    assert log.left == [(0, "context"), (0, "finally")]


def test_a_function_that_catches_its_end_and_goes_on_is_ended_again() -> None:
    """A bare ``except:`` around a layer."""
    lockstep, log = summing(), []

    def stubborn() -> None:
        for point in "abc":
            try:
                lockstep.exchange(point, 0)
            except:  # noqa: E722
                log.append(point)

    def failing() -> None:
        lockstep.exchange("a", 0)
        raise Trouble

    with pytest.raises(Trouble):
        lockstep.run([stubborn, failing])
    assert log == ["a", "b", "c"]


def test_a_function_that_makes_another_error_of_its_end_hides_nothing_and_stops_nothing() -> None:
    lockstep, ended = summing(), []

    def translating(number: int) -> None:
        try:
            lockstep.exchange("a", 0)
            lockstep.exchange("b", 0)
        except BaseException as error:
            ended.append(number)
            raise RuntimeError("of its own") from error

    def failing() -> None:
        lockstep.exchange("a", 0)
        raise Trouble

    with pytest.raises(Trouble):
        lockstep.run([lambda: translating(1), lambda: translating(2), failing])
    assert ended == [1, 2]


def test_filters_of_warnings_are_what_they_were() -> None:
    lockstep = summing()

    def function(own: int) -> None:
        for point in "abc"[own:]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lockstep.exchange(point, own)

    before, show = list(warnings.filters), warnings.showwarning
    lockstep.run([lambda: function(0)] * 3)
    assert list(warnings.filters) == before and warnings.showwarning is show


def test_warnings_that_were_shown_are_not_shown_again() -> None:
    lockstep = summing()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            lockstep.run([lambda: warnings.warn("once", stacklevel=1)] * 2)
    assert len(shown) == 1


# --- a network --------------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Any]:
    """All that a pass must leave as it was."""
    return {
        "modes": [m.training for m in model.modules()],
        "classes": [type(m) for m in model.modules()],
        "values": {key: value.tolist() for key, value in model.state_dict().items()},
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "modes of torch": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "default": (torch.get_default_dtype(), torch.get_default_device()),
    }


@pytest.mark.parametrize("memory_limit", [None, 1000])
@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["0", "4", "6"])
def test_an_error_in_one_micro_batch_leaves_everything_as_it_was(
    where: str, error: type[BaseException], memory_limit: int | None
) -> None:
    model, batches = cnn().train(), images(4, 3, 2)
    model[3].eval()
    before = state(copy.deepcopy(model))

    def raise_in_the_last(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        torch.randn(3)
        if len(output) == 2:
            raise error

    def forward(model: nn.Module, x: Tensor) -> None:
        with torch.autocast("cpu"), torch.device("cpu"), torch.inference_mode():
            model(x)

    hook = model.get_submodule(where).register_forward_hook(raise_in_the_last)
    with pytest.raises(error):
        precise_bn(model, batches, forward=forward, normalization_batch_size="population", memory_limit=memory_limit)
    hook.remove()
    assert state(model) == before
    assert all(type(layer) is nn.BatchNorm2d for layer in find_bn(model).values())
    precise_bn(model, batches, forward=forward, normalization_batch_size="population", memory_limit=memory_limit)


@pytest.mark.parametrize("memory_limit", [None, 1000])
def test_a_layer_in_another_thread_is_refused(memory_limit: int | None) -> None:
    model, batches = cnn(), images(4, 3, 2)
    before = state(model)

    def forward(model: nn.Module, x: Tensor) -> None:
        errors: list[BaseException] = []

        def run() -> None:
            try:
                model(x)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        for error in errors:
            raise error

    with pytest.raises(LockstepError, match="in another thread"):
        precise_bn(model, batches, forward=forward, normalization_batch_size="population", memory_limit=memory_limit)
    assert state(model) == before


def test_a_bare_except_around_a_layer_does_not_keep_a_pass_from_ending() -> None:
    model, batches = cnn(), images(4, 3, 2)
    before = state(model)

    def forward(model: Any, x: Tensor) -> None:
        if len(x) == 2:
            model[1](model[0](x))
            raise Trouble
        with contextlib.suppress(BaseException):
            model(x)
        with contextlib.suppress(BaseException):
            model(x)

    with pytest.raises(Trouble):
        precise_bn(model, batches, forward=forward, normalization_batch_size="population")
    assert state(model) == before
