"""What BNStatsMonitor logs, where, when and under which names; read back from the loggers' own files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import BNStatsMonitor, FreezeBNCallback, PreciseBNCallback, find_bn
from tests.callbacks.zoo import InMemory, TinyNet, digest, fit, statistics_of, train_loader
from tests.ranks import run_on_ranks
from tests.truth import recorded, rows_of

AGGREGATES = {
    *("mean_gap_p50", "mean_gap_p95", "mean_gap_max", "worst_layer", "var_gap_p95", "var_gap_max"),
    *("lag_max", "noise_max", "dead_channels", "nonfinite_layers"),
}


def fit_with(monitor: BNStatsMonitor, *others: Any, module: LightningModule | None = None, **kwargs: Any) -> InMemory:
    """The logger of a fit."""
    logger = InMemory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module or TinyNet(), [monitor, *others], logger=logger, **kwargs)
    return logger


def rows(logger: InMemory, prefix: str = "bn_agg/") -> list[tuple[int, dict[str, float]]]:
    return [(step, row) for step, row in logger.rows if any(key.startswith(prefix) for key in row)]


def table(folder: Path) -> dict[str, dict[str, str]]:
    """Layer -> its row in the table that a CSVLogger's folder holds."""
    with next(folder.rglob("layers.csv")).open() as file:
        return {row["layer"]: row for row in csv.DictReader(file)}


class TruthOfBatches(Callback):
    """Mean offset, in sigma of the EMA before the step, of every batch: by looking at the inputs, in float64."""

    def __init__(self) -> None:
        self.gaps: dict[str, list[float]] = {"bn1": [], "bn2": []}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ema = statistics_of(pl_module)
        self.context = recorded(pl_module)
        self.calls = self.context.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.context.__exit__(None, None, None)
        for name, found in self.gaps.items():
            ((x, _),) = self.calls[name]
            mean, var = (self.ema[f"{name}.running_{kind}"].double() for kind in ("mean", "var"))
            found.append(((rows_of(x).mean(0) - mean) / var.sqrt()).square().mean().sqrt().item())


@pytest.mark.parametrize("trainer", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_the_gap_is_that_of_every_batch_from_the_ema_before_it(trainer: dict[str, Any]) -> None:
    truth = TruthOfBatches()
    logger = fit_with(BNStatsMonitor(1, 1), truth, **trainer)
    together = trainer.get("accumulate_grad_batches", 1)
    for name, gaps in truth.gaps.items():
        windows = torch.tensor(gaps).view(-1, together).square().mean(1).sqrt()
        logged = list(logger.logged(f"bn_mean_gap/{name}").values())
        assert logged == pytest.approx(windows.tolist(), rel=2e-3 if "precision" in trainer else 1e-4)


def test_each_row_holds_all_keys_always_the_same_and_few_enough() -> None:
    logger = fit_with(BNStatsMonitor(1, 2), max_epochs=4)
    found = rows(logger)
    assert len(found) == 8
    per_layer = {f"bn_{gap}/{bn}" for gap in ("mean_gap", "var_gap") for bn in ("bn1", "bn2")}
    for _, row in found:
        assert set(row) - {"epoch"} == {f"bn_agg/{name}" for name in AGGREGATES} | per_layer
    assert len(AGGREGATES) <= 10


@pytest.mark.parametrize("trainer", [{}, {"accumulate_grad_batches": 2}, {"log_every_n_steps": 3}], ids=str)
def test_a_row_stands_at_a_step_of_the_modules_own_log(trainer: dict[str, Any]) -> None:
    logger = fit_with(BNStatsMonitor(1, 1), max_epochs=4, **trainer)
    own = list(logger.logged("train_loss_step"))
    found = [step for step, _ in rows(logger)]
    assert found[: len(own)] == own and len(set(found)) == len(found)


def test_only_every_nth_batch_is_measured_and_a_window_waits_until_it_is_full() -> None:
    logger = fit_with(BNStatsMonitor(every_n_batches=3, window=2), max_epochs=4)
    assert [step for step, _ in rows(logger)] == [5, 11]


def test_a_short_fit_logs_what_it_has_at_its_end() -> None:
    assert [step for step, _ in rows(fit_with(BNStatsMonitor(2, 100)))] == [7]


def test_a_fit_that_is_too_short_says_so() -> None:
    with pytest.warns(UserWarning, match=r"logged nothing: of 8 batches it measures every 5th.*Lower every_n_batches"):
        fit(TinyNet(), BNStatsMonitor())


class Deep(TinyNet):
    """With as many layers as asked for."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.Identity(), nn.Identity()
        self.norms = nn.Sequential(*(nn.BatchNorm2d(6) for _ in range(layers)))

    def features(self, x: Tensor) -> Tensor:
        return self.norms(self.conv2(self.conv1(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("layers", "options", "keys"),
    [
        (64, {}, 128),
        (65, {}, 0),
        (65, {"log_layers": ["norms.3", "norms.1?"]}, 2 * 11),
        (65, {"layers": "norms.1?"}, 2 * 10),
        (3, {"quantities": ["lag", "noise", "dead", "nonfinite", "var_lag", "var_noise"]}, 6 * 3),
    ],
    ids=str,
)
def test_many_layers_make_few_keys(layers: int, options: dict[str, Any], keys: int) -> None:
    logger = fit_with(BNStatsMonitor(1, 2, **options), module=Deep(layers), max_epochs=1)
    for _, row in rows(logger):
        assert len([key for key in row if key.startswith("bn_") and not key.startswith("bn_agg/")]) == keys


def test_names_are_safe_and_the_worst_layer_is_an_index_into_the_map(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(Deep(3), BNStatsMonitor(1, 2), logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        found = [row for row in csv.DictReader(file) if row.get("bn_agg/worst_layer")]
    names = json.loads((Path(logger.log_dir) / "figures" / "bn_layers.json").read_text())
    assert names["1"] == {"layer": "norms.1", "key": "norms_1"}
    for row in found:
        gaps = {about["layer"]: float(row[f"bn_mean_gap/{about['key']}"]) for about in names.values()}
        assert max(gaps, key=gaps.__getitem__) == names[str(int(float(row["bn_agg/worst_layer"])))]["layer"]


def test_two_monitors_do_not_write_into_each_others_keys() -> None:
    logger = fit_with(BNStatsMonitor(1, 2, layers="bn1"), BNStatsMonitor(1, 2, layers="bn2"))
    assert rows(logger, "bn_bn1_agg/") and rows(logger, "bn_bn2_agg/") and not rows(logger, "bn_agg/")


def test_no_logger_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no logger to log to.*CSVLogger"):
        fit(TinyNet(), BNStatsMonitor(), logger=False)


@pytest.mark.parametrize(
    ("channels", "says"),
    [
        ({}, "channels is empty"),
        ({"bn3": 0}, r"no observed layer 'bn3'. There are: bn1, bn2"),
        ({"bn2": 6}, r"'bn2' has channels 0 to 5.*no 6"),
    ],
)
def test_a_channel_that_is_not_there_is_refused(channels: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit(TinyNet(), BNStatsMonitor(channels=channels))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"every_n_batches": 0}, ValueError),
        ({"window": 1.5}, TypeError),
        ({"quantities": ["drift"]}, ValueError),
        ({"quantities": "lag"}, ValueError),
        ({"alert_above": -1.0}, ValueError),
        ({"log_layers": 3}, TypeError),
    ],
    ids=str,
)
def test_senseless_arguments_are_refused_at_once(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options)) if "log_layers" not in options else "glob pattern"):
        BNStatsMonitor(**options)


@pytest.mark.parametrize("first", ["monitor", "PreciseBN"])
def test_the_way_from_ema_to_precise_is_kept_layer_by_layer_in_any_order(first: str, tmp_path: Path) -> None:
    module, stale = TinyNet(), TinyNet()
    callbacks = [BNStatsMonitor(1, 2), PreciseBNCallback(20)]
    fit(module, callbacks if first == "monitor" else callbacks[::-1], max_epochs=1, logger=CSVLogger(tmp_path))
    fit(stale, max_epochs=1)
    new, old = statistics_of(module), statistics_of(stale)
    for name, row in table(tmp_path).items():
        moved = (new[f"{name}.running_mean"] - old[f"{name}.running_mean"]) / old[f"{name}.running_var"].sqrt()
        assert float(row["EMA to precise, mean gap"]) == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-3)
        assert row["batch statistics"] == "recovered" and (row["momentum"], row["NBS"]) == ("0.1", "8")


@pytest.mark.parametrize("first", ["monitor", "FreezeBN"])
def test_from_the_switch_on_it_shows_the_drift_from_the_frozen_statistics(first: str, tmp_path: Path) -> None:
    monitor, freeze = BNStatsMonitor(1, 4), FreezeBNCallback(start_epoch=1, num_samples=20, warmup_epochs=0)
    module = TinyNet()
    logger = CSVLogger(tmp_path)
    fit(module, [monitor, freeze] if first == "monitor" else [freeze, monitor], logger=logger)
    found = table(tmp_path)
    assert {row["batch statistics"] for row in found.values()} == {"frozen"}
    assert all(row["NBS"] == "nan" and 0 < float(row["mean gap"]) < 5 for row in found.values())
    assert type(module.bn1) is nn.BatchNorm2d


class NanFrom(TinyNet):
    """Sends a NaN through its first layer, once."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 2:
            batch[0][0, 0] = torch.nan
        loss = super().training_step(batch, batch_idx)
        return loss.nan_to_num(0.0) if self.trainer.global_step < 2 else (self.head.weight * 0).sum()


def test_nan_statistics_are_counted_and_named_and_break_nothing(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"2 layers have seen NaN or infinite statistics up to step 3, 'bn1' first"):
        fit(NanFrom(), BNStatsMonitor(1, 2), logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        counted = [
            float(row["bn_agg/nonfinite_layers"]) for row in csv.DictReader(file) if row["bn_agg/nonfinite_layers"]
        ]
    assert counted == [0, 2, 2, 2]


def test_drift_is_said_once_until_it_has_gone() -> None:
    monitor = BNStatsMonitor(1, 1, alert_above=0.05)
    with pytest.warns(
        UserWarning, match=r"BatchNorm statistics drift: At step 0 the EMA of layer 'bn\d' is .* sigma off"
    ):
        fit(TinyNet(), monitor, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(TinyNet(lr=0.0), BNStatsMonitor(1, 1, alert_above=1e-6), max_epochs=4)
    assert len([w for w in caught if "statistics drift" in str(w.message)]) == 1


class Checkpointed(TinyNet):
    """Recomputes its features in the backward."""

    def features(self, x: Tensor) -> Tensor:
        return checkpoint(super().features, x, use_reentrant=False)


class Compiled(TinyNet):
    """Compiled as a whole, or in part, before the fit."""

    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.bn1.momentum = momentum
        self.compiled = torch.compile(super().features, backend="aot_eager")

    def features(self, x: Tensor) -> Tensor:
        return self.compiled(x)


def parameters_after(module: LightningModule, *callbacks: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, list(callbacks), **kwargs)
    return digest(module.state_dict())


@pytest.mark.parametrize(
    "make",
    [Checkpointed, Compiled, lambda: Compiled(momentum=0.0)],
    ids=["checkpointed", "compiled", "compiled, not recoverable"],
)
def test_training_is_bit_for_bit_the_same_however_the_module_runs(make: Any) -> None:
    assert parameters_after(make(), BNStatsMonitor(1, 2)) == parameters_after(make())


def test_it_is_bit_for_bit_the_same_with_layers_that_are_measured_directly() -> None:
    def module() -> TinyNet:
        net = TinyNet(dropout=0.5)
        net.bn1.momentum = 0.0
        net.bn2.eval()
        return net

    logger = InMemory()
    assert parameters_after(module(), BNStatsMonitor(1, 2), logger=logger) == parameters_after(module())
    assert all(value > 0 for value in logger.logged("bn_mean_gap/bn2").values())


# ------------------------------------------------------------------------------------------------------------ loggers
def records(folder: Path) -> list[dict[str, Any]]:
    """Everything an offline W&B run holds, as W&B itself reads it."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    return [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]


def history(folder: Path) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records(folder) if "history" in record]


@pytest.mark.usefixtures("offline")
def test_wandb_gets_scalars_pictures_chart_table_alert_map_and_summary(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, settings=wandb.Settings(console="off", x_disable_stats=True))
    callbacks = [BNStatsMonitor(1, 2, alert_above=0.05), PreciseBNCallback(20)]
    fit(TinyNet(), callbacks, logger=logger, max_epochs=17)
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    wandb.teardown()

    found = history(folder)
    ours = [row for row in found if "bn_agg/mean_gap_max" in row]
    assert len(ours) == 34, "a row for every window of two batches"
    own = {row["trainer/global_step"] for row in found if "train_loss_step" in row}
    assert {row["trainer/global_step"] for row in ours} <= own
    for row in ours:
        assert {key for key in row if key.startswith("bn_agg/")} == {f"bn_agg/{name}" for name in AGGREGATES}
        assert row["bn_agg/mean_gap_max"] == max(row["bn_mean_gap/bn1"], row["bn_mean_gap/bn2"])
    for picture in ("heatmap", "channels", "lag_noise"):
        steps = [row["trainer/global_step"] for row in found if any(k.startswith(f"bn/{picture}") for k in row)]
        assert steps == [63, 67], "after 32 rows and at the end"
        assert len(list(folder.glob(f"files/media/images/bn/{picture}_*.png"))) == 2
    assert len(list(folder.glob("files/media/images/bn/*.png"))) <= 50
    assert len(list(folder.glob("files/media/table/**/*.json"))) == 2, "the layers, and the lines of the chart"

    text = json.dumps(records(folder))
    assert "bn_layers" in text and "BatchNorm statistics drift" in text and "bn/all_layers_table" in text
    inspected = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", str(folder)]
    summary = subprocess.check_output(inspected, text=True)
    largest = max(row["bn_agg/mean_gap_max"] for row in ours)
    assert (
        f"bn_agg/mean_gap_max.max                     {largest:.6f}"[:50] in summary or f"{largest:.6f}"[:7] in summary
    )


def test_every_logger_gets_scalars_pictures_and_table(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    fit(TinyNet(), BNStatsMonitor(1, 2), logger=loggers)
    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert [e.step for e in events.Scalars("bn_agg/mean_gap_max")] == [1, 3, 5, 7]
    pictures = ["bn/channels", "bn/heatmap", "bn/lag_noise", "bn/overview"]
    assert sorted(events.Tags()["images"]) == pictures
    files = Path(loggers[0].log_dir).rglob("*.png")
    assert sorted(f"bn/{file.stem.removesuffix('-7')}" for file in files) == pictures
    assert set(table(tmp_path / "csv")) == {"bn1", "bn2"}
    assert "bn/layers/text_summary" in events.Tags()["tensors"]


# -------------------------------------------------------------------------------------------------------------- ranks
def fit_on_rank(world_size: int) -> dict[str, Any]:
    truth, logger, module = TruthOfBatches(), InMemory(), TinyNet()
    callbacks = [BNStatsMonitor(1, 1), truth]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, callbacks, train_loader(32, 4), logger=logger, devices=world_size, strategy="ddp")
    without = TinyNet()
    fit(without, [], train_loader(32, 4), devices=world_size, strategy="ddp")
    same = digest(module.state_dict()) == digest(without.state_dict())
    return {"logged": logger.logged("bn_mean_gap/bn1"), "true": truth.gaps["bn1"], "same": same}


@pytest.mark.ddp
def test_with_several_ranks_it_is_what_rank_0_saw_and_nobody_notices() -> None:
    first, second = run_on_ranks(fit_on_rank, 2, 2)
    assert list(first["logged"].values()) == pytest.approx(first["true"], rel=1e-4) and len(first["true"]) == 8
    assert not second["logged"]
    assert first["same"] and second["same"]


def test_the_registered_layers_are_found_by_name() -> None:
    """The oracle above knows the layers by the names that the monitor logs."""
    assert list(find_bn(TinyNet())) == ["bn1", "bn2"]
