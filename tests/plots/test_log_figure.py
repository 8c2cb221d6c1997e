"""`log_figure` reaches every logger in the place where that logger shows images."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_bn import plots


@pytest.fixture
def figure() -> Figure:
    return plots.error_curves([1, 2], [[90.0, 40.0]], [[40.0, 10.0]])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B without network, and without a run left over from another test, or for the next."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.finish()
    yield
    wandb.finish()
    wandb.teardown()


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


def test_wandb_gets_an_image_on_the_trainers_step_axis(figure: Figure, tmp_path: Path, offline: None) -> None:
    logger = WandbLogger(save_dir=tmp_path, settings=wandb.Settings(console="off", x_disable_stats=True))
    plots.log_figure(logger, "bn/curves", figure, step=7)
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    wandb.teardown()
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    records = [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]
    assert any("bn/curves" in json.dumps(r) and "trainer/global_step" in json.dumps(r) for r in records)
    assert len(list(folder.glob("files/media/images/bn/curves_*.png"))) == 1


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


def test_a_logger_with_no_place_for_figures_is_refused_by_name(figure: Figure) -> None:
    with pytest.raises(ValueError, match=r"Unknown takes no figures.*save_dir"):
        plots.log_figure(Unknown(None), "curves", figure, step=1)


class MLFlowLogger(Unknown):
    """Has MLFlowLogger's name and the two attributes that count; mlflow itself is large."""

    run_id = "r1"

    def __init__(self) -> None:
        super().__init__(None)
        self.calls: list[tuple[Any, ...]] = []
        self.experiment = SimpleNamespace(log_figure=lambda *args: self.calls.append(args))


def test_mlflow_gets_the_figure_itself(figure: Figure) -> None:
    logger = MLFlowLogger()
    plots.log_figure(logger, "curves", figure, step=3)
    assert logger.calls == [("r1", figure, "figures/curves-3.png")]


def test_all_loggers_of_a_trainer_get_the_figure(figure: Figure, tmp_path: Path) -> None:
    trainer = SimpleNamespace(loggers=[Unknown(tmp_path / "a"), Unknown(tmp_path / "b")])
    plots.log_figure(trainer, "curves", figure, step=1)
    assert len(list(tmp_path.rglob("curves-1.png"))) == 2
