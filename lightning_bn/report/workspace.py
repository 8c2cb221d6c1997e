"""A saved W&B workspace with the panels of `BNStatsMonitor` first."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

IMAGES = ("bn/heatmap", "bn/channels", "bn/lag_noise", "bn/overview")


def wandb_workspace(entity: str, *, project: str) -> str:
    """Saves a view of a W&B project whose first section shows where BatchNorm statistics drift.

    Each call saves another view of the same name. Needs `wandb login` and the extra `workspace`.

    Args:
        entity: The W&B user or team.
        project: The project, as in `WandbLogger(project=...)`.

    Returns:
        The address of the view.

    Raises:
        ImportError: `wandb-workspaces` is not installed.
    """
    workspace = drift_workspace(entity, project)
    workspace.save()
    return str(workspace.url)


def drift_workspace(entity: str, project: str) -> Workspace:
    """Builds the view of `wandb_workspace` without login or network."""
    try:
        from wandb_workspaces.reports.v2.interface import LinePlot, MediaBrowser
        from wandb_workspaces.workspaces import Section, SectionLayoutSettings, Workspace
    except ImportError as error:
        message = "wandb_workspace needs the package wandb-workspaces: pip install 'lightning-bn[workspace]'."
        raise ImportError(message) from error

    def of_all(*names: str) -> list[Any]:
        return [f"bn_agg/{name}" for name in names]

    chart = functools.partial(LinePlot, x="trainer/global_step", log_y=True)
    few = functools.partial(chart, log_y=False)
    panels: list[Any] = [
        chart(title="mean gap over all layers (σ)", y=of_all("mean_gap_p50", "mean_gap_p95", "mean_gap_max")),
        chart(title="variance gap over all layers (log ratio)", y=of_all("var_gap_p95", "var_gap_max")),
        chart(title="worst lag (stale EMA) and worst noise (small batch)", y=of_all("lag_max", "noise_max")),
        few(title="number of the worst layer", y=of_all("worst_layer")),
        few(title="dead channels, layers not finite", y=of_all("dead_channels", "nonfinite_layers")),
        chart(title="mean gap of each layer (σ)", metric_regex="bn_mean_gap/.*"),
        chart(title="variance gap of each layer (log ratio)", metric_regex="bn_var_gap/.*"),
        *(MediaBrowser(title=key, media_keys=[key], mode="gallery", gallery_axis="step") for key in IMAGES),
    ]
    layout = SectionLayoutSettings(columns=3, rows=4)
    name = "BatchNorm drift"
    section = Section(name=name, panels=panels, is_open=True, pinned=True, layout_settings=layout)
    return Workspace(entity=entity, project=project, name=name, sections=[section], auto_generate_panels=True)
