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
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.image import imread

from lightning_bn import plots
from lightning_bn.plots.loggers import MAX_CHART_POINTS

NAMES = {0: {"layer": "stem.bn", "key": "stem_bn"}, 1: {"layer": "head.bn", "key": "head_bn"}}
COLUMNS = ["layer", "mean gap"]
FIGURE = plots.gap_heatmap([1], layers=["bn"], gaps=[[0.5]])
ROWS = [["stem.bn", 0.25], ["a|b", float("nan")]]


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and all records of one W&B run that got everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("staging")))
        settings = wandb.Settings(console="off", x_disable_stats=True, mode="offline", silent=True)
        logger = WandbLogger(save_dir=tmp_path_factory.mktemp("wandb"), settings=settings)
        folder = Path(logger.experiment.dir).parent
        log_all(logger)
        plots.log_layer_names(logger, key="bn_layers", names=NAMES)  # as a resumed run does
        steps = list(range(1000))
        lines = {f"bn{i}": [float("nan"), *(float(i) for _ in steps[1:])] for i in range(30)}
        plots.log_line_chart(logger, key="bn/all_layers", steps=steps, lines=lines, step=999, title="Mean gap")
        with pytest.warns(UserWarning, match="BN drift: layer1.bn is 3 sigma off"):
            plots.alert(logger, title="BN drift", text="layer1.bn is 3 sigma off")
        wandb.finish()
        wandb.teardown()
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    return folder, [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]


def log_all(loggers: Any) -> None:
    plots.log_figure(loggers, key="bn/curves", figure=FIGURE, step=7)
    plots.log_layer_names(loggers, key="bn_layers", names=NAMES)
    plots.log_table(loggers, key="bn/layers", columns=COLUMNS, rows=ROWS, step=3)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(imread(path)[..., :3] * 255).round().astype(np.uint8)


def row_with(key: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [record["history"]["item"] for record in records if "history" in record]
    (row,) = (row for row in rows if key in row)
    return row


@pytest.mark.filterwarnings("error:Experiment logs directory")  # CSVLogger's, if we wrote first
def test_csv_logger_gets_everything_as_files_in_its_log_folder(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    log_all(logger)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()
    folder = Path(logger.log_dir)
    assert np.array_equal(pixels(folder / "figures" / "bn" / "curves-7.png"), plots.to_rgb(FIGURE))
    names = json.loads((folder / "figures" / "bn_layers.json").read_text())
    assert names == {str(index): about for index, about in NAMES.items()}
    with (folder / "bn" / "layers.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [COLUMNS, ["stem.bn", "0.25"], ["a|b", "nan"]]


def test_tensorboard_gets_an_image_and_texts_at_their_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    log_all(logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    (image,) = events.Images("bn/curves")
    assert (image.step, image.height, image.width) == (7, *plots.to_rgb(FIGURE).shape[:2])
    (names,), (table,) = (events.Tensors(f"{key}/text_summary") for key in ("bn_layers", "bn/layers"))
    assert b"| 1 | head.bn | head_bn |" in names.tensor_proto.string_val[0]
    assert table.step == 3
    lines = table.tensor_proto.string_val[0].decode().splitlines()
    assert lines == ["| layer | mean gap |", "| --- | --- |", "| stem.bn | 0.25 |", "| a\\|b | nan |"]


def test_mlflow_gets_pictures_names_and_tables_as_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the database it wants is not in mlflow-skinny
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}")
    log_all(logger)
    artifacts = tmp_path / str(logger.experiment_id) / str(logger.run_id) / "artifacts"
    assert imread(artifacts / "figures" / "bn" / "curves-7.png").shape[:2] == plots.to_rgb(FIGURE).shape[:2]
    assert json.loads((artifacts / "bn_layers.json").read_text())["1"] == NAMES[1]
    table = json.loads((artifacts / "bn" / "layers.json").read_text())
    assert table == {"columns": COLUMNS, "data": [["stem.bn", 0.25], ["a|b", None]]}


def test_wandb_gets_image_names_table_chart_and_alert(wandb_run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, records = wandb_run
    row = row_with("bn/curves.filenames", records)
    assert row["trainer/global_step"] == 7
    assert np.array_equal(pixels(folder / "files" / row["bn/curves.filenames"][0]), plots.to_rgb(FIGURE))
    updates = [record["config"].get("update", {}) for record in records if "config" in record]
    config = {key: value for update in updates for key, value in update.items()}
    assert config["bn_layers"] == {"0": NAMES[0], "1": NAMES[1]}
    row = row_with("bn/layers._type", records)
    assert row["trainer/global_step"] == 3 and row["bn/layers._type"] == "table-file"
    table = json.loads((folder / "files" / row["bn/layers.path"]).read_text())
    assert table["columns"] == COLUMNS and table["data"][0] == ROWS[0]
    assert "_wandb.visualize.bn/all_layers" in config
    (path,) = folder.glob("files/media/table/**/all_layers_table*.json")
    chart = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert 0.9 * MAX_CHART_POINTS < len(chart["data"]) <= MAX_CHART_POINTS
    assert {line for _, line, _ in chart["data"]} == {f"bn{i}" for i in range(30)}
    (alert,) = [record["alert"] for record in records if "alert" in record]
    assert (alert["title"], alert["text"], alert["level"]) == ("BN drift", "layer1.bn is 3 sigma off", "WARN")
    assert int(alert["wait_duration"]) == 600_000, "at most once in ten minutes"


class Unknown(Logger):
    """A logger that lightning_bn does not know."""

    def __init__(self, save_dir: Path | None) -> None:
        super().__init__()
        self.folder = save_dir

    name, version, experiment = "unknown", 0, None

    @property
    def save_dir(self) -> str | None:
        return str(self.folder) if self.folder else None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


def test_all_loggers_of_a_trainer_get_everything_unknown_ones_where_they_or_the_trainer_save(tmp_path: Path) -> None:
    loggers = [Unknown(tmp_path / "a"), Unknown(tmp_path / "b"), Unknown(None)]
    log_all(SimpleNamespace(loggers=loggers, default_root_dir=str(tmp_path / "c")))
    for file in ("bn/curves-7.png", "bn_layers.json", "layers.csv"):
        assert len(list(tmp_path.rglob(file))) == 3
    with pytest.raises(ValueError, match=r"Unknown takes no figures.*save_dir"):
        plots.log_figure(Unknown(None), key="curves", figure=FIGURE, step=1)


def test_fast_dev_run_other_ranks_than_zero_and_charts_without_wandb_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_all(SimpleNamespace(loggers=[DummyLogger()], default_root_dir=str(tmp_path)))
    logger = CSVLogger(tmp_path)
    plots.log_line_chart(logger, key="chart", steps=[1], lines={"bn": [1.0]}, step=1)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log_all(Unknown(tmp_path))
    assert not list(tmp_path.rglob("*.*"))
