"""What a network enters inside its forward, around layers where it waits, stays its own and is left by nobody else."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bn import precise_bn
from lightning_bn.core.rng import RandomStream, random_streams
from lightning_bn.lockstep.thread_state import ThreadState
from tests.layer_by_layer import layer_by_layer
from tests.truth import assert_close_to
from tests.zoo import images


class Doubling(TorchFunctionMode):
    """Another function where it is active: what it does to a network can be measured."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output * 2 if func is torch.relu else output


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output * 2 if func is torch.ops.aten.relu.default else output


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if before == torch.float32 else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast without cache": lambda: torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "device": lambda: torch.device("cpu"),
    "meta device": lambda: torch.device("meta"),
    "function mode": Doubling,
    "dispatch mode": Counting,
    "saved-tensor hooks": lambda: saved_tensors_hooks(lambda x: x, lambda x: x),
    "cuDNN's flags": lambda: torch.backends.cudnn.flags(enabled=False),
    "default dtype": default_dtype,
    "torch function disabled": torch._C.DisableTorchFunctionSubclass,
}


def seen() -> dict[str, Any]:
    """The state of torch, as anybody can read it."""
    c, hooks = torch._C, torch._C._autograd._top_saved_tensors_default_hooks(False)
    dispatch = [type(c._get_dispatch_stack_at(i)) for i in range(c._len_torch_dispatch_stack())]
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "cache": torch.is_autocast_cache_enabled(),
        "device": torch.get_default_device(),
        "dtype": torch.get_default_dtype(),
        "function": [type(c._get_function_stack_at(i)) for i in range(c._len_torch_function_stack())],
        "dispatch": [d for d in dispatch if "lightning_bn" not in d.__module__],
        "hooks": hooks is not None,
        "cuDNN": torch.backends.cudnn.enabled,
        "subclasses": torch._C._is_torch_function_enabled(),
        "in a dispatch mode": torch.utils._python_dispatch._is_in_torch_dispatch_mode,
    }


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_state_is_entered_left_and_goes_on_where_it_was(name: str) -> None:
    outside = seen()
    with CONTEXTS[name]():
        inside, state = seen(), ThreadState()
    if name not in ("no autocast", "enable_grad"):  # which are so
        assert inside != outside
    for _ in range(2):
        with state.activate():
            assert seen() == inside
        assert seen() == outside
    ending = ThreadState()
    context = CONTEXTS[name]()
    with ending.activate():
        context.__enter__()
    assert seen() == outside
    with ending.activate():
        assert seen() == inside
        context.__exit__(None, None, None)
        assert seen() == outside
    with CONTEXTS["function mode"](), state.activate():
        assert seen() == inside


def test_states_inside_of_each_other_are_all_kept() -> None:
    outside = seen()
    for first, second in itertools.product(CONTEXTS.values(), repeat=2):
        with first(), second():
            inside, state = seen(), ThreadState()
        with state.activate():
            assert seen() == inside
        assert seen() == outside


class Inside(nn.Module):
    """Convolution and BatchNorm inside of a context that begins before and ends behind them, three times."""

    def __init__(self, context: Callable[[], Any], log: list[Any]) -> None:
        super().__init__()
        self.context, self.log = context, log
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3) for a, b in ((3, 6), (6, 5), (5, 4)))
        self.bns = nn.ModuleList(nn.BatchNorm2d(c) for c in (6, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in zip(self.convs, self.bns, strict=True):
            self.log.append(seen())
            with self.context(), self.context() if len(x) == 2 else contextlib.nullcontext():
                x = torch.relu(bn(conv(x)).clone())
                self.log.append(seen())
        self.log.append(seen())
        return x


@pytest.mark.parametrize(
    ("name", "memory_limit"), [*((name, None) for name in CONTEXTS), ("autocast", 1), ("dispatch mode", 1)]
)
def test_a_network_that_enters_a_context_around_its_layers_is_run_as_if_alone(name: str, memory_limit: Any) -> None:
    log: list[Any] = []
    model = Inside(CONTEXTS[name], log)
    autocast = name.startswith("autocast")
    batches = images(3, 2, 1, pixels=10)
    if not autocast:
        model, batches = model.double(), [x.double() for x in batches]
    outside = seen()
    expected = layer_by_layer(model, batches)
    with torch.no_grad():
        log.clear()
        for batch in batches:
            model(batch)
        alone = list(log)
    log.clear()
    statistics = precise_bn(model, batches, normalization_batch_size="population", memory_limit=memory_limit)
    assert seen() == outside
    for state in [*alone, *log]:
        del state["in a dispatch mode"]  # it is in ours
    assert all(state in alone for state in log)
    assert_close_to(statistics, expected, sigma=2e-2 if autocast else 1e-10, var=5e-2 if autocast else 1e-9)


def test_casts_of_weights_are_shared_while_others_wait_and_forgotten_at_the_end() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(model: Any, x: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            model(x)

    batches, kwargs = images(3, 2, 1), {"forward": forward, "normalization_batch_size": "population"}
    limited, unlimited = (precise_bn(model, batches, memory_limit=limit, **kwargs) for limit in (1, None))
    assert all(torch.equal(limited[name].mean, unlimited[name].mean) for name in limited)
    nn.init.zeros_(model[0].weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[0](torch.ones(1, 3, 3, 3)).sub(model[0].bias[:, None, None]).abs().max() < 1e-2


def drawn_from(streams: Iterator[RandomStream]) -> list[float]:
    found = []
    for stream in itertools.islice(streams, 3):
        with stream.activate():
            found.append(float(torch.randn(())))
    return found


def test_streams_go_on_where_they_were_left_depend_on_the_global_one_and_do_not_move_it() -> None:
    before = torch.get_rng_state()
    numbers, of_one = drawn_from(random_streams()), drawn_from(itertools.repeat(RandomStream(3)))
    assert len(set(numbers)) == 3 and drawn_from(random_streams()) == numbers
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(1)
    assert drawn_from(random_streams()) != numbers
    torch.manual_seed(3)
    assert of_one == [float(torch.randn(())) for _ in range(3)]
