"""Claim: callbacks and functions add few operators to a step, and hardly ever wait for the device.

A GPU runs behind Python: each operator costs a launch, and each value that Python reads makes it wait. Both are counted
by a dispatch mode, which needs no GPU, and do not depend on other load.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from typing_extensions import Self

import lightning_bn as lbn

TITLE = "Few operators are added, and Python hardly ever waits for the device"
CLAIM = (
    "A pass runs at most 1.25 times the operators of the bare forward and waits for the device twice, and once more "
    "for each group of joint batches. A training step adds at most 30 operators under a monitor and waits for nothing."
)

_READING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "bincount"}
"""Operators whose results Python needs, as values or as sizes."""
_VIEWS = {"view", "_unsafe_view", "unbind", "select", "slice", "split", "split_with_sizes", "expand", "permute", "t"}
_VIEWS |= {
    "transpose",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "unfold",
    "as_strided",
    "_reshape_alias",
    "unflatten",
}


class OperatorCount(TorchDispatchMode):
    """Counts ATen operators, views included, and the times that Python reads a value of a tensor.

    Example:
        >>> import torch
        >>> with OperatorCount() as count:
        ...     bool(torch.zeros(2).sum() > 1)
        False
        >>> count.operators.total(), count.waits
        (4, 1)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()
        self.waits = 0
        self._of_python = _PythonReads(self)

    def __enter__(self) -> Self:
        self._of_python.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._of_python.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.operators[name] += 1
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        unknown_size = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        self.waits += name in _READING or by_mask or unknown_size
        return func(*args, **(kwargs or {}))


class _PythonReads(TorchFunctionMode):
    def __init__(self, count: OperatorCount) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count.waits += func in (Tensor.tolist, Tensor.cpu)  # no operators on the CPU
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Row:
    """What something adds to a step or a pass, and its limits; None has no limit."""

    what: str
    when: str
    operators: float
    waits: int
    max_operators: float | None = None
    max_waits: int | None = None

    @property
    def missed(self) -> bool:
        """Whether a limit is exceeded."""
        pairs = ((self.operators, self.max_operators), (self.waits, self.max_waits))
        return any(limit is not None and value > limit for value, limit in pairs)

    def __str__(self) -> str:
        cells = [
            f"{value:.4g}" + ("" if limit is None else f" (at most {limit:.4g})")
            for value, limit in ((self.operators, self.max_operators), (self.waits, self.max_waits))
        ]
        return f"| {self.what} | {self.when} | {' | '.join(cells)} |{' **missed** |' if self.missed else ' |'}"


def report(device: str, quick: bool) -> str:
    """Counts on a device; returns table and method in Markdown."""
    network = "resnet18" if quick else "resnet50"
    torch.set_num_threads(1)
    rows = [*verbs(network, device), *callbacks(network, device)]
    for row in rows:
        print(row, flush=True)
    missed = sum(row.missed for row in rows)
    return "\n".join(
        [
            "| what | of | operators | waits | |",
            "|---|---|---|---|---|",
            *map(str, rows),
            "",
            f"- Within their limits: {len(rows) - missed} of {len(rows)}.",
            "",
            f"**Method.** {network}, {BATCHES} batches of {SAMPLES} images of {PIXELS} px. Operators are ATen's, views "
            "and those of the backward included; *pass*: as a multiple of those of the bare forward; *step* and "
            "*epoch's end*: in addition to those of plain training; *a layer*: divided by the BatchNorm layers. Waits "
            "are the times that Python reads a value of a tensor.",
        ]
    )


BATCHES, SAMPLES, PIXELS = 8, 4, 32


def verbs(network: str, device: str = "cpu") -> list[Row]:
    """Count for the functions of plain PyTorch."""
    model = _network(network, device)
    layers = len(lbn.find_bn(model))
    images = torch.randn(BATCHES, SAMPLES, 3, PIXELS, PIXELS, device=device)
    bare, _ = _counted(lambda: [_forward(model, x) for x in images])

    def of_pass(what: str, function: Callable[[], Any], limits: tuple[float | None, int | None]) -> Row:
        operators, waits = _counted(function)
        return Row(what, "pass / bare forward", operators / bare, waits, *limits)

    precise = partial(lbn.precise_bn, model, images)
    joint = 4 * SAMPLES
    groups = BATCHES * SAMPLES // joint
    rows = [
        of_pass("precise_bn", partial(precise, normalization_batch_size="loader"), (1.25, 2)),
        # one more is the check, in the first pass of a model, that batches do not influence each other
        of_pass("precise_bn, 4 joint", partial(precise, normalization_batch_size=joint), (None, 3 + groups)),
        of_pass("precise_bn, population", partial(precise, normalization_batch_size="population"), (None, 4)),
        of_pass("adapt_bn and undo", lambda: lbn.adapt_bn(model, images).undo(), (1.4, 2)),
    ]
    step, x = partial(_step, model), images[0]
    plain, plain_waits = _counted(partial(step, x))

    def of_step(what: str, handle: AbstractContextManager[Any], limit: float, waits: int = 0) -> Row:
        with handle:
            operators, waited = _counted(partial(step, x))
        return Row(what, "step, a layer", (operators - plain) / layers, waited - plain_waits, limit, waits)

    rows += [of_step("freeze_bn", lbn.freeze_bn(model), 0), of_step("ghost_bn", lbn.ghost_bn(model, size=2), 20)]
    domains = lbn.domain_bn(
        model, num_domains=2, train_statistics="domain", population_statistics="domain", affine="shared"
    )
    with domains, domains.use_domain(0):
        rows.append(of_step("domain_bn, one domain in a batch", nullcontext(), 30))
    with torch.no_grad():
        plain, _ = _counted(lambda: model.eval()(x))
        with lbn.mini_batch_inference(model):
            operators, waits = _counted(lambda: model.eval()(x))
    return [*rows, Row("mini_batch_inference", "evaluation, a layer", (operators - plain) / layers, waits, 6, 0)]


def callbacks(network: str, device: str = "cpu") -> list[Row]:
    """Count for the callbacks, in fits of two epochs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    plain, layers = _fit(network, device, []), len(lbn.find_bn(_network(network, device)))
    rows = []
    for what, (make, of_step, of_epoch) in _CALLBACKS.items():
        counted = _fit(network, device, [make()])
        for when, limits in (("step", of_step), ("epoch's end", of_epoch)):
            operators, waits = _difference(counted[when], plain[when])
            if what == "GhostBNCallback":
                rows.append(Row(what, f"{when}, a layer", operators / layers, waits, *limits))
            else:
                rows.append(Row(what, when, operators, waits, *limits))
    return rows


_Limits = tuple[float | None, int | None]
_CALLBACKS: Mapping[str, tuple[Callable[[], Callback], _Limits, _Limits]] = {
    "PreciseBNCallback": (partial(lbn.PreciseBNCallback, SAMPLES * BATCHES), (0, 0), (None, 8)),
    "ForecastBNCallback": (lbn.ForecastBNCallback, (8, 0), (None, 30)),
    "FreezeBNCallback": (partial(lbn.FreezeBNCallback, start_epoch=0, statistics="ema"), (0, 0), (0, 2)),
    "GhostBNCallback": (partial(lbn.GhostBNCallback, 2), (20, 0), (0, 0)),
    "BNStatsMonitor": (partial(lbn.BNStatsMonitor, 1), (30, 0), (None, None)),
    "BatchLeakageMonitor": (partial(lbn.BatchLeakageMonitor, num_samples=16), (8, 0), (None, None)),
    "MiniBatchInferenceCallback": (lbn.MiniBatchInferenceCallback, (0, 0), (0, 0)),
}


class _Meter(Callback):
    # counts the last but one training step of the last epoch, and the end of that epoch, behind the last step
    def __init__(self, count: OperatorCount) -> None:
        self._count, self._marks = count, list[tuple[int, int]]()

    def on_train_batch_start(self, *_: Any) -> None:
        self._marks.append((self._count.operators.total(), self._count.waits))

    def on_train_end(self, *_: Any) -> None:
        self._marks.append((self._count.operators.total(), self._count.waits))

    @property
    def found(self) -> dict[str, tuple[int, int]]:
        before, last, end = self._marks[-3:]
        step = _difference(last, before)
        return {"step": step, "epoch's end": _difference(_difference(end, last), step)}


class _Classifier(LightningModule):
    def __init__(self, network: str, device: str) -> None:
        super().__init__()
        self.network = _network(network, device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.network(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def _fit(network: str, device: str, callbacks: Sequence[Callback]) -> dict[str, tuple[int, int]]:
    torch.manual_seed(0)
    images = [(torch.randn(SAMPLES, 3, PIXELS, PIXELS), torch.zeros(SAMPLES).long()) for _ in range(BATCHES)]
    with tempfile.TemporaryDirectory() as folder, OperatorCount() as count:
        meter = _Meter(count)
        trainer = Trainer(
            accelerator="gpu" if device == "cuda" else device,
            devices=1,
            max_epochs=2,
            callbacks=[meter, *callbacks],
            logger=CSVLogger(folder),
            log_every_n_steps=10_000,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        loader = DataLoader[Any](images, batch_size=None)  # type: ignore[arg-type]  # a list is a data set
        trainer.fit(_Classifier(network, device), loader, loader)
        return meter.found


def _network(name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = getattr(torchvision.models, name)(num_classes=10).to(device)
    return network


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor) -> None:
    model(x)


def _step(model: nn.Module, x: Tensor) -> None:
    model.train()(x).sum().backward()


def _counted(function: Callable[[], Any]) -> tuple[int, int]:
    with OperatorCount() as count:
        function()
    return count.operators.total(), count.waits


def _difference(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] - b[0], a[1] - b[1]
