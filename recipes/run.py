"""Runs a recipe: reads its settings, trains and measures, writes the report, logs to W&B.

A recipe subclasses `Recipe`: it adds settings, measures, judges the paper's claims, and draws. `run` does everything
else. Settings follow LightningCLI's conventions: `--data.batch_size 32 --trainer.max_epochs 5 --config mine.yaml`.
"""

import argparse
import json
import logging
import os
import platform
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import lightning as L
import torch
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined, unused-ignore]
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, WandbLogger
from matplotlib.figure import Figure

from lightning_bn import plots
from recipes import tracking
from recipes.claims import Claim, claims_table
from recipes.listing import Listing

Results = TypeVar("Results")
PresetName = Literal["smoke", "demo", "full"]
TRAINER = {
    "trainer.log_every_n_steps": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_checkpointing": False,
    "trainer.enable_model_summary": False,
    "trainer.enable_progress_bar": False,  # the recipe prints a line per epoch
}
"""Trainer settings of every preset."""

REPORT = """\
# {title}: `{preset}`

{setting}; {seeds}. Took {seconds:.0f} s on {machine}.

## What the paper says, and what was measured

{claims}

{unit} Verdicts follow the fixed rules of `recipes/claims.py`: the ± of a difference is the half-width of its 95 %
interval, over repetitions or over validation images, whichever is wider. If the interval decides neither way, the
verdict is *within noise*.

{sections}

`python -m recipes.{recipe} --config config.yaml` repeats this run ({versions}).
"""


@dataclass(frozen=True)
class Session:
    """One run of a recipe: its settings, and the folder it writes to."""

    recipe: str
    parser: ArgumentParser
    config: Namespace
    folder: Path
    wandb_folders: list[Path] = field(default_factory=list)

    def train(
        self,
        job: str,
        seed: int,
        prepare: Callable[[Namespace], Sequence[Callback]],
        loggers: Sequence[Logger] = (),
    ) -> Namespace:
        """Creates model, data and Trainer from the settings, and trains; returns what was created.

        Args:
            job: Name of this kind of training.
            seed: Seeds the weights and the order of the images.
            prepare: Receives what was created, and returns the callbacks of the training.
            loggers: Used besides W&B.
        """
        print(f"\nTraining: {job}, seed {seed}")
        L.seed_everything(seed, workers=True, verbose=False)
        made: Namespace = self.parser.instantiate(self.config)
        settings = made.trainer.as_dict()
        callbacks = [*(settings.get("callbacks") or []), *prepare(made)]
        logger = [self.wandb_logger(job, f"{job}, seed {seed}"), *loggers]
        trainer = L.Trainer(**{**settings, "callbacks": callbacks, "logger": logger})
        trainer.fit(made.model, datamodule=made.data)
        made.model.to(trainer.strategy.root_device)
        return made

    def wandb_logger(self, job: str, name: str) -> WandbLogger:
        """Starts a W&B run. Runs of one recipe and preset share a group and their keys, so that charts overlay them."""
        group = f"{self.recipe}/{self.config.preset}"
        logger = tracking.wandb_logger(group, job, name, self.folder, self.config.as_dict())
        self.wandb_folders.append(Path(logger.experiment.dir).parent)
        return logger


class Recipe(ABC, Generic[Results]):
    """An experiment of the paper, and the claims that it checks."""

    name: str
    listing: Listing
    title: str  # of the report
    unit: str  # a sentence about the numbers in the report
    presets: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]  # settings of every preset

    @abstractmethod
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Adds the settings of data, model, Trainer and experiment."""

    @abstractmethod
    def measure(self, session: Session) -> Results:
        """Trains, and measures all numbers."""

    @abstractmethod
    def claims(self, results: Results) -> list[Claim]:
        """Judges every claim that these results can decide."""

    @abstractmethod
    def figures(self, results: Results) -> dict[str, Figure]:
        """Draws the figures, by file name."""

    @abstractmethod
    def setting(self, results: Results, config: Namespace) -> str:
        """Describes data, model and training."""

    @abstractmethod
    def table(self, results: Results) -> list[str]:
        """Returns the main table in Markdown, by line; it is printed, too."""

    @abstractmethod
    def sections(self, results: Results, config: Namespace) -> str:
        """Returns the report in Markdown, from after the claims on."""

    @abstractmethod
    def as_json(self, results: Results) -> dict[str, Any]:
        """Returns the numbers for `report.json`."""

    def log(self, logger: WandbLogger, results: Results) -> None:
        """Logs numbers to the W&B run of the report."""

    def parser(self, preset: str) -> ArgumentParser:
        """Creates the parser of all settings, with the preset's values as defaults."""
        parser = ArgumentParser(prog=f"python -m recipes.{self.name}", description=self.listing.shows)
        parser.add_argument("--config", action=ActionConfigFile, help="a file of settings, as from --print_config")
        parser.add_argument("--preset", type=PresetName, default="demo")
        parser.add_argument("--data-root", type=Path | None, default=None, help=self.listing.data)
        parser.add_argument("--out", type=Path | None, default=None, help=f"default: runs/{self.name}/<preset>")
        parser.add_argument(
            "--seeds", type=list[NonNegativeInt], default=[0], help="one training of each kind per seed"
        )
        self.add_arguments(parser)
        parser.link_arguments("data_root", "data.root")
        parser.set_defaults({**TRAINER, **self.defaults, **self.presets[preset]})
        return parser


def start(recipe: Recipe[Any], arguments: Sequence[str] | None = None) -> Session:
    """Parses the arguments, and writes all settings to `config.yaml`."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # the defaults depend on the preset
    first.add_argument("--preset", choices=list(recipe.presets), default="demo")
    parser = recipe.parser(first.parse_known_args(arguments)[0].preset)
    config = parser.parse_args(arguments)
    if not config.seeds:
        raise ValueError("seeds is empty: give at least one, for instance --seeds [0].")
    folder: Path = config.out or Path("runs") / recipe.name / config.preset
    folder.mkdir(parents=True, exist_ok=True)
    settings: Any = parser.dump(config, skip_link_targets=True)
    (folder / "config.yaml").write_text(settings, encoding="utf-8")
    return Session(recipe.name, parser, config, folder)


def run(recipe: Recipe[Results], arguments: Sequence[str] | None = None) -> Path:
    """Runs a recipe; returns the folder with its report."""
    session = start(recipe, arguments)
    print(f"{recipe.listing.paper}: {recipe.listing.shows}. On {machine()}.")
    started = time.perf_counter()
    results = recipe.measure(session)
    claims, figures = recipe.claims(results), recipe.figures(results)
    about = {
        "preset": session.config.preset,
        "setting": recipe.setting(results, session.config),
        "seconds": time.perf_counter() - started,
        "machine": machine(),
        "versions": f"torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}",
    }
    paths = write_report(recipe, session, results, claims, about)
    paths += [plots.save_png(figure, session.folder / f"{name}.png") for name, figure in figures.items()]
    logger = session.wandb_logger("report", "report")
    recipe.log(logger, results)
    tracking.log_report(logger, claims, figures)
    print("", *recipe.table(results), sep="\n")
    for claim in claims:
        print(f"\n{claim.verdict.upper()}: {claim.claim}\n  paper: {claim.paper}\n  here:  {claim.measured}")
    print("", *paths, sep="\n")
    print_commands(session)
    return session.folder


def write_report(
    recipe: Recipe[Results], session: Session, results: Results, claims: Sequence[Claim], about: Mapping[str, Any]
) -> list[Path]:
    """Writes `report.md` and `report.json`; returns their paths."""
    n = len(session.config.seeds)
    markdown = REPORT.format(
        **about,
        recipe=recipe.name,
        title=recipe.title,
        unit=recipe.unit,
        seeds=f"means of {n} seeds" if n > 1 else "1 seed; another seed may change the verdicts",
        claims="\n".join(claims_table(claims)),
        sections=recipe.sections(results, session.config).strip(),
    )
    head = {"recipe": recipe.name, "about": dict(about), "claims": [asdict(claim) for claim in claims]}
    paths = [session.folder / "report.md", session.folder / "report.json"]
    paths[0].write_text(markdown, encoding="utf-8")
    paths[1].write_text(json.dumps({**head, **recipe.as_json(results)}, indent=1), encoding="utf-8")
    return paths


def print_commands(session: Session) -> None:
    """Prints how to view the W&B runs without a login."""
    wandb, folders = tracking.wandb_command(), session.wandb_folders
    print("\nIn W&B, without a login: all runs (space overlays another one), or the report (3 shows its figures)")
    print(f"  {wandb} leet {folders[-1].parent}\n  {wandb} leet {folders[-1]}")
    if "monitor" in session.config:
        print("\nWhat BNStatsMonitor logged in the first training, as an HTML page")
        print(f"  {os.path.relpath(sys.executable)} -m lightning_bn.report {folders[0]}")


def quiet_lightning() -> None:
    """Silences what every Trainer prints about devices and loggers; warnings stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # from Lightning 2.6 with torch 2.15


def machine() -> str:
    threads = torch.get_num_threads()
    cpu = f"{threads} CPU thread{'s' * (threads > 1)}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{device} ({platform.system()} {platform.machine()})"
