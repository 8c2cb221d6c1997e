"""Layers that people write themselves, in a fit: the monitor and the forecast mark what they cannot recover."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bn import BNStatsMonitor, ForecastBNCallback
from tests.hand_written import ZOO, Net, batches

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Fits(LightningModule):
    """Two calls a step of one net, the second at momentum 0; it does not learn."""

    def __init__(self, name: str, fails_at: int = -1) -> None:
        super().__init__()
        self.net, self.fails_at = Net(ZOO[name]), fails_at
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)
        self.net.last.momentum = 0.0
        self.net.last(3 + 9 * batch)
        self.net.last.momentum = 0.1
        if batch_idx == self.fails_at:
            raise KeyError("the step")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(module: LightningModule, callback: Any, path: Any) -> None:
    loader: DataLoader[Any] = DataLoader(batches([8]) * 12, batch_size=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", callbacks=[callback], logger=CSVLogger(path), log_every_n_steps=1,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        try:
            trainer.fit(module, loader)
        finally:
            module.said = "\n".join(str(w.message) for w in caught)  # type: ignore[assignment]


LEFT = ["by hand, biased", "own statistics, inverted momentum", "by hand, activated"]


@pytest.mark.parametrize("name", ["by hand, by assignment", "timm BatchNormAct2d", *LEFT])
def test_a_forecast_is_written_where_it_is_right_and_the_other_layer_is_left_and_named(
    name: str, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    module, plain = Fits(name), Fits(name)
    plain.load_state_dict(module.state_dict())
    callback = ForecastBNCallback()
    torch.manual_seed(1)
    fit(module, callback, tmp_path)
    torch.manual_seed(1)
    fit(plain, Callback(), tmp_path)
    bn = module.net.bn
    assert callback.result is not None
    assert set(callback.result) == {"net.last", *(() if name in LEFT else ("net.bn",))}
    assert ("cannot forecast 'net.bn'" in str(module.said)) == (name in LEFT)
    assert torch.equal(bn.running_mean, plain.net.bn.running_mean) == (name in LEFT)
    torch.manual_seed(1)
    (x,) = batches([8])
    given = module.net.outside(module.net.entry.use(bn, module.net.inside(x), x))
    torch.testing.assert_close(module.net.last.running_mean, given.mean((0, 2)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", LEFT[1:2])  # drawing its pictures takes seconds
@pytest.mark.parametrize("fails_at", [-1, 0, 5])
@pytest.mark.parametrize("kind", [lambda: BNStatsMonitor(1, window=2), ForecastBNCallback])
def test_nothing_of_ours_is_left_in_the_layers_and_nothing_ends_the_fit(
    kind: Any, fails_at: int, name: str, tmp_path: Any
) -> None:
    module = Fits(name, fails_at)
    before = [type(m) for m in module.modules()]
    if fails_at < 0:
        fit(module, kind(), tmp_path)
    else:
        with pytest.raises(KeyError, match="the step"):
            fit(module, kind(), tmp_path)
    assert [type(m) for m in module.modules()] == before
    assert "cannot measure a batch" not in str(module.said)
