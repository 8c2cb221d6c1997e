"""Mini-batch inference: the chosen layers normalize with the evaluated batch, in the chosen stages only."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import MiniBatchInferenceCallback
from tests.callbacks.zoo import At, TinyNet, caught, digest, fit, trainer_with, val_loader


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
    outputs = predictions(MiniBatchInferenceCallback(layers=list(layers)), module)
    for logits, (x, _) in zip(outputs, val_loader(), strict=True):
        torch.testing.assert_close(logits, with_batch_statistics(TinyNet(), x, layers))
    assert digest(module.state_dict()) == before
    assert type(module.bn1) is type(module.bn2) is nn.BatchNorm2d


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_it_acts_in_the_chosen_stages_only(stage: str) -> None:
    others = [s for s in ("validate", "test", "predict") if s != stage]
    callbacks = [[], MiniBatchInferenceCallback([stage]), MiniBatchInferenceCallback(others)]
    plain, chosen, not_chosen = (getattr(trainer_with(c), stage)(TinyNet(), val_loader()) for c in callbacks)
    assert chosen != plain == not_chosen


def test_in_a_fit_the_validation_does_it_and_neither_training_nor_the_sanity_check() -> None:
    def look(trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        active.add((trainer.state.stage.value, "mini-batch" in repr(pl_module.bn1)))

    active: set[tuple[str, bool]] = set()
    looking = At(look, "on_train_batch_start", "on_validation_batch_start")
    fit(TinyNet(), [MiniBatchInferenceCallback(), looking], num_sanity_val_steps=1)
    assert active == {("sanity_check", False), ("train", False), ("validate", True)}


def test_it_warns_once_that_predictions_depend_on_their_batch() -> None:
    with caught("MiniBatchInference") as found:
        trainer = fit(TinyNet(), MiniBatchInferenceCallback())
    assert len(found) == 1 and "depend on each other" in found[0]
    assert not trainer.logger.logged("mini_batch_inference/fallbacks")


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
def test_it_warns_unless_each_image_brings_many_rows_or_is_alone(layers: Any, batch_size: int, warns: bool) -> None:
    callback = MiniBatchInferenceCallback(layers=layers)
    with caught("MiniBatchInference") as found:
        predictions(callback, Regions(), val_loader(batch_size=batch_size))
    assert bool(found) is warns


def test_it_warns_if_the_batch_size_is_unknown() -> None:
    class Pair(TinyNet):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(torch.ones(2, 3, 6, 6))

    with caught("MiniBatchInference") as found:
        predictions(MiniBatchInferenceCallback(), Pair(), DataLoader(["a", "b"], collate_fn="".join))
    assert found


class Rows(LightningModule):
    """BatchNorm on rows: one sample has one value per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.bn(batch[0])

    test_step = predict_step


def test_a_batch_with_one_value_per_channel_takes_the_population_and_is_reported() -> None:
    rows = TensorDataset(torch.randn(9, 4))
    module, callback = Rows(), MiniBatchInferenceCallback()
    module.bn.running_mean.fill_(2)
    trainer = trainer_with(callback)
    with caught("1 calls") as messages:
        for _ in range(2):
            trainer.test(module, DataLoader(rows, 4))
    assert callback.fallbacks == 1 and len(messages) == 2, "once each time"
    assert trainer.logger.logged("mini_batch_inference/fallbacks") == {0: 1.0}
    *_, last = predictions(callback, module, DataLoader(rows, 4))
    assert torch.equal(last, module.eval().bn(rows.tensors[0][8:]))
