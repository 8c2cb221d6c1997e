"""`lightning_bn.report`: what was logged is read back whole from each logger, and is on one page."""

import io
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread

from lightning_bn import plots
from lightning_bn.report import LoggedRun, Table, page, read_run, run_page, wandb_workspace, write_report
from lightning_bn.report.__main__ import main
from lightning_bn.report.workspace import IMAGES, drift_workspace
from lightning_bn.tracking.drift import AGGREGATES

STEPS = [9, 19, 29]
LAYERS = {"stem.bn": "stem_bn", "body.10.bn": "body_10_bn", "body.2.bn": "body_2_bn"}  # in the model's order
GAPS = {"stem.bn": [0.5, 0.25, 0.125], "body.10.bn": [math.nan, 2.0, 1.0], "body.2.bn": [0.5, 8.0, math.inf]}
PICTURES = {step: plots.gap_heatmap([step], layers=["bn"], gaps=[[step / 10]]) for step in STEPS}


def log_like_the_monitor(logger: Any) -> None:
    trainer = SimpleNamespace(loggers=[logger])
    names = {index: {"layer": name, "key": key} for index, (name, key) in enumerate(LAYERS.items())}
    plots.log_layer_names(trainer, key="bn_layers", names=names)
    for row, step in enumerate(STEPS):
        gaps = {f"bn_mean_gap/{key}": GAPS[name][row] for name, key in LAYERS.items()}
        together = {"bn_agg/mean_gap_max": [0.5, 8.0, 2.0][row], "bn_agg/worst_layer": [0.0, 2.0, 2.0][row]}
        other = {"bn_head_agg/lag_max": 0.25, "bn_head_var_gap/stem_bn": 0.5, "train_loss": 1.0}
        logger.log_metrics({**gaps, **together, **other}, step)
        plots.log_figure(trainer, key="bn/heatmap", figure=PICTURES[step], step=step)
    rows = [[index, name, GAPS[name][-1]] for index, name in enumerate(LAYERS)]
    plots.log_table(trainer, key="bn/layers", columns=["index", "layer", "mean gap"], rows=rows, step=STEPS[-1])


def log(kind: str, folder: Path) -> Path:
    """Returns the folder of the run."""
    if kind == "wandb":
        settings = wandb.Settings(console="off", x_disable_stats=True, mode="offline")
        log_like_the_monitor(WandbLogger(save_dir=folder, project="resnet", settings=settings))
        wandb.finish()
        wandb.teardown()
        return folder / "wandb" / "latest-run"
    logger = CSVLogger(folder) if kind == "csv" else TensorBoardLogger(folder)
    log_like_the_monitor(logger)
    logger.finalize("success")
    return Path(logger.log_dir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("staging")))
        patch.setenv("WANDB_SILENT", "true")
        return {kind: log(kind, tmp_path_factory.mktemp(kind)) for kind in ("csv", "tensorboard", "wandb")}


@pytest.fixture(scope="module", params=["csv", "tensorboard", "wandb"])
def run(request: pytest.FixtureRequest, runs: dict[str, Path]) -> LoggedRun:
    return read_run(runs[request.param])


def test_all_keys_of_a_monitor_are_read_back_and_no_others(run: LoggedRun) -> None:
    for name, key in LAYERS.items():
        series = run.scalars[f"bn_mean_gap/{key}"]
        assert [step for step, _ in series] == STEPS
        assert [value for _, value in series] == pytest.approx(GAPS[name], nan_ok=True)
    assert "train_loss" not in run.scalars and set(run.images) == {"bn/heatmap"}
    assert all(key.startswith("bn_") for key in run.scalars), "sizes of pictures and tables are no scalars"
    assert [step for step, _ in run.images["bn/heatmap"]] == STEPS
    for step, png in run.images["bn/heatmap"]:
        pixels = np.asarray(imread(io.BytesIO(png))[..., :3] * 255).round().astype(np.uint8)
        assert np.array_equal(pixels, plots.to_rgb(PICTURES[step]))
    assert set(run.tables) == {"bn_layers", "bn/layers"} and run.about.get("state", "finished") == "finished"
    assert list(run.tables["bn/layers"].columns) == ["index", "layer", "mean gap"]
    assert [row[1] for row in run.tables["bn/layers"].rows] == list(LAYERS)
    names = run.tables["bn_layers"]
    columns = [list(names.columns).index(column) for column in ("index", "layer", "key")]
    found = [[row[c] for c in columns] for row in names.rows]
    assert found == [[str(index), name, key] for index, (name, key) in enumerate(LAYERS.items())]


def test_the_page_has_worst_values_and_layers_and_heatmaps_in_the_models_order(
    run: LoggedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, tuple[list[str], np.ndarray]] = {}

    def draw(steps: Any, *, layers: Any, gaps: Any, quantity: str, title: str) -> Any:
        drawn[title] = (layers, gaps)
        return PICTURES[9]

    monkeypatch.setattr(page, "gap_heatmap", draw)
    html = run_page(run)
    cells = re.search(r"<td>mean_gap_max</td>(.*?)</tr>", html)
    assert cells and re.findall(r">([\d.]+)<", cells[1]) == ["2", "8", "19"]
    assert "at the end: <b>body.2.bn</b>; most often: <b>body.2.bn</b>, in 2 of 3 rows" in html
    assert "<h2>All layers together: bn_head</h2>" in html, "the section of a second monitor"
    assert html.count("<details>") == 2 and "<summary>2 earlier</summary>" in html
    assert html.count("data:image/png;base64,") == 2 + 2 + 3, "aggregates and heatmaps, redrawn; the logged pictures"
    layers, gaps = drawn["bn_mean_gap"]
    assert layers == list(LAYERS) and set(drawn) == {"bn_mean_gap", "bn_head_var_gap"}
    np.testing.assert_array_equal(gaps, np.array(list(GAPS.values())).T)


def test_without_names_layers_are_sorted_by_the_numbers_in_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    run = LoggedRun({}, scalars={f"bn_lag/{key}": [(1, 0.1)] for key in ("layer10_bn", "layer2_bn", "bn")})
    monkeypatch.setattr(page, "gap_heatmap", lambda _, layers, **kwargs: pytest.fail(" ".join(layers)))
    with pytest.raises(pytest.fail.Exception, match="bn layer2_bn layer10_bn"):
        run_page(run)


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    about = {"name": "a <b>run</b>"}
    png = io.BytesIO()
    PICTURES[9].savefig(png, format="png")
    html = run_page(LoggedRun(about, {"bn_agg/lag_max": [(1, 0.5)]}, {"bn/heatmap": [(1, png.getvalue())]}))
    sources = re.findall(r"""(?:src|href)=["']([^"']{0,22})""", html)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "<script" not in html and "url(" not in html and "http:" not in html and "https:" not in html
    assert "a &lt;b&gt;run&lt;/b&gt;" in html and "<b>run" not in html


def test_a_table_shortens_numbers_marks_infinite_ones_and_leaves_texts_alone() -> None:
    rows = [["<i>1.5.bn", 0.123456, math.inf], ["2", None, "nan"]]
    html = run_page(LoggedRun({}, tables={"bn/t": Table(["layer", "gap", "lag"], rows)}))
    assert "<td>&lt;i&gt;1.5.bn</td>" in html and ">0.123<" in html and '<span class="bad">inf</span>' in html
    assert "nan" not in re.findall(r"<td[^>]*>([^<]*)</td>", html), "not measured is a dash"


def test_the_command_writes_the_page_and_prints_its_path(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    run = runs["csv"]
    main([str(run)])
    main([str(run), "--out", str(tmp_path / "new" / "page.html")])
    assert capsys.readouterr().out.split() == [str(run / "bn_report.html"), str(tmp_path / "new" / "page.html")]
    assert (run / "bn_report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_what_cannot_be_read_is_an_error_and_a_run_without_a_monitor_a_page_without_its_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.ckpt").touch()
    for path, found in ((tmp_path, "model.ckpt"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(SystemExit):
            main([str(path)])
        error = capsys.readouterr().err
        for part in (str(path), "run-*.wandb", "events.out.tfevents.*", "metrics.csv", found):
            assert part in error
    logger = CSVLogger(tmp_path / "csv")
    logger.log_metrics({"train_loss": 1.0}, 1)
    logger.save()
    assert "no keys of <code>BNStatsMonitor</code>" in run_page(read_run(logger.log_dir))
    (tmp_path / "run-broken.wandb").write_bytes(b"no run")
    with pytest.raises(ValueError, match=r"W&B cannot read the run at .*: .*incomplete"):
        read_run(tmp_path)


def test_a_wandb_run_that_was_interrupted_is_read_as_far_as_it_goes(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs["wandb"].resolve(), tmp_path / "run")
    (file,) = folder.glob("run-*.wandb")
    file.write_bytes(file.read_bytes()[: -file.stat().st_size // 3])
    run = read_run(folder)
    assert run.about["state"] == "still running, or interrupted" and run.scalars


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_the_workspace_has_every_aggregate_every_layer_and_every_picture() -> None:
    pytest.importorskip("wandb_workspaces")
    view = drift_workspace("someone", "resnet")._to_model()
    assert (view.entity, view.project) == ("someone", "resnet")
    first = view.spec.section.panel_bank_config.sections[0]
    assert first.is_open and first.name == "BatchNorm drift"
    configs = [panel.config for panel in first.panels]
    lines = [config for config in configs if hasattr(config, "metrics")]
    assert {key for config in lines for key in config.metrics or []} == {f"bn_agg/{name}" for name in AGGREGATES}
    by_layer = [config.metric_regex for config in lines if config.use_metric_regex]
    assert by_layer == ["bn_mean_gap/.*", "bn_var_gap/.*"]
    assert {config.x_axis for config in lines} == {"trainer/global_step"}
    assert [config.media_keys for config in configs if hasattr(config, "media_keys")] == [[key] for key in IMAGES]


def test_a_missing_wandb_workspaces_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2.interface", None)
    with pytest.raises(ImportError, match=r"lightning-bn\[workspace\]"):
        wandb_workspace("someone", project="resnet")


def in_chromium(html: str, folder: Path) -> tuple[str, list[str]]:
    """Returns "pictures loaded/pictures", and the messages of the console."""
    count = "[...document.images].filter(i => i.complete && i.naturalWidth).length + '/' + document.images.length"
    script = f"<script>addEventListener('load', () => {{ document.title = {count} }})</script></body>"
    allowed = html.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    path = folder / "page.html"
    path.write_text(allowed.replace("</body>", script), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", path.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.*?)</title>", ran.stdout)
    return title[1] if title else ran.stderr, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH to open the page in")
def test_a_browser_loads_every_picture_without_a_complaint(runs: dict[str, Path], tmp_path: Path) -> None:
    html = write_report(runs["csv"], out=tmp_path / "report.html").read_text(encoding="utf-8")
    assert in_chromium(html, tmp_path) == ("7/7", [])
    broken = html.replace("image/png;base64,", "image/png;base64,AAAA", 1)
    loaded, complaints = in_chromium(broken.replace("<body>", "<body><img src=http://a/b>"), tmp_path)
    assert loaded == "6/8" and complaints, "the check above can fail"
