"""The recipe of Fig. 2 to 4 and Table 1: its measurements, and what its command writes and logs."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import nn

import lightning_bn as lbn
from recipes.classifier import ImageClassifier
from recipes.ema_vs_precise import experiment
from recipes.ema_vs_precise.__main__ import main
from recipes.ema_vs_precise.experiment import EMATrace, Training, hash_of_parameters
from recipes.evaluation import copy_of_state, mean_and_spread
from recipes.images import ImageData
from tests.recipes.commands import run_command

TINY = ["--preset", "smoke", "--data.train_images", "200", "--data.val_images", "60", "--data.batch_size", "50"]
TINY += ["--model.width", "8", "--cloud_batches", "2", "--monitor.window", "2"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Folder, stdout and stderr of the command."""
    out = tmp_path_factory.mktemp("smoke")
    return out, *run_command("ema_vs_precise", TINY, out)


@pytest.fixture(scope="module")
def report(command: tuple[Path, str, str]) -> dict[str, Any]:
    return json.loads((command[0] / "report.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_trainings_have_the_same_weights_and_table_1_the_logged_error_and_every_draw(report: dict[str, Any]) -> None:
    ema, precise = report["runs"]
    assert ema["weights"] == precise["weights"] and len(set(ema["weights"])) == 2
    assert ema["errors"] != precise["errors"]
    logged = dict(zip(ema["epochs"], ema["errors"], strict=True))
    for row in report["samples"]:
        assert row["ema_error"] == pytest.approx(logged[row["epoch"]], abs=1e-3)
        assert {n: len(errors) for n, errors in row["errors"].items()} == {"10": 2, "100": 2, "200": 1}


def test_the_report_has_every_claim_with_a_verdict_and_figures(
    command: tuple[Path, str, str], report: dict[str, Any]
) -> None:
    markdown = (command[0] / "report.md").read_text(encoding="utf-8")
    assert len(report["claims"]) >= 8
    for claim in report["claims"]:
        assert claim["verdict"] in ("holds", "does not hold", "within noise")
        line = next(line for line in markdown.splitlines() if line.startswith(f"| {claim['claim']} "))
        assert claim["paper"] in line and claim["measured"] in line and f"**{claim['verdict']}**" in line
    for name in ("ema_vs_precise.png", "samples.png", "ema_cloud.png"):
        assert f"({name})" in markdown
        assert imread(command[0] / name).std() > 0.05, "an empty picture"


def test_it_warns_of_nothing_and_its_wandb_runs_have_the_same_keys_and_the_report_the_figures(
    command: tuple[Path, str, str],
) -> None:
    folder, out, errors = command
    assert errors == "" and "lightning_bn.report" in out.splitlines()[-1]
    program, leet, of_report = [line.split() for line in out.splitlines() if " leet " in line][-1]
    runs = {}
    for run in (folder / "wandb").glob("offline-run-*"):
        text = subprocess.check_output([program, leet, "inspect", "--json", run], text=True)
        names = {r["run"].get("display_name") for r in map(json.loads, text.splitlines()) if "run" in r}
        runs[str(max(filter(None, names)))] = text
        assert '"ema_vs_precise/smoke"' in text and (run.resolve() == Path(of_report).resolve()) == ("report" in names)
    ema, precise, report = (runs[name] for name in ("EMA, seed 0", "PreciseBN, seed 0", "report"))
    assert len(runs) == 3 and all("val/error" in arm and "train/loss" in arm for arm in (ema, precise))
    assert "precise_bn/seconds" in precise and "precise_bn/seconds" not in ema
    for key in ("figures/ema_vs_precise", "figures/samples", "figures/ema_cloud", "claims/holds"):
        assert key in report


def test_its_config_repeats_the_run_and_takes_further_settings(
    command: tuple[Path, str, str], report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.tolerance.NUM_IMAGES", 100)
    monkeypatch.setattr("lightning_bn.plots.any_logs", lambda loggers: False)  # the monitor's figures take seconds
    settings = ["--seeds", "[0,4]", "--draws", "3", "--samples", "[20]", "--tolerances", "[0.1]"]
    main(["--config", str(command[0] / "config.yaml"), *settings, "--out", str(tmp_path)])
    again = json.loads((tmp_path / "report.json").read_text())
    assert [run["errors"] for run in again["runs"][:2]] == [run["errors"] for run in report["runs"]]
    assert [run["seed"] for run in again["runs"]] == [0, 0, 4, 4]
    assert not set(again["runs"][0]["weights"]) & set(again["runs"][2]["weights"])
    assert {n: len(errors) for n, errors in again["samples"][0]["errors"].items()} == {"20": 3, "200": 1}
    assert [stops["model"] for stops in again["samples_needed"]][::2] == ["epoch 1, seed 0", "epoch 1, seed 4"]
    assert "How many images are needed" in (tmp_path / "report.md").read_text()


@pytest.fixture(scope="module")
def data() -> ImageData:
    return ImageData(train_images=60, val_images=30, batch_size=20, shift=0)


def untrained() -> tuple[ImageClassifier, Training]:
    model = ImageClassifier(width=8)
    return model, Training("EMA", 0, [1.0], errors=[90.0], weights=["-"], states=[copy_of_state(model)], steps=[1])


def test_networks_have_as_many_bn_layers_as_documented_and_channels_that_cpus_can_normalize() -> None:
    for network, layers in (("resnet8", 9), ("resnet20", 21), ("plain20", 19)):
        assert len(lbn.find_bn(ImageClassifier(network=network, width=8))) == layers
    with pytest.raises(ValueError, match="must be at least 8 but is 7"):
        ImageClassifier(width=7)  # corrupts the heap on some CPUs


def test_the_hash_depends_on_every_bit_of_weights_of_any_type_and_on_no_buffer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = hash_of_parameters(model)
    model[1].running_mean.add_(1)
    assert hash_of_parameters(model) == before
    assert hash_of_parameters(model.to(memory_format=torch.channels_last)) == before
    weight = model[0].weight.data.view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    assert hash_of_parameters(model) != before
    assert len({hash_of_parameters(nn.Linear(2, 2).to(dtype)) for dtype in (torch.float64, torch.bfloat16)}) == 2


def test_the_spread_is_that_of_the_draws_not_of_the_seeds() -> None:
    steady_seeds = [torch.tensor([[1.0, 0, 0, 0]] * 3), torch.tensor([[1.0, 1, 1, 0]] * 3)]
    assert mean_and_spread(*steady_seeds) == "50.0 ± 0.0"
    assert mean_and_spread(torch.tensor([[1.0, 0], [0, 0]])) == "25.0 ± 35.4"
    assert mean_and_spread(torch.tensor([[1.0, 0]])) == "50.0"


def test_a_cloud_has_the_means_of_batches_with_the_weights_of_its_step(data: ImageData) -> None:
    model, training = untrained()
    trace = EMATrace()
    trace.means = [torch.zeros(60)]
    cloud = experiment.batch_mean_cloud(model, data, training, trace, batches=3)
    assert cloud.batch_means[1].shape == (3, len(cloud.channels))
    assert cloud.channels[8] == ("network.block1.bn1", 0)
    images = torch.cat([images for images, _ in data.training_sample(60, torch.Generator())])
    stem = model.get_submodule("network.conv")(images).transpose(0, 1).flatten(1)
    assert cloud.batch_means[1][:, :8].mean(0) == pytest.approx(stem.mean(1).detach().numpy(), abs=1e-5)
    assert cloud.std[1][:8] == pytest.approx(stem.std(1).detach().numpy(), rel=1e-3)
    assert cloud.batch_means[1][:, :8].std(0).min() > 0, "three batches, three different means"


def test_a_sweep_starts_every_draw_from_the_checkpoint(data: ImageData) -> None:
    model, training = untrained()
    sweep, again = (experiment.sweep_samples(model, data, training, 0, [20, 60, 500], 2) for _ in range(2))
    assert {n: tuple(wrong.shape) for n, wrong in sweep.precise.items()} == {20: (2, 30), 60: (1, 30)}
    assert torch.equal(sweep.ema, again.ema)
    assert all(torch.equal(sweep.precise[n], again.precise[n]) for n in sweep.precise)


def test_table_1_uses_the_checkpoints_at_thirty_percent_and_at_the_end() -> None:
    assert [experiment.unconverged_and_final(n) for n in (100, 10, 2, 1)] == [[29, 99], [2, 9], [0, 1], [0]]
