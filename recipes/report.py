"""What every recipe's report is made of: files in a folder, W&B runs, and the verdicts in both.

W&B runs of one recipe and preset share a group and their keys, so that its charts overlay them.
"""

import json
import netrc
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from lightning_bn import plots
from recipes.claims import Claim


def write_report(folder: Path, markdown: str, plain: Mapping[str, Any], figures: Mapping[str, Figure]) -> list[Path]:
    """Writes the figures and both reports; returns their paths."""
    paths = [plots.save_png(figure, folder / f"{name}.png") for name, figure in figures.items()]
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
    return [folder / "report.md", folder / "report.json", *paths]


def wandb_logger(recipe: str, preset: str, job: str, name: str, folder: Path, config: Mapping[str, Any]) -> WandbLogger:
    """A logger with a W&B run of its own, offline unless the user is logged in or `WANDB_MODE` says other."""
    wandb.finish()  # a WandbLogger would go on writing to a run that is still open
    run = wandb.init(
        project="lightning_bn",
        group=f"{recipe}/{preset}",
        job_type=job,
        name=name,
        dir=folder,
        config=dict(config),
        mode=None if "WANDB_MODE" in os.environ or _logged_in() else "offline",
        settings=wandb.Settings(silent=True, console="off"),
    )
    # WandbLogger defines its axis only for runs that it makes itself.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run)


def about(preset: str, training: str, started: float) -> dict[str, Any]:
    """What a report says of the run that began at `started` by the performance counter."""
    seconds = time.perf_counter() - started
    return {"preset": preset, "training": training, "seconds": seconds, "machine": machine(), "versions": versions()}


def conclude(
    logger: WandbLogger,
    verdicts: Sequence[Claim],
    figures: Mapping[str, Figure],
    table: Sequence[str],
    paths: Sequence[Path],
    step: int = 0,
) -> None:
    """Logs figures and verdicts to the report's W&B run, closes it, and prints what there is and where.

    Args:
        logger: Of the report's run.
        verdicts: What became of the paper's claims.
        figures: By name.
        table: Lines of Markdown, the recipe's result in short.
        paths: Files that were written.
        step: Of the run that the figures show.
    """
    for name, figure in figures.items():
        plots.log_figure(logger, f"figures/{name}", figure, step)
    run = logger.experiment
    columns: list[str | int] = ["claim", "paper", "measured", "verdict"]
    run.log({"claims": wandb.Table(columns=columns, data=[list(asdict(claim).values()) for claim in verdicts])})
    for verdict in ("holds", "does not hold", "within noise"):
        run.summary[f"claims/{verdict}"] = sum(claim.verdict == verdict for claim in verdicts)
    folder = Path(run.dir).parent
    wandb.finish()
    wandb.teardown()  # finish() may return before the file is complete

    print("", *table, sep="\n")
    for claim in verdicts:
        print(f"\n{claim.verdict.upper()}: {claim.claim}\n  paper: {claim.paper}\n  here:  {claim.measured}")
    print("", *paths, sep="\n")
    print("\nIn W&B, without a login: all runs (space overlays one more), or the report (3 shows its figures)")
    print(f"  {_wandb_command()} leet {folder.parent}\n  {_wandb_command()} leet {folder}")


def claims_table(verdicts: Sequence[Claim]) -> list[str]:
    lines = ["| claim | paper | measured here | verdict |", "|---|---|---|---|"]
    return lines + [f"| {c.claim} | {c.paper} | {c.measured} | **{c.verdict}** |" for c in verdicts]


def machine() -> str:
    threads = torch.get_num_threads()
    cpu = f"{threads} CPU thread{'s' * (threads > 1)}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{device} ({platform.system()} {platform.machine()})"


def versions() -> str:
    return f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"


def _logged_in() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host))
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def _wandb_command() -> str:
    """How to call wandb from here: by name if that finds it, else the one beside this Python."""
    beside = Path(sys.executable).parent / "wandb"
    return "wandb" if shutil.which("wandb") else os.path.relpath(beside)
