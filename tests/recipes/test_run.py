"""What all recipes share: the list, presets, settings."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.batch_leakage.__main__ import BatchLeakageRecipe
from recipes.batch_leakage.data import LeakyData
from recipes.ema_vs_precise.__main__ import EMAVsPrecise
from recipes.images import ImageData
from recipes.listing import all_recipes
from recipes.precise_batch_size.__main__ import PreciseBatchSize
from recipes.roi_head_leakage.__main__ import RoIHeadLeakage
from recipes.run import Recipe, start
from recipes.scenes import SceneData
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


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        (EMAVsPrecise(), "--seeds []", r"--seeds \[0\]"),
        (PreciseBatchSize(), "--data.batch_size 20 --nbs [32,2]", "nbs 32 is larger than the batch of 20"),
        (PreciseBatchSize(), "--data.train_images 120 --images 200", "images is 200, but there are only 120"),
        (RoIHeadLeakage(), "--trainings [bn-3]", "trainings must be some of bn-1"),
        (RoIHeadLeakage(), "--trainings [bn-2] --images_per_step 6", "bn-2 has batches of 4 images on 2 ranks"),
        (SharedHead(), "--rows [7]", "rows must be some of 1, 2"),
        (SharedHead(), "--ranks 2 --images_per_step 6", "a training has batches of 8 images on 2 ranks"),
    ],
)
def test_impossible_settings_are_errors_before_any_training(
    recipe: Recipe[Any], settings: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.measure(start(recipe, ["--preset", "smoke", *settings.split(), "--out", str(tmp_path)]))


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (LeakyData, {"classes": 0}, "data.classes must be at least 1"),
        (LeakyData, {"train_images": -5}, "data.train_images must be at least 1"),
        (SceneData, {"train_images": 0}, "data.train_images must be at least 1"),
        (SceneData, {"images_per_gpu": 0}, "data.images_per_gpu must be at least 1"),
        (SceneData, {"object_sizes": (-1, 0.2)}, "data.object_sizes must be fractions"),
        (ImageData, {"train_images": 5000}, "only 4,000 images, not 5,000"),
    ],
)
def test_impossible_amounts_are_errors_that_name_them(data: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(**settings)


@pytest.mark.parametrize("recipe", [RoIHeadLeakage(), SharedHead()], ids=lambda recipe: recipe.name)
def test_the_config_of_the_papers_schedule_can_be_parsed(recipe: Recipe[Any]) -> None:
    schedule = Path(__file__).parents[2] / "recipes" / recipe.name / "coco.yaml"
    config = recipe.parser("demo").parse_args(["--config", str(schedule), "--data-root", "coco"])
    assert config.data.root == Path("coco") and config.images_per_step == 16 and config.trainer.max_steps == 270_000
