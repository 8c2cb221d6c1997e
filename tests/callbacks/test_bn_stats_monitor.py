"""BNStatsMonitor logs the right values, in time, under safe names; read back from the loggers' own files."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn

from lightning_bn import BNStatsMonitor, FreezeBNCallback, PassConfig, PreciseBNCallback
from tests.callbacks import zoo
from tests.callbacks.zoo import InMemory, TinyNet, digest, fit, raising, said, statistics_of, train_loader
from tests.ranks import run_on_ranks
from tests.truth import recorded, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:.*")

AGGREGATES = {
    *("mean_gap_p50", "mean_gap_p95", "mean_gap_max", "worst_layer", "var_gap_p95", "var_gap_max"),
    *("lag_max", "noise_max", "dead_channels", "nonfinite_layers"),
}


def fit_with(monitor: BNStatsMonitor, *others: Any, module: LightningModule | None = None, **kwargs: Any) -> InMemory:
    return fit(module or TinyNet(), [monitor, *others], **kwargs).logger


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


@pytest.mark.parametrize("trainer", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_the_gap_is_that_of_every_batch_from_the_ema_before_it(trainer: dict[str, Any]) -> None:
    truth = TruthOfBatches()
    logger = fit_with(BNStatsMonitor(1, window=1), truth, **trainer)
    together = trainer.get("accumulate_grad_batches", 1)
    for name, gaps in truth.gaps.items():
        windows = torch.tensor(gaps).view(-1, together).square().mean(1).sqrt()
        logged = list(logger.logged(f"bn_mean_gap/{name}").values())
        assert logged == pytest.approx(windows.tolist(), rel=2e-3 if "precision" in trainer else 1e-4)


@pytest.mark.parametrize("trainer", [{"accumulate_grad_batches": 2}, {"log_every_n_steps": 3}])
def test_a_row_of_all_keys_is_logged_at_a_step_of_the_modules_own_log(trainer: dict[str, Any]) -> None:
    logger = fit_with(BNStatsMonitor(1, window=1), max_epochs=4, **trainer)
    own, found = list(logger.logged("train_loss_step")), [step for step, _ in rows(logger)]
    assert found[: len(own)] == own and len(set(found)) == len(found)
    per_layer = {f"bn_{gap}/{bn}" for gap in ("mean_gap", "var_gap") for bn in ("bn1", "bn2")}
    for _, row in rows(logger):
        assert set(row) - {"epoch"} == {f"bn_agg/{name}" for name in AGGREGATES} | per_layer
    assert len(AGGREGATES) <= 10


def test_every_nth_batch_is_measured_a_window_waits_until_it_is_full_and_the_end_logs_the_rest() -> None:
    logger = fit_with(BNStatsMonitor(every_n_batches=3, window=2), max_epochs=4)
    assert [step for step, _ in rows(logger)] == [5, 11]
    assert [step for step, _ in rows(fit_with(BNStatsMonitor(2, window=100)))] == [7]
    with pytest.warns(UserWarning, match="logged nothing: of 8 batches it measures one in 5.*Lower every_n_batches"):
        fit(TinyNet(), BNStatsMonitor())


OTHERS = ["lag", "noise", "dead", "nonfinite", "var_lag", "var_noise"]


class Deep(TinyNet):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.Identity(), nn.Identity()
        self.norms = nn.Sequential(*(nn.BatchNorm2d(6) for _ in range(layers)))

    def features(self, x: Tensor) -> Tensor:
        return self.norms(self.conv2(self.conv1(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("layers", "options", "keys"),
    [(64, {}, 128), (65, {}, 0), (65, {"log_layers": ["norms.3", "norms.1?"]}, 22), (3, {"quantities": OTHERS}, 18)],
)
def test_many_layers_make_few_keys(layers: int, options: dict[str, Any], keys: int) -> None:
    ((_, row),) = rows(fit_with(BNStatsMonitor(1, window=4, **options), module=Deep(layers), max_epochs=1))
    assert len([key for key in row if key.startswith("bn_") and not key.startswith("bn_agg/")]) == keys


def test_names_are_safe_and_the_worst_layer_is_an_index_into_the_map(tmp_path: Path) -> None:
    memory, logger = InMemory(), CSVLogger(tmp_path)
    fit(Deep(3), BNStatsMonitor(1, window=2), logger=[logger, memory])
    names = json.loads((Path(logger.log_dir) / "figures" / "bn_layers.json").read_text())
    assert names["1"] == {"layer": "norms.1", "key": "norms_1"}
    for _, row in rows(memory):
        gaps = {about["layer"]: row[f"bn_mean_gap/{about['key']}"] for about in names.values()}
        assert max(gaps, key=gaps.__getitem__) == names[str(int(row["bn_agg/worst_layer"]))]["layer"]


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({}, {"logger": False}, r"no logger to log to.*CSVLogger"),
        ({"trace_channels": {"bn3": 0}}, {}, "no observed layer 'bn3'. There are: bn1, bn2"),
        ({"trace_channels": {"bn2": 6}}, {}, "0 to 5.*no 6"),
    ],
)
def test_what_cannot_be_logged_is_refused(options: Any, trainer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(TinyNet(), BNStatsMonitor(**options), **trainer)


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
    freeze = FreezeBNCallback(start_epoch=1, precise=PassConfig(20), warmup_epochs=0)
    fit(TinyNet(), [BNStatsMonitor(1, window=4), freeze], logger=CSVLogger(tmp_path))
    for row in table(tmp_path).values():
        assert row["batch statistics"] == "frozen" and row["NBS"] == "nan" and 0 < float(row["mean gap"]) < 5


class NanFrom(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 2:
            batch[0][0, 0] = torch.nan
        loss = super().training_step(batch, batch_idx)
        return loss.nan_to_num(0.0) if self.trainer.global_step < 2 else (self.head.weight * 0).sum()


def test_nan_statistics_are_counted_and_named_and_break_nothing() -> None:
    with pytest.warns(UserWarning, match=r"2 layers have seen NaN or infinite statistics up to step 3, 'bn1' first"):
        logger = fit_with(BNStatsMonitor(1, window=2), module=NanFrom())
    assert list(logger.logged("bn_agg/nonfinite_layers").values()) == [0, 2, 2, 2]


def advice(*others: Any, module: Any = None) -> str:
    callbacks = [*others, BNStatsMonitor(1, window=1, alert_threshold=0.05)]
    found = said("statistics drift", module or TinyNet(), callbacks, max_epochs=1)
    assert re.search(r"drift: At step \d the (EMA|frozen statistics) of layer 'bn\d' is .* sigma off", found[0])
    (advised,) = {s.partition("off its batches. ")[2] for s in found}
    return advised


def test_drift_is_said_once_until_it_has_gone_and_no_callback_is_advised_that_is_there() -> None:
    monitor = BNStatsMonitor(1, window=1, alert_threshold=1e-6)
    assert len(said("statistics drift", TinyNet(lr=0.0), monitor, max_epochs=4)) == 1
    assert advice() == "Evaluation uses the EMA: PreciseBNCallback recomputes it."

    class Own(PreciseBNCallback):
        pass

    frozen = FreezeBNCallback(start_epoch=0, statistics="ema", warmup_epochs=0)
    assert advice(frozen) == "The data have moved."
    for there in (PreciseBNCallback(20), Own(20, layers=["bn1", "bn2"])):
        assert "uses the EMA" not in advice(there)
    stays = TinyNet()
    stays.bn2.momentum = 0.5  # so that it is the other that drifts
    assert advice(PreciseBNCallback(20, layers="bn2"), module=stays) == advice()


class Refuses(InMemory):
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(key.startswith("bn_") for key in metrics):
            raise OSError("disk full")
        super().log_metrics(metrics, step)


class LosesItsStatistics(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.kept, self.bn1.running_mean = self.bn1.running_mean, None
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.bn1.running_mean = self.kept


ALARMED = {"alert_threshold": 1e-6}
MEETS: dict[str, tuple[Any, dict[str, Any], Any, str, str]] = {
    "count raises": (
        TinyNet,
        {"batch_size_fn": raising(KeyError("x"))},
        InMemory,
        "",
        "samples of a batch: .*KeyError",
    ),
    "count gives no number": (TinyNet, {"batch_size_fn": str}, InMemory, "", "batch_size_fn must return a batch's"),
    "a logger that raises": (TinyNet, {}, Refuses, "", "could not log: OSError: disk full"),
    "a layer that cannot be read": (LosesItsStatistics, {}, InMemory, "", "cannot measure a batch: "),
    "names that cannot be logged": (TinyNet, ALARMED, InMemory, "log_layer_names", "could not .*: OSError: disk full"),
    "figures that fail": (TinyNet, ALARMED, CSVLogger, "pictures_of", "could not .*: OSError: disk full"),
    "an alert that fails": (TinyNet, ALARMED, InMemory, "alert", "could not .*: OSError: disk full"),
}


@pytest.mark.parametrize(("make", "options", "logger", "where", "message"), MEETS.values(), ids=MEETS)
def test_what_it_meets_in_a_fit_is_said_once_and_changes_nothing(
    make: Any, options: Any, logger: Any, where: str, message: str, monkeypatch: Any, tmp_path: Path
) -> None:
    if where:
        monkeypatch.setattr(f"lightning_bn.plots.{where}", raising(OSError("disk full")))
    module, plain, options = make(), make(), {"alert_threshold": None, **options}
    loggers = logger(tmp_path) if logger is CSVLogger else logger()
    found = said("BNStatsMonitor", module, BNStatsMonitor(1, window=1, **options), logger=loggers)
    assert len([s for s in found if re.search(message, s)]) == 1
    fit(plain)
    assert digest(module.state_dict()) == digest(plain.state_dict())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("full")])
def test_what_is_not_ours_to_swallow_passes_and_leaves_nothing(error: BaseException) -> None:
    module = TinyNet()
    module.bn1.momentum = 0.0  # observed directly
    with pytest.raises(BaseException) as caught:
        fit(module, BNStatsMonitor(1, window=1, batch_size_fn=raising(error)))
    assert caught.value is error or isinstance(error, KeyboardInterrupt)  # which Lightning makes an exit of
    assert type(module.bn1) is nn.BatchNorm2d


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


def test_other_channels_or_layers_after_a_resume_begin_a_record_of_their_own(tmp_path: Path) -> None:
    trainer = fit(TinyNet(), BNStatsMonitor(1, window=2, trace_channels={"bn1": 0}), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    monitor = BNStatsMonitor(1, window=2, trace_channels={"bn2": 3})
    fit(TinyNet(), monitor, ckpt_path=tmp_path / "first.ckpt")
    assert monitor._record is not None
    assert monitor._record.history.steps[0] == 1 and monitor._record.traces.steps[0] == 4
    wider, monitor = zoo.Wider(), BNStatsMonitor(1, window=2)
    wider.strict_loading = False
    with pytest.warns(UserWarning, match="begins a new record: The checkpoint's record is one of other layers"):
        fit(wider, monitor, ckpt_path=tmp_path / "first.ckpt")
    assert monitor._record is not None and monitor._record.history.steps[0] == 5


class Named(TinyNet):
    """Has layers of the names ``norms.<first>`` and ``second``."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.norms, self.second = nn.ModuleDict({first: self.bn1}), second
        self.add_module(second, self.bn2)
        del self.bn1, self.bn2

    def features(self, x: Tensor) -> Tensor:
        (first,) = self.norms.values()
        return self.get_submodule(self.second)(self.conv2(first(self.conv1(x)))).mean((2, 3))


def test_a_broken_off_run_has_its_pictures_and_odd_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    class Broken(Named):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 5:
                raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        fit(Broken("$x_$", "bn"), BNStatsMonitor(1, window=2), logger=CSVLogger(tmp_path))
    assert len(list(tmp_path.rglob("*.png"))) == 4


def test_monitors_of_layers_whose_names_are_alike_have_keys_of_their_own() -> None:
    monitors = [BNStatsMonitor(1, window=2, layers=name) for name in ("norms.a", "norms_a")]
    logger = fit_with(*monitors, module=Named("a", "norms_a"))
    assert len(rows(logger, "bn_norms_a_agg/")) == len(rows(logger, "bn_norms_a_1_agg/")) == 4


def test_pictures_are_logged_after_32_rows_and_at_the_end(tmp_path: Path) -> None:
    fit(TinyNet(), BNStatsMonitor(1, window=1), logger=CSVLogger(tmp_path), max_epochs=9)
    pictures = [f"{name}-{step}" for name in ("channels", "heatmap", "lag_noise") for step in (31, 35)]
    assert {path.stem for path in tmp_path.rglob("*.png")} == {*pictures, "overview-35"}


@pytest.mark.usefixtures("offline")
def test_wandb_gets_scalars_alert_map_and_summary(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, settings=wandb.Settings(console="off", x_disable_stats=True))
    fit(TinyNet(), [BNStatsMonitor(1, window=1, alert_threshold=0.05), PreciseBNCallback(20)], logger=logger)
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    wandb.teardown()
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect"]
    read, summary = (subprocess.check_output([*inspect, f"--{h}", folder], text=True) for h in ("json", "summary"))
    everything = [json.loads(line) for line in read.splitlines()]
    found = [record["history"]["item"] for record in everything if "history" in record]
    ours = [row for row in found if "bn_agg/mean_gap_max" in row]
    own = {row["trainer/global_step"] for row in found if "train_loss_step" in row}
    assert len(ours) == 8 and {row["trainer/global_step"] for row in ours} <= own
    for row in ours:
        assert {key for key in row if key.startswith("bn_agg/")} == {f"bn_agg/{name}" for name in AGGREGATES}
        assert row["bn_agg/mean_gap_max"] == max(row["bn_mean_gap/bn1"], row["bn_mean_gap/bn2"])
    assert "bn_layers" in read and "BatchNorm statistics drift" in read and "bn/all_layers_table" in read
    shown = re.search(r"bn_agg/mean_gap_max\.max\s+([\d.]+)", summary)
    assert shown and float(shown[1]) == pytest.approx(max(row["bn_agg/mean_gap_max"] for row in ours), rel=1e-3)


def fit_on_rank() -> tuple[Any, ...]:
    truth, module, without = TruthOfBatches(), TinyNet(), TinyNet()
    options = {"train": train_loader(32, 4), "devices": 2, "strategy": "ddp"}
    logged = fit_with(BNStatsMonitor(1, window=1), truth, module=module, **options).logged("bn_mean_gap/bn1")
    fit(without, **options)
    return [*logged.values()], truth.gaps["bn1"], digest(module.state_dict()) == digest(without.state_dict())


@pytest.mark.ddp
def test_with_several_ranks_it_is_what_rank_0_saw_and_no_rank_trains_differently() -> None:
    (logged, true, same), (logged_by_1, _, same_on_1) = run_on_ranks(fit_on_rank, 2)
    assert logged == pytest.approx(true, rel=1e-4) and len(true) == 8
    assert not logged_by_1 and same and same_on_1
