"""Mini-batch inference: the chosen layers normalize with the evaluated batch, in the chosen stages only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import FreezeBNCallback, FromLoader, MiniBatchInferenceCallback, PreciseBNCallback
from tests.callbacks.zoo import (
    Evaluated,
    InMemory,
    TinyNet,
    digest,
    expected,
    fit,
    statistics_of,
    train_loader,
    trainer_with,
    val_loader,
)

STAGES = ["validate", "test", "predict"]


def with_batch_statistics(module: TinyNet, x: Tensor, layers: tuple[str, ...] = ("bn1", "bn2")) -> Tensor:
    """Oracle: torch's own way, layers that store no statistics."""
    module.eval()
    for name in layers:
        layer = module.get_submodule(name)
        layer.running_mean = layer.running_var = None
    with torch.no_grad():
        return module(x)


def predictions(callback: Any, module: Any = None, loader: Any = None) -> list[Tensor]:
    return trainer_with(callback).predict(module or TinyNet(), loader or val_loader())


@pytest.mark.parametrize("layers", [("bn1", "bn2"), ("bn2",)])
def test_a_batch_is_normalized_with_its_own_statistics(layers: tuple[str, ...]) -> None:
    module = TinyNet()
    before = digest(module.state_dict())
    found = predictions(MiniBatchInferenceCallback(layers=list(layers)), module)
    for logits, (x, _) in zip(found, val_loader(), strict=True):
        torch.testing.assert_close(logits, with_batch_statistics(TinyNet(), x, layers))
    assert digest(module.state_dict()) == before
    assert type(module.bn1) is type(module.bn2) is nn.BatchNorm2d


def loss(stage: str, callbacks: list[Any]) -> float:
    trainer = trainer_with(callbacks)
    (result,) = getattr(trainer, stage)(TinyNet(), val_loader(), verbose=False)
    return result["val_loss" if stage == "validate" else "test_loss"]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_only_in_the_chosen_stages(stage: str) -> None:
    plain = loss(stage, [])
    assert loss(stage, [MiniBatchInferenceCallback(stages=[stage])]) != plain
    assert loss(stage, [MiniBatchInferenceCallback(stages=[s for s in STAGES if s != stage])]) == plain


class Active(Callback):
    """Records whether ``bn1`` has a behavior, of which ``repr`` has the name."""

    def __init__(self) -> None:
        self.seen: dict[str, set[bool]] = {}

    def look(self, kind: str, module: LightningModule) -> None:
        self.seen.setdefault(kind, set()).add("mini-batch" in repr(module.bn1))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.look("training", pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.look("sanity check" if trainer.sanity_checking else "validation", pl_module)


def test_in_a_fit_the_validation_does_it_and_neither_training_nor_the_sanity_check() -> None:
    active = Active()
    fit(TinyNet(), [MiniBatchInferenceCallback(), active], num_sanity_val_steps=1)
    assert active.seen == {"sanity check": {False}, "training": {False}, "validation": {True}}


def test_a_validation_in_a_fit_gives_the_loss_of_batch_statistics() -> None:
    evaluated, module = Evaluated(), TinyNet()
    fit(module, [MiniBatchInferenceCallback(), evaluated])
    for state, metrics in zip(evaluated.states, evaluated.metrics, strict=True):
        losses = []
        for x, y in val_loader():
            twin = TinyNet()
            twin.load_state_dict(state)
            losses.append(nn.functional.cross_entropy(with_batch_statistics(twin, x), y))
        assert metrics["val_loss"] == pytest.approx(float(torch.stack(losses).mean()), 1e-5)


def test_precise_bn_estimates_the_same_population_with_it() -> None:
    states = []
    for callbacks in ([], [MiniBatchInferenceCallback()]):
        module = TinyNet()
        fit(module, [*callbacks, PreciseBNCallback(20)])
        states.append(digest(statistics_of(module)))
    assert states[0] == states[1]
    module = TinyNet()
    trainer_with(
        [
            MiniBatchInferenceCallback(),
            PreciseBNCallback(24, stages=["test"], source=FromLoader(lambda trainer: train_loader())),
        ]
    ).test(module, val_loader(), verbose=False)
    for key, value in expected(TinyNet(), list(train_loader())[:3]).items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_frozen_layers_keep_using_their_statistics() -> None:
    by_eval = TinyNet()
    by_eval.train().bn1.eval()
    (first, _), (x, _) = predictions(MiniBatchInferenceCallback(), by_eval), next(iter(val_loader()))
    torch.testing.assert_close(first, with_batch_statistics(TinyNet(), x, ("bn2",)))
    losses = []
    for callbacks in ([], [MiniBatchInferenceCallback()]):
        freeze = FreezeBNCallback(start_step=0, statistics="ema", warmup_epochs=0)
        losses.append(fit(TinyNet(), [freeze, *callbacks]).callback_metrics["val_loss"].item())
    assert losses[0] == losses[1], "layers that train frozen are evaluated frozen"


# --- warnings -----------------------------------------------------------------------------------------------------


def warnings_of(run: Callable[[], Any], about: str = "MiniBatchInference") -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if about in str(w.message)]


def test_it_warns_once_that_predictions_depend_on_their_batch() -> None:
    (message,) = warnings_of(lambda: fit(TinyNet(), MiniBatchInferenceCallback(), max_epochs=3))
    assert "depend on each other" in message


class Regions(LightningModule):
    """Sixteen rows of each image, as a head that runs on regions gets; and a layer on whole images."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.BatchNorm2d(3), nn.BatchNorm1d(27)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.body(batch[0])
        regions = x.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 27)
        return self.head(regions)


@pytest.mark.parametrize(
    ("layers", "batch_size", "warns"), [("head", 6, False), ("body", 6, True), (None, 6, True), (None, 1, False)]
)
def test_it_does_not_warn_where_each_image_brings_many_rows_or_is_alone(
    layers: str | None, batch_size: int, warns: bool
) -> None:
    callback = MiniBatchInferenceCallback(layers=layers)
    messages = warnings_of(lambda: predictions(callback, Regions(), val_loader(batch_size=batch_size)))
    assert bool(messages) is warns


def test_a_batch_that_cannot_be_counted_is_warned_of() -> None:
    class Pair(TinyNet):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(torch.ones(2, 3, 6, 6))

    assert warnings_of(
        lambda: predictions(MiniBatchInferenceCallback(), Pair(), DataLoader(["a", "b"], collate_fn="".join))
    )


class Rows(LightningModule):
    """BatchNorm on rows: one sample has one value per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_mean", self.bn(batch[0]).mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.bn(batch[0])


def test_a_batch_with_one_value_per_channel_takes_the_population_and_is_reported() -> None:
    rows = TensorDataset(torch.randn(9, 4))
    module, callback = Rows(), MiniBatchInferenceCallback()
    module.bn.running_mean.fill_(2)
    trainer = trainer_with(callback)
    messages = warnings_of(
        lambda: [trainer.test(module, DataLoader(rows, 4), verbose=False) for _ in range(2)], "1 calls"
    )
    assert callback.fallbacks == 1 and len(messages) == 2, "once each time"
    logger: InMemory = trainer.logger
    assert logger.logged("mini_batch_inference/fallbacks") == {0: 1.0}
    *_, last = predictions(callback, module, DataLoader(rows, 4))
    assert torch.equal(last, module.eval().bn(rows.tensors[0][8:]))


def test_without_fallbacks_none_are_logged() -> None:
    trainer = fit(TinyNet(), MiniBatchInferenceCallback())
    assert not trainer.logger.logged("mini_batch_inference/fallbacks")


def test_arguments_are_checked() -> None:
    for bad in (["fit"], "test", None):
        with pytest.raises(ValueError, match="stages must be a list of"):
            MiniBatchInferenceCallback(stages=bad)  # type: ignore[arg-type]
    for bad in ({"layers": 3}, {"layers": []}, {"batch_size_fn": 3}):
        with pytest.raises(TypeError, match=f"{next(iter(bad))} must be"):
            MiniBatchInferenceCallback(**bad)
    with pytest.raises(ValueError, match="matches no BatchNorm layer"):
        predictions(MiniBatchInferenceCallback(layers="head.*"))
    with pytest.raises(ValueError, match="Two MiniBatchInferenceCallbacks act on layer 'bn1'"):
        trainer_with([MiniBatchInferenceCallback(), MiniBatchInferenceCallback(layers="bn1")]).predict(
            TinyNet(), val_loader()
        )
