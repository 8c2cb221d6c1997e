"""Reads back what `BNStatsMonitor` logged: an HTML page of a run, and a W&B workspace of a project."""

from lightning_bn.report.page import run_page, write_report
from lightning_bn.report.runs import LoggedRun, Table, read_run
from lightning_bn.report.workspace import wandb_workspace

__all__ = ["LoggedRun", "Table", "read_run", "run_page", "wandb_workspace", "write_report"]
