"""Functions in lockstep get one answer together; whatever goes wrong in one, all are ended and nothing is left."""

import contextlib
import contextvars
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given as example
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_bn import precise_bn
from lightning_bn.lockstep.scheduler import Lockstep, LockstepError
from tests import hand_written
from tests.functional.test_precise_bn_traces import traces
from tests.functional.test_thread_state import seen
from tests.hand_written import ZOO, Net
from tests.zoo import cnn, images

jointly = partial(precise_bn, normalization_batch_size="population")


def summing(advice: str = "") -> Lockstep[str, int, int]:
    return Lockstep(lambda point, values: [sum(values)] * len(values), advice=advice)


@example(st.lists(st.integers(-9, 9), max_size=5), st.integers(0, 4))
def test_each_gets_the_answer_to_what_all_brought(values: list[int], points: int) -> None:
    lockstep = summing()

    def function(own: int) -> list[int]:
        return [lockstep.exchange(f"point {i}", own + i) for i in range(points)]

    results = lockstep.run([partial(function, v) for v in values])
    assert results == [[sum(values) + len(values) * i for i in range(points)]] * len(values)


def test_each_function_has_context_variables_and_a_handled_exception_of_its_own() -> None:
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(7)
    lockstep = summing()

    def function(own: int) -> Any:
        before = variable.get()
        variable.set(own)
        try:
            raise KeyError(own)
        except KeyError:
            lockstep.exchange("a", 0)
            try:
                raise
            except KeyError as error:
                return before, variable.get(), str(error)

    assert lockstep.run([lambda: function(1), lambda: function(2)]) == [(7, 1, "1"), (7, 2, "2")]
    assert variable.get() == 7
    falsy = Lockstep[str, int, Any](lambda point, values: [None, 0, False, ""])
    assert falsy.run([lambda: falsy.exchange("a", 1)] * 4) == [None, 0, False, ""]


def test_functions_are_taken_one_by_one() -> None:
    lockstep, log = summing(), []

    def functions() -> Iterator[Callable[[], Any]]:
        for i in range(2):
            log.append(f"made {i}")
            yield lambda i=i: (log.append(f"began {i}"), lockstep.exchange("a", 0))

    lockstep.run(functions())
    assert log == ["made 0", "began 0", "made 1", "began 1"]


def test_functions_that_go_apart_are_an_error_that_names_both() -> None:
    lockstep = summing(advice="Do something.")
    with pytest.raises(LockstepError, match=r"number 1 was at a when number 3 was at b\. Do something\."):
        lockstep.run([partial(lockstep.exchange, point, 0) for point in "aab"])
    with pytest.raises(LockstepError, match="number 1 was at a when number 2 had ended"):
        lockstep.run([lambda: lockstep.exchange("a", 0), lambda: 0])
    with pytest.raises(LockstepError, match="a was reached outside"):
        lockstep.exchange("a", 0)


class Trouble(Exception):
    pass


class Log:
    """Functions that write down how they end; number ``bad`` raises at the second point."""

    def __init__(self, error: type[BaseException] | None = None, bad: int = 1) -> None:
        self.lockstep, self.error, self.bad = summing(), error, bad
        self.left: list[tuple[int, str]] = []

    def function(self, number: int) -> None:
        try:
            with contextlib.ExitStack() as stack, torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
                stack.callback(self.left.append, (number, "context"))
                self.lockstep.exchange("a", 0)
                if self.error and number == self.bad:
                    raise self.error
                self.lockstep.exchange("b", 0)
        finally:
            self.left.append((number, "finally"))

    def functions(self) -> list[Callable[[], None]]:
        return [partial(self.function, number) for number in range(3)]


@pytest.mark.parametrize(("error", "bad"), [(Trouble, 0), (KeyboardInterrupt, 1), (SystemExit, 2), (GeneratorExit, 1)])
def test_an_error_in_one_ends_all_and_leaves_every_context(error: type[BaseException], bad: int) -> None:
    log = Log(error, bad)
    with pytest.raises(error):
        log.lockstep.run(log.functions())
    assert sorted(log.left) == sorted((n, part) for n in range(3) for part in ("context", "finally"))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
def test_an_error_in_the_answer_or_in_what_makes_the_functions_ends_those_that_wait(error: Any) -> None:
    def answer(point: str, values: list[int]) -> list[int]:
        if point == "b":
            raise error
        return values

    def broken() -> Iterator[Callable[[], None]]:
        yield log.functions()[0]
        raise error

    log = Log()
    with pytest.raises(error):
        log.lockstep.run(broken())
    assert log.left == [(0, "context"), (0, "finally")]
    log = Log()
    log.lockstep = Lockstep(answer)
    with pytest.raises(error):
        log.lockstep.run(log.functions())
    assert len(log.left) == 6


def test_a_function_that_catches_its_end_is_ended_again_and_hides_nothing() -> None:
    lockstep, log = summing(), []

    def stubborn() -> None:
        for point in "abc":
            try:
                lockstep.exchange(point, 0)
            except:  # noqa: E722
                log.append(point)

    def translating() -> None:
        try:
            lockstep.exchange("a", 0)
            lockstep.exchange("b", 0)
        except BaseException as error:
            log.append("translated")
            raise RuntimeError("of its own") from error

    def failing() -> None:
        lockstep.exchange("a", 0)
        raise Trouble

    for functions, ended in (
        ([stubborn, failing], [*"abc"]),
        ([translating, translating, failing], ["translated"] * 2),
    ):
        with pytest.raises(Trouble):
            lockstep.run(functions)
        assert log == ended
        log.clear()


def test_filters_of_warnings_are_what_they_were() -> None:
    lockstep = summing()

    def function() -> None:
        for point in "abc":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lockstep.exchange(point, 0)

    before, show = list(warnings.filters), warnings.showwarning
    lockstep.run([function] * 3)
    assert list(warnings.filters) == before and warnings.showwarning is show


def state(model: nn.Module) -> dict[str, Any]:
    """All that a pass must leave as it was."""
    return {**traces(model), **seen(), "values": {key: value.tolist() for key, value in model.state_dict().items()}}


@pytest.mark.parametrize("memory_limit", [None, 1000])
@pytest.mark.parametrize(
    ("name", "where", "error"),
    [
        *(("cnn", "0", Trouble), ("cnn", "4", KeyboardInterrupt), ("cnn", "6", Trouble)),
        *(("counts itself", "bn", Trouble), ("by hand, by assignment", "outside", Trouble)),
    ],
)
def test_an_error_in_one_micro_batch_leaves_all_as_it_was(name: str, where: str, error: Any, memory_limit: Any) -> None:
    model, batches = (cnn(), images(4, 3, 2)) if name == "cnn" else (Net(ZOO[name]), hand_written.batches((4, 3, 2)))
    before = state(model)

    def raise_in_the_last(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        torch.randn(3)
        if len(output) == 2:
            raise error

    def forward(model: nn.Module, x: Tensor) -> None:
        with torch.autocast("cpu"), torch.device("cpu"), torch.inference_mode():
            model(x)

    hook = model.get_submodule(where).register_forward_hook(raise_in_the_last)
    with pytest.raises(error):
        jointly(model, batches, forward=forward, memory_limit=memory_limit)
    hook.remove()
    assert state(model) == before
    jointly(model, batches, forward=forward, memory_limit=memory_limit)


def in_another_thread(model: nn.Module, x: Tensor) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(model, x).result()


def with_bare_except(model: Any, x: Tensor) -> None:
    if len(x) == 2:
        model[1](model[0](x))
        raise Trouble
    for _ in range(2):
        with contextlib.suppress(BaseException):
            model(x)


@pytest.mark.parametrize("memory_limit", [None, 1000])
@pytest.mark.parametrize(
    ("forward", "error", "message"),
    [(in_another_thread, LockstepError, "in another thread"), (with_bare_except, Trouble, None)],
)
def test_a_forward_that_cannot_go_on_ends_a_pass(forward: Any, error: Any, message: Any, memory_limit: Any) -> None:
    model, batches = cnn(), images(4, 3, 2)
    before = state(model)
    with pytest.raises(error, match=message):
        jointly(model, batches, forward=forward, memory_limit=memory_limit)
    assert state(model) == before
