"""BNStatsMonitor logs the right values, in time, under safe names; read back from the loggers' own files."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import ConcatDataset, DataLoader

from lightning_bn import BatchLeakageMonitor, BNStatsMonitor, FreezeBNCallback, PassConfig, PreciseBNCallback
from tests.callbacks.zoo import Images, InMemory, TinyNet, digest, fit, statistics_of, train_loader
from tests.ranks import run_on_ranks
from tests.truth import recorded, rows_of

AGGREGATES = {
    *("mean_gap_p50", "mean_gap_p95", "mean_gap_max", "worst_layer", "var_gap_p95", "var_gap_max"),
    *("lag_max", "noise_max", "dead_channels", "nonfinite_layers"),
}


def fit_with(monitor: BNStatsMonitor, *others: Any, module: LightningModule | None = None, **kwargs: Any) -> InMemory:
    logger = InMemory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module or TinyNet(), [monitor, *others], logger=logger, **kwargs)
    return logger


def rows(logger: InMemory, prefix: str = "bn_agg/") -> list[tuple[int, dict[str, float]]]:
    return [(step, row) for step, row in logger.rows if any(key.startswith(prefix) for key in row)]


def table(folder: Path) -> dict[str, dict[str, str]]:
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
    logger = fit_with(BNStatsMonitor(1, window=1), truth, **trainer)
    together = trainer.get("accumulate_grad_batches", 1)
    for name, gaps in truth.gaps.items():
        windows = torch.tensor(gaps).view(-1, together).square().mean(1).sqrt()
        logged = list(logger.logged(f"bn_mean_gap/{name}").values())
        assert logged == pytest.approx(windows.tolist(), rel=2e-3 if "precision" in trainer else 1e-4)


def test_each_row_holds_all_keys_always_the_same_and_few_enough() -> None:
    logger = fit_with(BNStatsMonitor(1, window=2), max_epochs=4)
    found = rows(logger)
    assert len(found) == 8
    per_layer = {f"bn_{gap}/{bn}" for gap in ("mean_gap", "var_gap") for bn in ("bn1", "bn2")}
    for _, row in found:
        assert set(row) - {"epoch"} == {f"bn_agg/{name}" for name in AGGREGATES} | per_layer
    assert len(AGGREGATES) <= 10


@pytest.mark.parametrize("trainer", [{"accumulate_grad_batches": 2}, {"log_every_n_steps": 3}], ids=str)
def test_a_row_is_logged_at_a_step_of_the_modules_own_log(trainer: dict[str, Any]) -> None:
    logger = fit_with(BNStatsMonitor(1, window=1), max_epochs=4, **trainer)
    own = list(logger.logged("train_loss_step"))
    found = [step for step, _ in rows(logger)]
    assert found[: len(own)] == own and len(set(found)) == len(found)


def test_every_nth_batch_is_measured_a_window_waits_until_it_is_full_and_the_end_logs_the_rest() -> None:
    logger = fit_with(BNStatsMonitor(every_n_batches=3, window=2), max_epochs=4)
    assert [step for step, _ in rows(logger)] == [5, 11]
    assert [step for step, _ in rows(fit_with(BNStatsMonitor(2, window=100)))] == [7]
    with pytest.warns(UserWarning, match="logged nothing: of 8 batches it measures one in 5.*Lower every_n_batches"):
        fit(TinyNet(), BNStatsMonitor())


class Deep(TinyNet):
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
        (3, {"quantities": ["lag", "noise", "dead", "nonfinite", "var_lag", "var_noise"]}, 6 * 3),
    ],
    ids=str,
)
def test_many_layers_make_few_keys(layers: int, options: dict[str, Any], keys: int) -> None:
    logger = fit_with(BNStatsMonitor(1, window=2, **options), module=Deep(layers), max_epochs=1)
    for _, row in rows(logger):
        assert len([key for key in row if key.startswith("bn_") and not key.startswith("bn_agg/")]) == keys


def test_names_are_safe_and_the_worst_layer_is_an_index_into_the_map(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(Deep(3), BNStatsMonitor(1, window=2), logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        found = [row for row in csv.DictReader(file) if row.get("bn_agg/worst_layer")]
    names = json.loads((Path(logger.log_dir) / "figures" / "bn_layers.json").read_text())
    assert names["1"] == {"layer": "norms.1", "key": "norms_1"}
    for row in found:
        gaps = {about["layer"]: float(row[f"bn_mean_gap/{about['key']}"]) for about in names.values()}
        assert max(gaps, key=gaps.__getitem__) == names[str(int(float(row["bn_agg/worst_layer"])))]["layer"]


def test_no_logger_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no logger to log to.*CSVLogger"):
        fit(TinyNet(), BNStatsMonitor(), logger=False)


def test_a_channel_that_is_not_there_is_refused() -> None:
    for channels, message in (
        ({"bn3": 0}, "no observed layer 'bn3'. There are: bn1, bn2"),
        ({"bn2": 6}, "0 to 5.*no 6"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(TinyNet(), BNStatsMonitor(trace_channels=channels))


@pytest.mark.parametrize("first", ["monitor", "PreciseBN"])
def test_the_way_from_ema_to_precise_is_kept_layer_by_layer_in_any_order(first: str, tmp_path: Path) -> None:
    module, stale = TinyNet(), TinyNet()
    callbacks = [BNStatsMonitor(1, window=2), PreciseBNCallback(20)]
    fit(module, callbacks if first == "monitor" else callbacks[::-1], max_epochs=1, logger=CSVLogger(tmp_path))
    fit(stale, max_epochs=1)
    new, old = statistics_of(module), statistics_of(stale)
    for name, row in table(tmp_path).items():
        moved = (new[f"{name}.running_mean"] - old[f"{name}.running_mean"]) / old[f"{name}.running_var"].sqrt()
        assert float(row["EMA to precise, mean gap"]) == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-3)
        assert row["batch statistics"] == "recovered" and (row["momentum"], row["NBS"]) == ("0.1", "8")


def test_from_the_switch_on_it_shows_the_drift_from_the_frozen_statistics(tmp_path: Path) -> None:
    monitor, freeze = (
        BNStatsMonitor(1, window=4),
        FreezeBNCallback(start_epoch=1, precise=PassConfig(20), warmup_epochs=0),
    )
    module = TinyNet()
    fit(module, [monitor, freeze], logger=CSVLogger(tmp_path))
    found = table(tmp_path)
    assert {row["batch statistics"] for row in found.values()} == {"frozen"}
    assert all(row["NBS"] == "nan" and 0 < float(row["mean gap"]) < 5 for row in found.values())
    assert type(module.bn1) is nn.BatchNorm2d


class NanFrom(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 2:
            batch[0][0, 0] = torch.nan
        loss = super().training_step(batch, batch_idx)
        return loss.nan_to_num(0.0) if self.trainer.global_step < 2 else (self.head.weight * 0).sum()


def test_nan_statistics_are_counted_and_named_and_break_nothing() -> None:
    logger = InMemory()
    with pytest.warns(UserWarning, match=r"2 layers have seen NaN or infinite statistics up to step 3, 'bn1' first"):
        fit(NanFrom(), BNStatsMonitor(1, window=2), logger=logger)
    assert list(logger.logged("bn_agg/nonfinite_layers").values()) == [0, 2, 2, 2]


def test_drift_is_said_once_until_it_has_gone() -> None:
    monitor = BNStatsMonitor(1, window=1, alert_threshold=0.05)
    with pytest.warns(
        UserWarning, match=r"BatchNorm statistics drift: At step 0 the EMA of layer 'bn\d' is .* sigma off"
    ):
        fit(TinyNet(), monitor, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(TinyNet(lr=0.0), BNStatsMonitor(1, window=1, alert_threshold=1e-6), max_epochs=4)
    assert len([w for w in caught if "statistics drift" in str(w.message)]) == 1


def advice(*others: Any, alert_threshold: float = 0.05, module: Any = None) -> str:
    monitor = BNStatsMonitor(1, window=1, alert_threshold=alert_threshold)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module or TinyNet(), [*others, monitor], max_epochs=1)
    (said,) = {str(w.message).partition("off its batches. ")[2] for w in caught if "drift" in str(w.message)}
    return said


def test_it_advises_no_callback_that_acts_on_the_layer_already() -> None:
    assert advice() == "Evaluation uses the EMA: PreciseBNCallback recomputes it."
    assert "uses the EMA" not in advice(PreciseBNCallback(20))

    class Own(PreciseBNCallback):
        pass

    assert "uses the EMA" not in advice(Own(20, layers=["bn1", "bn2"]))
    stays = TinyNet()
    stays.bn2.momentum = 0.5  # so that it is the other that drifts
    assert advice(PreciseBNCallback(20, layers="bn2"), module=stays) == advice()


# ------------------------------------------------------------------------------------------------------- ends no fit
def raising(error: Any) -> Any:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


class Refuses(InMemory):
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(key.startswith("bn_") for key in metrics):
            raise OSError("disk full")
        super().log_metrics(metrics, step)


MEETS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "count raises": (
        {"batch_size_fn": raising(KeyError("size"))},
        InMemory,
        "cannot count the samples of a batch: KeyErr",
    ),
    "count gives no number": (
        {"batch_size_fn": str},
        InMemory,
        "batch_size_fn must return a batch's number of samples",
    ),
    "a logger that raises": ({}, Refuses, "could not log: OSError: disk full"),
}


@pytest.mark.parametrize(("options", "logger", "message"), MEETS.values(), ids=MEETS)
def test_what_it_meets_in_a_fit_is_said_once_and_changes_nothing(options: Any, logger: Any, message: str) -> None:
    module, plain = TinyNet(), TinyNet()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, BNStatsMonitor(1, window=1, alert_threshold=None, **options), logger=logger())
    said = [str(w.message) for w in caught if "BNStatsMonitor" in str(w.message)]
    assert trainer.global_step == 8 and len(said) == 1 and message in said[0]
    fit(plain)
    assert digest(module.state_dict()) == digest(plain.state_dict())


@pytest.mark.parametrize("where", ["log_layer_names", "pictures_of", "alert"])
def test_an_error_in_a_logger_or_a_figure_is_a_warning(where: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(f"lightning_bn.plots.{where}", raising(OSError("disk full")))
    logger = CSVLogger(tmp_path) if where == "pictures_of" else InMemory()
    with pytest.warns(UserWarning, match="BNStatsMonitor could not .*: OSError: disk full"):
        trainer = fit(TinyNet(), BNStatsMonitor(1, window=1, alert_threshold=1e-6), logger=logger)
    assert trainer.global_step == 8


def test_a_layer_that_cannot_be_read_for_a_while_ends_no_fit() -> None:
    class LosesItsStatistics(TinyNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.kept, self.bn1.running_mean = self.bn1.running_mean, None
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            self.bn1.running_mean = self.kept

    with pytest.warns(UserWarning, match="BNStatsMonitor cannot measure a batch: "):
        trainer = fit(LosesItsStatistics(), BNStatsMonitor(1, window=1))
    assert trainer.global_step == 8


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("full")])
def test_what_is_not_ours_to_swallow_passes_and_leaves_nothing(error: BaseException) -> None:
    module = TinyNet()
    module.bn1.momentum = 0.0  # observed directly
    with pytest.raises(BaseException) as caught:
        fit(module, BNStatsMonitor(1, window=1, batch_size_fn=raising(error)))
    assert caught.value is error or isinstance(error, KeyboardInterrupt)  # which Lightning makes an exit of
    assert type(module.bn1) is nn.BatchNorm2d


class Checkpointed(TinyNet):
    def features(self, x: Tensor) -> Tensor:
        return checkpoint(super().features, x, use_reentrant=False)


class Compiled(TinyNet):
    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.bn1.momentum = momentum
        self.compiled = torch.compile(super().features, backend="aot_eager")

    def features(self, x: Tensor) -> Tensor:
        return self.compiled(x)


class MeasuredDirectly(TinyNet):
    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.bn1.momentum = 0.0

    def on_train_epoch_start(self) -> None:
        self.bn2.eval()


def parameters_after(module: LightningModule, *callbacks: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, list(callbacks), **kwargs)
    return digest(module.state_dict())


@pytest.mark.parametrize(
    "make",
    [Checkpointed, lambda: Compiled(momentum=0.0), MeasuredDirectly],
    ids=["checkpointed", "compiled", "measured directly"],
)
def test_training_is_bit_for_bit_the_same_however_the_module_runs(make: Any) -> None:
    assert parameters_after(make(), BNStatsMonitor(1, window=2)) == parameters_after(make())


class Skips(TinyNet):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if (self.trainer.current_epoch, batch_idx) == (0, 3) else None

    def on_validation_start(self) -> None:
        assert type(self.bn1) is nn.BatchNorm2d


def test_a_skipped_batch_is_not_measured_across_what_comes_after() -> None:
    module = Skips()
    module.bn1.momentum = 0.0
    logger = fit_with(BNStatsMonitor(1, window=1), PreciseBNCallback(20), module=module)
    values = [*logger.logged("bn_mean_gap/bn1").values(), *logger.logged("bn_mean_gap/bn2").values()]
    assert len(values) == 2 * 7 and all(value == value for value in values)


def resumed_with(tmp_path: Path, first: TinyNet, second: TinyNet, options: dict[str, Any]) -> BNStatsMonitor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(first, BNStatsMonitor(1, window=2, trace_channels={"bn1": 0}), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    monitor = BNStatsMonitor(1, window=2, **options)
    second.strict_loading = False
    fit(second, monitor, ckpt_path=tmp_path / "first.ckpt")
    return monitor


def fit_saving_at_the_ends_of_epochs(monitor: BNStatsMonitor, folder: Path, val: Any, ckpt_path: Any = None) -> Any:
    """Three epochs of four equal batches; checkpoints come before validation and the epoch's end."""
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    loader, module = DataLoader(ConcatDataset([Images(8)] * 4), 8), TinyNet()
    options = {"enable_checkpointing": True, "max_epochs": 3, "ckpt_path": ckpt_path}
    fit(module, [monitor, checkpoints], loader, val, **options)
    return digest(monitor.state_dict()), digest(module.state_dict())


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(("windows", "val"), [((2, 2), "default"), ((3, 1), None), ((1, 3), None)], ids=str)
def test_resumed_at_an_epochs_last_step_it_ends_with_the_same_record(windows: Any, val: Any, tmp_path: Path) -> None:
    whole = fit_saving_at_the_ends_of_epochs(BNStatsMonitor(windows[0], window=windows[1]), tmp_path, val)
    resumed = BNStatsMonitor(windows[0], window=windows[1])
    assert fit_saving_at_the_ends_of_epochs(resumed, tmp_path / "resumed", val, tmp_path / "step=4.ckpt") == whole


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    "make", [lambda: BNStatsMonitor(1, window=2, alert_threshold=0.01), lambda: BatchLeakageMonitor(24)]
)
def test_one_over_two_fits_of_two_models_is_two(make: Any) -> None:
    def said_and_state(monitor: Any, module: LightningModule) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(module, monitor, train_loader(64, 16), max_epochs=2)
        return [str(w.message) for w in caught], digest(monitor.state_dict())

    one, models = make(), (Wider, lambda: Deep(3))
    assert [said_and_state(one, m()) for m in models] == [said_and_state(make(), m()) for m in models]


@pytest.mark.filterwarnings("ignore:.*")
def test_other_channels_after_a_resume_begin_a_trace_of_their_own(tmp_path: Path) -> None:
    monitor = resumed_with(tmp_path, TinyNet(), TinyNet(), {"trace_channels": {"bn2": 3}})
    assert monitor._record is not None
    assert monitor._record.history.steps[0] == 1 and monitor._record.traces.steps[0] == 4


class Wider(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.BatchNorm2d(6)

    def features(self, x: Tensor) -> Tensor:
        return self.extra(self.bn2(self.conv2(self.bn1(self.conv1(x))))).mean((2, 3))


def test_a_record_of_other_layers_is_not_taken_up(tmp_path: Path) -> None:
    class WithoutOptimizer(Wider):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["optimizer_states"] = []

    with pytest.warns(UserWarning, match="begins a new record: The checkpoint's record is one of other layers"):
        monitor = resumed_with(tmp_path, TinyNet(), WithoutOptimizer(), {})
    assert monitor._record is not None and monitor._record.history.steps[0] == 5


class Named(TinyNet):
    """Has a layer whose name reads as mathematics."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"$x_$": self.bn1})
        del self.bn1

    def features(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.norms["$x_$"](self.conv1(x)))).mean((2, 3))


def test_a_broken_off_run_has_its_pictures_and_odd_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    class Broken(Named):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 5:
                raise RuntimeError("broken off")

    logger = CSVLogger(tmp_path)
    with pytest.raises(RuntimeError, match="broken off"):
        fit(Broken(), BNStatsMonitor(1, window=2), logger=logger)
    assert len(list(Path(logger.log_dir).rglob("*.png"))) == 4


def test_monitors_of_layers_whose_names_are_alike_have_keys_of_their_own() -> None:
    class Alike(Named):
        def __init__(self) -> None:
            super().__init__()
            self.norms, self.norms_a = nn.ModuleDict({"a": self.norms["$x_$"]}), self.bn2
            del self.bn2

        def features(self, x: Tensor) -> Tensor:
            return self.norms_a(self.conv2(self.norms["a"](self.conv1(x)))).mean((2, 3))

    monitors = [BNStatsMonitor(1, window=2, layers="norms.a"), BNStatsMonitor(1, window=2, layers="norms_a")]
    logger = fit_with(*monitors, module=Alike())
    assert len(rows(logger, "bn_norms_a_agg/")) == len(rows(logger, "bn_norms_a_1_agg/")) == 4


# ------------------------------------------------------------------------------------------------------------ loggers
def records(folder: Path) -> list[dict[str, Any]]:
    """The records of an offline W&B run, as W&B itself reads them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    return [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]


@pytest.mark.usefixtures("offline")
def test_wandb_gets_scalars_pictures_chart_table_alert_map_and_summary(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, settings=wandb.Settings(console="off", x_disable_stats=True))
    callbacks = [BNStatsMonitor(1, window=1, alert_threshold=0.05), PreciseBNCallback(20)]
    fit(TinyNet(), callbacks, logger=logger, max_epochs=9)
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    wandb.teardown()

    everything = records(folder)
    found = [record["history"]["item"] for record in everything if "history" in record]
    ours = [row for row in found if "bn_agg/mean_gap_max" in row]
    assert len(ours) == 36
    own = {row["trainer/global_step"] for row in found if "train_loss_step" in row}
    assert {row["trainer/global_step"] for row in ours} <= own
    for row in ours:
        assert {key for key in row if key.startswith("bn_agg/")} == {f"bn_agg/{name}" for name in AGGREGATES}
        assert row["bn_agg/mean_gap_max"] == max(row["bn_mean_gap/bn1"], row["bn_mean_gap/bn2"])
    for picture in ("heatmap", "channels", "lag_noise"):
        steps = [row["trainer/global_step"] for row in found if any(k.startswith(f"bn/{picture}") for k in row)]
        assert steps == [31, 35], "after 32 rows and at the end"
        assert len(list(folder.glob(f"files/media/images/bn/{picture}_*.png"))) == 2
    assert len(list(folder.glob("files/media/images/bn/*.png"))) <= 50
    assert len(list(folder.glob("files/media/table/**/*.json"))) == 2, "the layers, and the lines of the chart"

    text = json.dumps(everything)
    assert "bn_layers" in text and "BatchNorm statistics drift" in text and "bn/all_layers_table" in text
    inspected = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", str(folder)]
    summary = subprocess.check_output(inspected, text=True)
    largest = max(row["bn_agg/mean_gap_max"] for row in ours)
    shown = re.search(r"bn_agg/mean_gap_max\.max\s+([\d.]+)", summary)
    assert shown and float(shown[1]) == pytest.approx(largest, rel=1e-3)


def test_every_logger_gets_scalars_pictures_and_table(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    fit(TinyNet(), BNStatsMonitor(1, window=2), logger=loggers)
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
    callbacks = [BNStatsMonitor(1, window=1), truth]
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
