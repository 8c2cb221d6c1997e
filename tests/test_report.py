"""`python -m lightning_bn.report`: what was logged is read back whole from each logger, and shown on one page."""

import io
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread

from lightning_bn import plots
from lightning_bn.plots import page
from lightning_bn.plots.page import run_page
from lightning_bn.plots.runs import LoggedRun, Table, read_run
from lightning_bn.report import main, write_report

STEPS = [9, 19, 29]
LAYERS = {"stem.bn": "stem_bn", "body.10.bn": "body_10_bn", "body.2.bn": "body_2_bn"}  # in the model's order
GAPS = {"stem.bn": [0.5, 0.25, 0.125], "body.10.bn": [math.nan, 2.0, 1.0], "body.2.bn": [0.5, 8.0, math.inf]}
PICTURES = {step: plots.gap_heatmap([step], ["bn"], [[step / 10]]) for step in STEPS}


def log_like_the_monitor(logger: Any) -> None:
    trainer = SimpleNamespace(loggers=[logger])
    names = {index: {"layer": name, "key": key} for index, (name, key) in enumerate(LAYERS.items())}
    plots.log_layer_names(trainer, "bn_layers", names)
    for row, step in enumerate(STEPS):
        gaps = {f"bn_mean_gap/{key}": GAPS[name][row] for name, key in LAYERS.items()}
        together = {"bn_agg/mean_gap_max": [0.5, 8.0, 2.0][row], "bn_agg/worst_layer": [0.0, 2.0, 2.0][row]}
        other = {"bn_head_agg/lag_max": 0.25, "bn_head_var_gap/stem_bn": 0.5, "train_loss": 1.0}
        logger.log_metrics({**gaps, **together, **other}, step)
        plots.log_figure(trainer, "bn/heatmap", PICTURES[step], step)
    rows = [[index, name, GAPS[name][-1]] for index, name in enumerate(LAYERS)]
    plots.log_table(trainer, "bn/layers", ["index", "layer", "mean gap"], rows, STEPS[-1])


def csv_run(folder: Path) -> Path:
    logger = CSVLogger(folder)
    log_like_the_monitor(logger)
    logger.save()
    return Path(logger.log_dir)


def tensorboard_run(folder: Path) -> Path:
    logger = TensorBoardLogger(folder)
    log_like_the_monitor(logger)
    logger.finalize("success")
    return Path(logger.log_dir)


def wandb_run(folder: Path) -> Path:
    settings = wandb.Settings(console="off", x_disable_stats=True)
    logger = WandbLogger(save_dir=folder, name="a <b>run</b>", project="resnet", settings=settings)
    log_like_the_monitor(logger)
    wandb.finish()
    wandb.teardown()
    return folder / "wandb" / "latest-run"


KINDS = {"csv": csv_run, "tensorboard": tensorboard_run, "wandb": wandb_run}


@pytest.fixture(params=list(KINDS))
def logged(request: pytest.FixtureRequest, tmp_path: Path, offline: None) -> Path:
    return KINDS[request.param](tmp_path)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(imread(io.BytesIO(png))[..., :3] * 255).round().astype(np.uint8)


def test_everything_of_a_monitor_is_read_back_and_nothing_else(logged: Path) -> None:
    run = read_run(logged)
    for name, key in LAYERS.items():
        series = run.scalars[f"bn_mean_gap/{key}"]
        assert [step for step, _ in series] == STEPS
        assert [value for _, value in series] == pytest.approx(GAPS[name], nan_ok=True)
    assert "train_loss" not in run.scalars and set(run.images) == {"bn/heatmap"}
    assert all(key.startswith("bn_") for key in run.scalars), "sizes of pictures and tables are no scalars"
    assert [step for step, _ in run.images["bn/heatmap"]] == STEPS
    for step, png in run.images["bn/heatmap"]:
        assert np.array_equal(pixels(png), plots.to_rgb(PICTURES[step]))
    assert set(run.tables) == {"bn_layers", "bn/layers"}
    assert list(run.tables["bn/layers"].columns) == ["index", "layer", "mean gap"]
    assert [row[1] for row in run.tables["bn/layers"].rows] == list(LAYERS)
    names = run.tables["bn_layers"]
    columns = [list(names.columns).index(column) for column in ("index", "layer", "key")]
    assert [[row[c] for c in columns] for row in names.rows] == [
        [str(index), name, key] for index, (name, key) in enumerate(LAYERS.items())
    ]


def test_the_page_says_the_worst_when_it_was_and_in_which_layer(logged: Path) -> None:
    html = run_page(read_run(logged))
    cells = re.search(r"<td>mean_gap_max</td>(.*?)</tr>", html)
    assert cells and re.findall(r">([\d.]+)<", cells[1]) == ["2", "8", "19"]
    assert "at the end: <b>body.2.bn</b>; most often: <b>body.2.bn</b>, in 2 of 3 rows" in html
    assert "<h2>All layers together: bn_head</h2>" in html, "a second monitor has a section of its own"
    assert html.count("<details>") == 2 and "<summary>2 earlier</summary>" in html
    assert html.count("data:image/png;base64,") == 2 + 2 + 3, "aggregates and heatmaps, redrawn; the logged pictures"


def test_a_redrawn_heatmap_has_the_layers_in_the_models_order_under_their_own_names(
    logged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, tuple[list[str], np.ndarray]] = {}

    def draw(steps: Any, layers: Any, gaps: Any, *, quantity: str, title: str) -> Any:
        drawn[title] = (layers, gaps)
        return plots.gap_heatmap(steps, layers, gaps, quantity=quantity, title=title)

    monkeypatch.setattr(page, "gap_heatmap", draw)
    run_page(read_run(logged))
    layers, gaps = drawn["bn_mean_gap"]
    assert layers == list(LAYERS)
    np.testing.assert_array_equal(gaps, np.array(list(GAPS.values())).T)
    assert set(drawn) == {"bn_mean_gap", "bn_head_var_gap"}


def test_without_names_layers_are_sorted_as_people_count(monkeypatch: pytest.MonkeyPatch) -> None:
    run = LoggedRun({}, scalars={f"bn_lag/{key}": [(1, 0.1)] for key in ("layer10_bn", "layer2_bn", "bn")})
    monkeypatch.setattr(page, "gap_heatmap", lambda _, layers, *args, **kwargs: pytest.fail(" ".join(layers)))
    with pytest.raises(pytest.fail.Exception, match="bn layer2_bn layer10_bn"):
        run_page(run)


def test_the_page_asks_nobody_for_anything_and_runs_nothing(tmp_path: Path, offline: None) -> None:
    html = run_page(read_run(wandb_run(tmp_path)))
    sources = re.findall(r"""(?:src|href)=["']([^"']{0,22})""", html)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "<script" not in html and "url(" not in html and "http:" not in html and "https:" not in html
    assert "a &lt;b&gt;run&lt;/b&gt;" in html and "<b>run" not in html


def test_a_table_shows_small_numbers_marks_infinite_ones_and_leaves_texts_alone() -> None:
    rows = [["<i>1.5.bn", 0.123456, math.inf], ["2", None, "nan"]]
    html = run_page(LoggedRun({}, tables={"bn/t": Table(["layer", "gap", "lag"], rows)}))
    assert "<td>&lt;i&gt;1.5.bn</td>" in html and ">0.123<" in html and '<span class="bad">inf</span>' in html
    assert "nan" not in re.findall(r"<td[^>]*>([^<]*)</td>", html), "not measured is a dash"


def test_a_run_without_a_monitor_says_so(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"train_loss": 1.0}, 1)
    logger.save()
    assert "no <code>BNStatsMonitor</code> was on" in run_page(read_run(logger.log_dir))


def test_the_command_writes_the_page_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = csv_run(tmp_path)
    main([str(run)])
    main([str(run), "--out", str(tmp_path / "new" / "page.html")])
    assert capsys.readouterr().out.split() == [str(run / "bn_report.html"), str(tmp_path / "new" / "page.html")]
    assert (run / "bn_report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_what_is_no_run_is_refused_with_what_was_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.ckpt").touch()
    for path, found in ((tmp_path, "model.ckpt"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(SystemExit):
            main([str(path)])
        error = capsys.readouterr().err
        for part in (str(path), "run-*.wandb", "events.out.tfevents.*", "metrics.csv", found):
            assert part in error


def test_a_wandb_run_that_cannot_be_read_is_an_error_with_wandbs_words(tmp_path: Path) -> None:
    (tmp_path / "run-broken.wandb").write_bytes(b"no run")
    with pytest.raises(ValueError, match=r"W&B cannot read the run at .*: .*incomplete"):
        read_run(tmp_path)


def test_a_wandb_run_that_was_interrupted_is_read_as_far_as_it_goes(tmp_path: Path, offline: None) -> None:
    folder = wandb_run(tmp_path)
    assert read_run(folder).about["state"] == "finished"
    (file,) = folder.glob("run-*.wandb")
    file.write_bytes(file.read_bytes()[: -file.stat().st_size // 3])
    run = read_run(folder)
    assert run.about["state"] == "still running, or interrupted" and run.scalars


def in_chromium(html: str, folder: Path) -> tuple[str, list[str]]:
    """ "pictures loaded/pictures", and the console's messages."""
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
def test_a_browser_loads_every_picture_and_has_nothing_to_complain_about(tmp_path: Path) -> None:
    html = write_report(csv_run(tmp_path)).read_text(encoding="utf-8")
    assert in_chromium(html, tmp_path) == ("7/7", [])
    broken = html.replace("image/png;base64,", "image/png;base64,AAAA", 1).replace(
        "<body>", "<body><img src=http://a/b>"
    )
    loaded, complaints = in_chromium(broken, tmp_path)
    assert loaded == "6/8" and complaints, "the check above can fail"
