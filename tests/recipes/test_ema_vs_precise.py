"""The recipe's command: what it writes, what it logs, and that its settings arrive where they should."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from recipes.ema_vs_precise.__main__ import PRESETS, main, make_parser
from recipes.registry import all_recipes, as_markdown
from tests.recipes.offline import offline, wandb_runs  # noqa: F401

TINY = ["--preset", "smoke", "--data.train_images", "200", "--data.val_images", "60", "--data.batch_size", "50"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of the real command, and how it ended."""
    out = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, "-m", "recipes.ema_vs_precise", *TINY, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return out, subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


@pytest.fixture(scope="module")
def smoke(command: tuple[Path, Any]) -> Path:
    return command[0]


@pytest.fixture(scope="module")
def report(smoke: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((smoke / "report.json").read_text(encoding="utf-8"))
    return read


def test_both_arms_share_one_weight_trajectory_and_differ_in_their_error(report: dict[str, Any]) -> None:
    ema, precise = report["runs"]
    assert (ema["arm"], precise["arm"]) == ("EMA", "PreciseBN")
    assert ema["weights"] == precise["weights"] and len(set(ema["weights"])) == 2
    assert ema["errors"] != precise["errors"]


def test_the_ema_error_of_table_1_is_the_one_that_was_logged(report: dict[str, Any]) -> None:
    logged = dict(zip(report["runs"][0]["epochs"], report["runs"][0]["errors"], strict=True))
    for row in report["samples"]:
        assert row["ema_error"] == pytest.approx(logged[row["epoch"]], abs=1e-3)


def test_table_1_has_as_many_draws_as_asked_for_and_one_of_the_whole_population(report: dict[str, Any]) -> None:
    for row in report["samples"]:
        assert {n: len(errors) for n, errors in row["errors"].items()} == {"10": 2, "100": 2, "200": 1}


def test_every_claim_has_the_papers_number_and_a_verdict(report: dict[str, Any], smoke: Path) -> None:
    assert len(report["claims"]) >= 8
    markdown = (smoke / "report.md").read_text(encoding="utf-8")
    for claim in report["claims"]:
        assert claim["verdict"] in ("holds", "does not hold", "within noise")
        line = next(line for line in markdown.splitlines() if line.startswith(f"| {claim['claim']} "))
        assert claim["paper"] in line and claim["measured"] in line and f"**{claim['verdict']}**" in line


def test_the_report_shows_figures_that_exist(smoke: Path) -> None:
    markdown = (smoke / "report.md").read_text(encoding="utf-8")
    for name in ("ema_vs_precise.png", "samples.png", "ema_cloud.png"):
        assert f"({name})" in markdown
        assert imread(smoke / name).std() > 0.05, "an empty picture"


def test_wandb_holds_a_run_an_arm_with_the_same_keys_and_a_report_with_the_figures(smoke: Path) -> None:
    runs = wandb_runs(smoke)
    assert set(runs) == {"EMA, seed 0", "PreciseBN, seed 0", "report"}
    for arm in ("EMA, seed 0", "PreciseBN, seed 0"):
        assert "val/error" in runs[arm] and "train/loss" in runs[arm]
    assert "precise_bn/seconds" in runs["PreciseBN, seed 0"] and "precise_bn/seconds" not in runs["EMA, seed 0"]
    for key in ("figures/ema_vs_precise", "figures/samples", "figures/ema_cloud", "claims/holds"):
        assert key in runs["report"]
    assert all('"ema_vs_precise/smoke"' in text for text in runs.values()), "one group"


def test_nothing_warns_on_the_way(command: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert command[1].stderr == ""
    assert "lightning_bn.report" in command[1].stdout.splitlines()[-1]


def test_the_printed_command_reads_the_report_run(command: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    commands = [line.split() for line in command[1].stdout.splitlines() if " leet " in line]
    program, leet, folder = commands[-1]
    assert "report" in subprocess.check_output([program, leet, "inspect", "--summary", folder], text=True)


def test_overrides_arrive_and_weights_are_those_of_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.tolerance.MOST", 100)
    overrides = ["--trainer.max_epochs", "1", "--model.lr", "0.05", "--seeds", "[3,4]", "--samples", "[20]"]
    overrides += ["--tolerances", "[0.1]"]
    main([*TINY, *overrides, "--precise_bn.num_samples", "150", "--draws", "3", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(run["seed"], len(run["errors"])) for run in report["runs"]] == [(3, 1), (3, 1), (4, 1), (4, 1)]
    assert not set(report["runs"][0]["weights"]) & set(report["runs"][2]["weights"])
    assert report["runs"][0]["steps"] == [4], "200 images in batches of 50"
    assert {n: len(errors) for n, errors in report["samples"][0]["errors"].items()} == {"20": 3, "200": 1}
    assert report["about"]["pass_images"] == 150
    assert "0.05" in report["about"]["training"]
    assert [stops["model"] for stops in report["samples_needed"]] == ["epoch 1, seed 3", "epoch 1, seed 4"]
    assert "How many images are needed" in (tmp_path / "report.md").read_text()


def test_the_config_it_writes_repeats_the_run(tmp_path: Path, smoke: Path) -> None:
    main(["--config", str(smoke / "config.yaml"), "--out", str(tmp_path)])
    a, b = (json.loads((folder / "report.json").read_text()) for folder in (smoke, tmp_path))
    assert a["claims"] == b["claims"]
    assert [run["errors"] for run in a["runs"]] == [run["errors"] for run in b["runs"]]
    assert b["about"]["preset"] == "smoke"


def test_data_root_chooses_the_data_and_the_models_input(tmp_path: Path) -> None:
    from tests.recipes.test_images import write_idx

    write_idx(tmp_path)
    parser = make_parser("smoke")
    part = ["--data.train_images", "null", "--data.val_images", "null"]
    made = parser.instantiate(parser.parse_args(["--data-root", str(tmp_path), *part]))
    assert made.data.num_training_images == 40
    assert made.model.network.head.out_features == 10


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_prints_its_settings_as_a_config_that_parses(preset: str, tmp_path: Path) -> None:
    parser = make_parser(preset)
    config = tmp_path / "config.yaml"
    config.write_text(parser.dump(parser.parse_args(["--preset", preset]), skip_link_targets=True))
    again = make_parser("demo").parse_args(["--config", str(config)])
    for key, value in PRESETS[preset].items():
        assert again[key] == value, key


def test_the_full_preset_has_three_seeds() -> None:
    assert len(PRESETS["full"]["seeds"]) >= 3


def test_no_seed_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--seeds \[0\]"):
        main([*TINY, "--seeds", "[]", "--out", str(tmp_path)])


def test_the_list_of_recipes_knows_every_preset_with_its_duration() -> None:
    (recipe,) = (recipe for recipe in all_recipes() if recipe.name == "ema_vs_precise")
    assert {preset.name for preset in recipe.presets} == set(PRESETS)
    assert all(any(digit.isdigit() for digit in preset.duration) for preset in recipe.presets)
    assert as_markdown(all_recipes()).count("\n") >= 1 + len(PRESETS)


def test_python_m_recipes_lists_them_without_importing_torch() -> None:
    code = "import sys, runpy; runpy.run_module('recipes', run_name='__main__'); assert 'torch' not in sys.modules"
    listed = subprocess.check_output([sys.executable, "-c", code], text=True)
    for preset in PRESETS:
        assert f"python -m recipes.ema_vs_precise --preset {preset}" in listed
