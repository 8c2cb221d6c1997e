"""A saved W&B workspace whose first section shows where BN statistics drift."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

IMAGES = ("bn/heatmap", "bn/channels", "bn/lag_noise", "bn/overview")


def wandb_workspace(entity: str, project: str) -> str:
    """Saves a view of the project with the panels of `BNStatsMonitor` on top, and everything else below.

    W&B's automatic workspace sorts panels by name and shows ten lines of one key each; this view puts the figures of
    all layers together first, then all layers' gaps in one panel each, then the pictures with a slider over steps.
    Every call saves another view of the same name. Needs a login (`wandb login`) and the extra `workspace`.

    Args:
        entity: The W&B user or team.
        project: The project, as given to `WandbLogger(project=...)`.

    Returns:
        The view's address.

    Raises:
        ImportError: `wandb-workspaces` is not installed.
    """
    workspace = drift_workspace(entity, project)
    workspace.save()
    return str(workspace.url)


def drift_workspace(entity: str, project: str) -> Workspace:
    """The view of `wandb_workspace`, not saved: nothing here needs a login or a network."""
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
    section = Section(
        name="BatchNorm drift",
        panels=panels,
        is_open=True,
        pinned=True,
        layout_settings=SectionLayoutSettings(columns=3, rows=4),
    )
    return Workspace(
        entity=entity, project=project, name="BatchNorm drift", sections=[section], auto_generate_panels=True
    )
