"""A saved W&B workspace with the panels of `BNStatsMonitor` first."""

from __future__ import annotations

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
        raise ImportError(
            "wandb_workspace needs the package wandb-workspaces: pip install 'lightning-bn[workspace]'."
        ) from error

    def lines(title: str, *names: str, log: bool = True) -> LinePlot:
        keys: list[Any] = [f"bn_agg/{name}" for name in names]
        return LinePlot(title=title, x="trainer/global_step", y=keys, log_y=log)

    def layers(title: str, prefix: str) -> LinePlot:
        return LinePlot(title=title, x="trainer/global_step", metric_regex=f"{prefix}/.*", log_y=True)

    panels: list[Any] = [
        lines("mean gap over all layers (σ)", "mean_gap_p50", "mean_gap_p95", "mean_gap_max"),
        lines("variance gap over all layers (log ratio)", "var_gap_p95", "var_gap_max"),
        lines("worst lag (stale EMA) and worst noise (small batch)", "lag_max", "noise_max"),
        lines("number of the worst layer", "worst_layer", log=False),
        lines("dead channels, layers not finite", "dead_channels", "nonfinite_layers", log=False),
        layers("mean gap of each layer (σ)", "bn_mean_gap"),
        layers("variance gap of each layer (log ratio)", "bn_var_gap"),
        *(MediaBrowser(title=key, media_keys=[key], mode="gallery", gallery_axis="step") for key in IMAGES),
    ]
    layout = SectionLayoutSettings(columns=3, rows=4)
    name = "BatchNorm drift"
    section = Section(name=name, panels=panels, is_open=True, pinned=True, layout_settings=layout)
    return Workspace(entity=entity, project=project, name=name, sections=[section], auto_generate_panels=True)
