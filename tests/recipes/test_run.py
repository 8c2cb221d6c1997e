"""What all recipes share: the list, presets, settings."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.batch_leakage.__main__ import BatchLeakageRecipe
from recipes.ema_vs_precise.__main__ import EMAVsPrecise
from recipes.listing import all_recipes
from recipes.precise_batch_size.__main__ import PreciseBatchSize
from recipes.roi_head_leakage.__main__ import RoIHeadLeakage
from recipes.run import Recipe, start
from recipes.shared_head.__main__ import SharedHead
from tests.recipes.test_images import write_idx

RECIPES = [EMAVsPrecise(), PreciseBatchSize(), BatchLeakageRecipe(), RoIHeadLeakage(), SharedHead()]


def test_python_m_recipes_lists_every_preset_without_importing_torch() -> None:
    code = "import sys, runpy; runpy.run_module('recipes', run_name='__main__'); assert 'torch' not in sys.modules"
    listed = subprocess.check_output([sys.executable, "-c", code], text=True)
    for recipe in RECIPES:
        for preset in recipe.presets:
            assert f"python -m recipes.{recipe.name} --preset {preset}" in listed


def test_every_recipe_has_a_listing_with_the_duration_of_its_presets() -> None:
    assert {recipe.name: recipe.listing for recipe in RECIPES} == dict(all_recipes())
    for recipe in RECIPES:
        assert list(recipe.listing.presets) == list(recipe.presets) == ["smoke", "demo", "full"]
        assert all(any(map(str.isdigit, duration)) for _, duration in recipe.listing.presets.values())
        assert len(recipe.presets["full"]["seeds"]) >= 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_config_of_a_preset_has_its_settings_and_can_be_parsed(recipe: Recipe[Any], tmp_path: Path) -> None:
    parser = recipe.parser("full")
    config = tmp_path / "config.yaml"
    config.write_text(parser.dump(parser.parse_args(["--preset", "full"]), skip_link_targets=True))
    again = recipe.parser("demo").parse_args(["--config", str(config)])
    for key, value in recipe.presets["full"].items():
        assert again[key] == value, key


def test_data_root_chooses_the_data_and_the_models_input(tmp_path: Path) -> None:
    write_idx(tmp_path)
    all_images = ["--data.train_images", "null", "--data.val_images", "null", "--out", str(tmp_path / "out")]
    session = start(EMAVsPrecise(), ["--preset", "smoke", "--data-root", str(tmp_path), *all_images])
    made = session.parser.instantiate(session.config)
    assert made.data.num_training_images == 40
    assert made.model.network.head.out_features == 10


def test_no_seed_is_an_error_with_an_example(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--seeds \[0\]"):
        start(EMAVsPrecise(), ["--seeds", "[]", "--out", str(tmp_path)])


@pytest.mark.parametrize("recipe", [RoIHeadLeakage(), SharedHead()], ids=lambda recipe: recipe.name)
def test_the_config_of_the_papers_schedule_can_be_parsed(recipe: Recipe[Any]) -> None:
    schedule = Path(__file__).parents[2] / "recipes" / recipe.name / "coco.yaml"
    config = recipe.parser("demo").parse_args(["--config", str(schedule), "--data-root", "coco"])
    assert config.data.root == Path("coco") and config.images_per_step == 16 and config.trainer.max_steps == 270_000
