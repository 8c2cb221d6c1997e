"""What a recipe says about itself, and the list of all recipes.

A recipe is a package in this folder whose `__init__` holds `RECIPE`, so the list is complete without being
kept by hand, and is printed without importing torch.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import recipes


@dataclass(frozen=True)
class Preset:
    """One size of an experiment: what it runs on, and how long that took on two CPU cores."""

    name: str
    runs: str
    duration: str


@dataclass(frozen=True)
class Recipe:
    """One experiment: `python -m recipes.<name> --preset <preset>`."""

    name: str
    paper: str  # the tables and figures it reproduces
    shows: str
    data: str
    presets: Sequence[Preset]


def all_recipes() -> Iterator[Recipe]:
    """Every recipe there is, by name."""
    for module in pkgutil.iter_modules(recipes.__path__):
        if module.ispkg:
            recipe: Recipe = importlib.import_module(f"recipes.{module.name}").RECIPE
            yield recipe


def as_markdown(found: Iterator[Recipe]) -> str:
    """The table that README shows: a row per recipe and preset."""
    lines = ["| recipe | paper | shows | data | preset | on | takes (2 CPU cores) |", "|---" * 7 + "|"]
    for recipe in found:
        for index, preset in enumerate(recipe.presets):
            cells = [f"`{recipe.name}`", recipe.paper, recipe.shows, recipe.data] if index == 0 else [""] * 4
            lines.append("| " + " | ".join((*cells, f"`{preset.name}`", preset.runs, preset.duration)) + " |")
    return "\n".join(lines)


def as_text(found: Iterator[Recipe]) -> str:
    """The list that `python -m recipes` prints."""
    blocks = []
    for recipe in found:
        block = [f"{recipe.name}  ({recipe.paper})", f"  {recipe.shows}", f"  data: {recipe.data}"]
        for preset in recipe.presets:
            command = f"python -m recipes.{recipe.name} --preset {preset.name}"
            block.append(f"    {command:<52} {preset.duration:<9} {preset.runs}")
        blocks.append("\n".join(block))
    return "\n\n".join(blocks)
