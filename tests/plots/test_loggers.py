"""Every logger gets figures, names, tables, charts and alerts in the place where it shows them."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_bn import plots
from lightning_bn.plots.loggers import MAX_CHART_POINTS

NAMES = {0: {"layer": "stem.bn", "key": "stem_bn"}, 1: {"layer": "head.bn", "key": "head_bn"}}
COLUMNS = ["layer", "mean gap"]
ROWS = [["stem.bn", 0.25], ["a|b", float("nan")]]


@pytest.fixture
def figure() -> Figure:
    return plots.error_curves([1, 2], [[90.0, 40.0]], [[40.0, 10.0]])


@pytest.fixture
def wandb_logger(tmp_path: Path, offline: None) -> WandbLogger:
    return WandbLogger(save_dir=tmp_path, settings=wandb.Settings(console="off", x_disable_stats=True))


def read_back(logger: WandbLogger) -> list[dict[str, Any]]:
    """Every record of the run, which is over then."""
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    wandb.teardown()
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    return [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if "history" in record]


def config(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {k: v for record in records if "config" in record for k, v in record["config"].get("update", {}).items()}


def test_csv_logger_gets_a_png_of_the_figure_in_its_log_folder(figure: Figure, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    plots.log_figure(logger, "bn/curves", figure, step=7)
    pixels = imread(Path(logger.log_dir) / "figures" / "bn" / "curves-7.png")
    assert np.array_equal((pixels[..., :3] * 255).round().astype(np.uint8), plots.to_rgb(figure))


def test_tensorboard_gets_an_image_at_its_step(figure: Figure, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    plots.log_figure(logger, "bn/curves", figure, step=7)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    (image,) = events.Images("bn/curves")
    height, width, _ = plots.to_rgb(figure).shape
    assert (image.step, image.height, image.width) == (7, height, width)


def test_wandb_gets_an_image_on_the_trainers_step_axis(figure: Figure, wandb_logger: WandbLogger) -> None:
    plots.log_figure(wandb_logger, "bn/curves", figure, step=7)
    folder = Path(wandb_logger.experiment.dir).parent
    (row,) = history(read_back(wandb_logger))
    assert row["trainer/global_step"] == 7
    pixels = imread(folder / "files" / row["bn/curves.filenames"][0])
    assert np.array_equal((pixels[..., :3] * 255).round().astype(np.uint8), plots.to_rgb(figure))


class Unknown(Logger):
    """A logger of the user's own."""

    def __init__(self, save_dir: Path | None) -> None:
        super().__init__()
        self.folder = save_dir

    name, version, experiment = "unknown", 0, None

    @property
    def save_dir(self) -> str | None:
        return str(self.folder) if self.folder else None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


def test_an_unknown_logger_gets_a_png_where_it_saves(figure: Figure, tmp_path: Path) -> None:
    plots.log_figure(Unknown(tmp_path), "curves", figure, step=1)
    assert (tmp_path / "figures" / "curves-1.png").exists()


def test_a_logger_without_a_folder_gets_files_under_the_trainers(figure: Figure, tmp_path: Path) -> None:
    trainer = SimpleNamespace(loggers=[Unknown(None)], default_root_dir=str(tmp_path))
    plots.log_figure(trainer, "bn/curves", figure, step=1)
    plots.log_layer_names(trainer, "bn_layers", NAMES)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == {
        "figures/bn/curves-1.png",
        "figures/bn_layers.json",
    }


def test_a_logger_with_no_place_for_figures_is_refused_by_name(figure: Figure) -> None:
    with pytest.raises(ValueError, match=r"Unknown takes no figures.*save_dir"):
        plots.log_figure(Unknown(None), "curves", figure, step=1)


def test_all_loggers_of_a_trainer_get_everything(figure: Figure, tmp_path: Path) -> None:
    trainer = SimpleNamespace(loggers=[Unknown(tmp_path / "a"), Unknown(tmp_path / "b")])
    plots.log_figure(trainer, "curves", figure, step=1)
    plots.log_layer_names(trainer, "names", NAMES)
    plots.log_table(trainer, "table", COLUMNS, ROWS, step=1)
    for file in ("curves-1.png", "names.json", "table.csv"):
        assert len(list(tmp_path.rglob(file))) == 2


def test_fast_dev_run_writes_nothing(figure: Figure, tmp_path: Path) -> None:
    from lightning.pytorch.loggers.logger import DummyLogger

    trainer = SimpleNamespace(loggers=[DummyLogger()], default_root_dir=str(tmp_path))
    plots.log_figure(trainer, "curves", figure, step=1)
    plots.log_table(trainer, "table", COLUMNS, ROWS, step=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("error:Experiment logs directory")  # that it makes before we write into it
def test_csv_logger_gets_names_and_tables_as_files_and_keeps_them(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    plots.log_layer_names(logger, "bn_layers", NAMES)
    plots.log_table(logger, "bn/layers", COLUMNS, ROWS, step=3)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()
    names = json.loads((Path(logger.log_dir) / "figures" / "bn_layers.json").read_text())
    assert names == {str(index): about for index, about in NAMES.items()}
    with (Path(logger.log_dir) / "bn" / "layers.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [COLUMNS, ["stem.bn", "0.25"], ["a|b", "nan"]]


def test_tensorboard_gets_names_and_tables_as_texts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    plots.log_layer_names(logger, "bn_layers", NAMES)
    plots.log_table(logger, "bn/layers", COLUMNS, ROWS, step=3)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    (names,), (table,) = (events.Tensors(f"{key}/text_summary") for key in ("bn_layers", "bn/layers"))
    assert b"| 1 | head.bn | head_bn |" in names.tensor_proto.string_val[0]
    assert table.step == 3
    lines = table.tensor_proto.string_val[0].decode().splitlines()
    assert lines == ["| layer | mean gap |", "| --- | --- |", "| stem.bn | 0.25 |", "| a\\|b | nan |"]


def test_mlflow_gets_pictures_names_and_tables_as_artifacts(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the database it wants is not in mlflow-skinny
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}")
    plots.log_figure(logger, "bn/curves", figure, step=3)
    plots.log_layer_names(logger, "bn_layers", NAMES)
    plots.log_table(logger, "bn/layers", COLUMNS, ROWS, step=3)
    artifacts = tmp_path / str(logger.experiment_id) / str(logger.run_id) / "artifacts"
    assert imread(artifacts / "figures" / "bn" / "curves-3.png").shape[:2] == plots.to_rgb(figure).shape[:2]
    assert json.loads((artifacts / "bn_layers.json").read_text())["1"] == NAMES[1]
    table = json.loads((artifacts / "bn" / "layers.json").read_text())
    assert table == {"columns": COLUMNS, "data": [["stem.bn", 0.25], ["a|b", None]]}


def test_wandb_gets_names_in_its_config_and_a_resumed_run_may_log_them_again(wandb_logger: WandbLogger) -> None:
    plots.log_layer_names(wandb_logger, "bn_layers", NAMES)
    plots.log_layer_names(wandb_logger, "bn_layers", NAMES)
    assert config(read_back(wandb_logger))["bn_layers"] == {"0": NAMES[0], "1": NAMES[1]}


def test_wandb_gets_a_table_at_its_step(wandb_logger: WandbLogger) -> None:
    plots.log_table(wandb_logger, "bn/layers", COLUMNS, ROWS, step=3)
    folder = Path(wandb_logger.experiment.dir)
    (row,) = history(read_back(wandb_logger))
    assert row["trainer/global_step"] == 3 and row["bn/layers._type"] == "table-file"
    table = json.loads((folder / row["bn/layers.path"]).read_text())
    assert table["columns"] == COLUMNS and table["data"][0] == ROWS[0]


def test_wandb_gets_one_chart_of_all_lines_without_nan_and_within_what_it_shows(wandb_logger: WandbLogger) -> None:
    steps = list(range(1000))
    lines = {f"bn{i}": [float("nan"), *(float(i) for _ in steps[1:])] for i in range(30)}
    plots.log_line_chart(wandb_logger, "bn/all_layers", steps, lines, step=999, title="Mean gap")
    folder = Path(wandb_logger.experiment.dir)
    records = read_back(wandb_logger)
    assert "_wandb.visualize.bn/all_layers" in config(records)
    (path,) = folder.glob("media/table/**/all_layers_table*.json")
    table = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert 0.9 * MAX_CHART_POINTS < len(table["data"]) <= MAX_CHART_POINTS
    assert {line for _, line, _ in table["data"]} == set(lines)


def test_wandb_gets_an_alert_at_most_once_in_ten_minutes_and_the_console_too(wandb_logger: WandbLogger) -> None:
    with pytest.warns(UserWarning, match="BN drift: layer1.bn is 3 sigma off"):
        plots.alert(wandb_logger, "BN drift", "layer1.bn is 3 sigma off")
    (sent,) = [record["alert"] for record in read_back(wandb_logger) if "alert" in record]
    assert (sent["title"], sent["text"], sent["level"]) == ("BN drift", "layer1.bn is 3 sigma off", "WARN")
    assert int(sent["wait_duration"]) == 600_000


def test_without_wandb_an_alert_is_a_warning_and_a_chart_is_nothing(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match="BN drift: layer1"):
        plots.alert(logger, "BN drift", "layer1.bn is 3 sigma off")
    plots.log_line_chart(logger, "chart", [1], {"bn": [1.0]}, step=1)
    assert not list(tmp_path.rglob("*.*"))


def test_only_rank_zero_logs(figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = Unknown(tmp_path)
    plots.log_figure(logger, "curves", figure, step=1)
    plots.log_layer_names(logger, "names", NAMES)
    plots.log_table(logger, "table", COLUMNS, ROWS, step=1)
    assert not list(tmp_path.iterdir())
