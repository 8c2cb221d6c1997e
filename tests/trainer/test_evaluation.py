"""An isolated evaluation gives the metrics of a real one under that behavior, and leaves no trace."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_bn import mini_batch_inference
from lightning_bn.functional.adapt import adapt_bn
from lightning_bn.trainer.evaluation import evaluate_isolated
from lightning_bn.trainer.loaders import evaluation_batches
from tests.callbacks.zoo import (
    Images,
    InMemory,
    TinyNet,
    digest,
    fit,
    random_states,
    state_but_statistics,
    trainer_with,
)


class Logging(TinyNet):
    """Logs values and metrics, by step and epoch, with several reductions, from every hook."""

    def __init__(self) -> None:
        super().__init__()
        self.top1, self.at_the_end = MulticlassAccuracy(3), MulticlassAccuracy(3)
        self.outputs: list[Tensor] = []

    def evaluate(self, kind: str, batch: Any) -> Tensor:
        x, y = batch
        torch.manual_seed(len(x))  # the noise is then that of the real evaluation
        logits = self(x + 0.1 * torch.randn_like(x))
        self.top1(logits, y), self.at_the_end.update(logits, y)
        self.outputs.append(logits)
        self.log(f"{kind}_loss", F.cross_entropy(logits, y), on_step=True, on_epoch=True, prog_bar=True)
        self.log(f"{kind}_sum", logits.square().sum(), reduce_fx="sum", batch_size=len(x))
        self.log_dict({f"{kind}_top1": self.top1, f"{kind}_max": logits.max()}, reduce_fx="max")
        return logits

    def log_at_end(self, kind: str) -> None:
        self.log(f"{kind}_at_the_end", self.at_the_end.compute())
        self.log(f"{kind}_spread", torch.cat(self.outputs).std())
        self.at_the_end.reset()
        self.outputs.clear()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.evaluate("test", batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.evaluate("val", batch)

    def on_test_epoch_start(self) -> None:
        self.outputs = []

    on_validation_epoch_start = on_test_epoch_start

    def on_test_batch_end(self, outputs: Any, *args: Any) -> None:
        self.log("last_hook", outputs.mean(), batch_size=len(outputs))

    def on_test_epoch_end(self) -> None:
        self.log_at_end("test")

    def on_validation_epoch_end(self) -> None:
        self.log_at_end("val")


class Within(Callback):
    """Evaluates under a behavior before each batch of an evaluation."""

    def __init__(self, behavior: Any = lambda module: nullcontext()) -> None:
        self.behavior, self.metrics = behavior, []

    def look(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *_: Any) -> None:
        if trainer.state.fn == "fit" and trainer.current_epoch == 0:
            return
        before = self.state(trainer, pl_module)
        with evaluation_batches(trainer, pl_module) as batches:
            self.metrics.append(evaluate_isolated(self.behavior(pl_module), trainer, pl_module, batches, "other"))
        assert self.state(trainer, pl_module) == before

    on_validation_batch_start = on_test_batch_start = look

    def state(self, trainer: Trainer, module: Any) -> list[Any]:
        connector = {k: v for k, v in vars(trainer._logger_connector).items() if k != "trainer"}
        digests = [digest(value) for value in (list(random_states()), module.state_dict(), module.outputs)]
        modes = {n: m.training for n, m in module.named_modules()}
        return [*digests, state_but_statistics(module), str(connector), str(trainer._results), modes]


def loaders(n: int) -> Any:
    both = [DataLoader(Images(size), batch_size=5) for size in (12, 7)]
    return both if n > 1 else both[0]


def metrics_of(callbacks: list[Any], stage: str, n: int, behavior: Any = None) -> tuple[dict[str, float], InMemory]:
    module, trainer = Logging(), trainer_with(callbacks)
    with behavior(module) if behavior else nullcontext():
        results = getattr(trainer, stage)(module, loaders(n), verbose=False)
    return {key: value for result in results for key, value in result.items()}, trainer.logger


def adapted(module: LightningModule) -> Any:
    return adapt_bn(module, [(3 * torch.randn(20, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)])


@pytest.mark.parametrize(
    ("stage", "n", "behavior"),
    [("validate", 1, None), ("test", 2, mini_batch_inference), ("validate", 2, adapted), ("test", 1, adapted)],
)
def test_metrics_are_those_of_a_real_evaluation_under_the_behavior(stage: str, n: int, behavior: Any) -> None:
    within = Within(behavior or (lambda module: nullcontext()))
    plain, rows = metrics_of([], stage, n)
    outer, outer_rows = metrics_of([within], stage, n)
    assert outer == plain and outer_rows.rows == rows.rows
    expected, _ = metrics_of([], stage, n, behavior)
    assert len(expected) == (6 if stage == "validate" else 7) * n - 2 * (n - 1)
    assert (expected == plain) is (behavior is None)
    assert len(within.metrics) == 3 + 2 * (n - 1)
    for metrics in within.metrics:
        assert metrics == {f"other/{key}": value for key, value in expected.items()}


def test_in_the_validation_of_a_fit_it_leaves_training_as_it_was() -> None:
    modules, within, rows = (Logging(), Logging()), Within(mini_batch_inference), []
    for module, callbacks in zip(modules, ([], [within]), strict=True):
        rows.append(fit(module, callbacks).logger.rows)
    assert within.metrics and rows[0] == rows[1]
    assert digest(modules[0].state_dict()) == digest(modules[1].state_dict())


class Breaking(Logging):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        if not isinstance(self.trainer.loggers[0], InMemory):  # muted: the isolated evaluation
            raise self.error
        return super().test_step(batch, batch_idx)


class Catching(Within):
    """Catches the error of an evaluation within."""

    def __init__(self, raised: type[Exception]) -> None:
        super().__init__(mini_batch_inference)
        self.raised, self.same = raised, []

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        before = self.state(trainer, pl_module)
        with pytest.raises(self.raised):
            self.look(trainer, pl_module, *args)
        self.same.append(self.state(trainer, pl_module) == before)


@pytest.mark.parametrize(
    ("error", "raised"), [(ZeroDivisionError(), ZeroDivisionError), (StopIteration(), RuntimeError)]
)
def test_an_error_within_is_raised_and_leaves_no_trace(error: Exception, raised: type[Exception]) -> None:
    catching = Catching(raised)
    trainer_with(catching).test(Breaking(error), loaders(1), verbose=False)
    assert catching.same == [True] * 3


def test_outside_of_an_evaluation_it_is_refused() -> None:
    trainer = fit(TinyNet())
    with pytest.raises(RuntimeError, match="does not evaluate now"):
        evaluate_isolated(nullcontext(), trainer, trainer.lightning_module, [], "other")

    class Predicting(Callback):
        def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            evaluate_isolated(nullcontext(), trainer, pl_module, [], "other")

    with pytest.raises(RuntimeError, match="predict logs nothing"):
        trainer_with(Predicting()).predict(TinyNet(), loaders(1))
