"""W&B for recipes: offline unless the user is logged in."""

import netrc
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from lightning_bn import plots
from recipes.claims import Claim


def wandb_logger(group: str, job: str, name: str, folder: Path, config: Mapping[str, Any]) -> WandbLogger:
    """Starts a W&B run: offline unless the user is logged in or `WANDB_MODE` is set."""
    wandb.finish()  # else WandbLogger would continue the previous run
    run = wandb.init(
        project="lightning_bn",
        group=group,
        job_type=job,
        name=name,
        dir=folder,
        config=dict(config),
        mode=None if "WANDB_MODE" in os.environ or _logged_in() else "offline",
        settings=wandb.Settings(silent=True, console="off"),
    )
    # WandbLogger defines its step axis only for runs that it starts itself.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run)


def log_report(logger: WandbLogger, claims: Sequence[Claim], figures: Mapping[str, Figure]) -> None:
    """Logs figures and verdicts, and ends the run."""
    for name, figure in figures.items():
        plots.log_figure(logger, key=f"figures/{name}", figure=figure, step=0)
    run = logger.experiment
    columns: list[str | int] = ["claim", "paper", "measured", "verdict"]
    run.log({"claims": wandb.Table(columns=columns, data=[list(asdict(claim).values()) for claim in claims])})
    for verdict in ("holds", "does not hold", "within noise"):
        run.summary[f"claims/{verdict}"] = sum(claim.verdict == verdict for claim in claims)
    wandb.finish()
    wandb.teardown()  # finish() may return before the file is complete


def wandb_command() -> str:
    """Returns how to call wandb: by its name, or by the path beside this Python if it is not on PATH."""
    beside = Path(sys.executable).parent / "wandb"
    return "wandb" if shutil.which("wandb") else os.path.relpath(beside)


def _logged_in() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host))
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
