"""The list of recipes: the packages of this folder, described by the `LISTING` in their `__init__`, without torch."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import recipes


@dataclass(frozen=True)
class Listing:
    """Describes one recipe: `python -m recipes.<name> --preset <preset>`."""

    paper: str  # the tables and figures that it repeats
    shows: str
    data: str
    presets: Mapping[str, tuple[str, str]]  # name -> what it runs on, and how long that takes on two CPU cores

    def as_text(self, name: str) -> str:
        lines = [f"{name}  ({self.paper})", f"  {self.shows}", f"  data: {self.data}"]
        for preset, (size, duration) in self.presets.items():
            lines.append(f"    {f'python -m recipes.{name} --preset {preset}':<52} {duration:<9} {size}")
        return "\n".join(lines)


def all_recipes() -> Iterator[tuple[str, Listing]]:
    for module in pkgutil.iter_modules(recipes.__path__):
        if module.ispkg:
            yield module.name, importlib.import_module(f"recipes.{module.name}").LISTING
