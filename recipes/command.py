"""What every recipe's command does alike: a preset's values as defaults, and a config that repeats the run."""

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace  # type: ignore[attr-defined, unused-ignore]

TRAINER = {
    "trainer.devices": 1,
    "trainer.deterministic": True,
    "trainer.log_every_n_steps": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_checkpointing": False,
    "trainer.enable_model_summary": False,
    "trainer.enable_progress_bar": False,  # a line an epoch says more
}
"""Settings of every preset's Trainer."""


def read_arguments(
    recipe: str,
    presets: Iterable[str],
    make_parser: Callable[[str], ArgumentParser],
    arguments: Sequence[str] | None,
) -> tuple[ArgumentParser, Namespace, Path]:
    """The parser, its arguments, and the folder to write to, which already holds them as config.yaml."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # the defaults depend on the preset
    first.add_argument("--preset", choices=list(presets), default="demo")
    parser = make_parser(first.parse_known_args(arguments)[0].preset)
    config = parser.parse_args(arguments)
    folder: Path = config.out or Path("runs") / recipe / config.preset
    folder.mkdir(parents=True, exist_ok=True)
    settings: Any = parser.dump(config, skip_link_targets=True)
    (folder / "config.yaml").write_text(settings, encoding="utf-8")
    return parser, config, folder


def quiet_lightning() -> None:
    """Lets warnings through but not what every single Trainer has to say about devices and loggers."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning 2.6 on torch 2.15; nothing a user could change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
