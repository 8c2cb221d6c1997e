"""The saved W&B workspace holds the drift panels, and building it needs no login."""

import sys

import pytest

from lightning_bn.plots.workspace import IMAGES, drift_workspace, wandb_workspace
from lightning_bn.tracking.drift import AGGREGATES


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_the_first_section_shows_every_aggregate_every_layer_and_every_picture() -> None:
    pytest.importorskip("wandb_workspaces")
    view = drift_workspace("someone", "resnet")._to_model()
    assert (view.entity, view.project) == ("someone", "resnet")
    first = view.spec.section.panel_bank_config.sections[0]
    assert first.is_open and first.name == "BatchNorm drift"
    configs = [panel.config for panel in first.panels]
    lines = [config for config in configs if hasattr(config, "metrics")]
    assert {key for config in lines for key in config.metrics or []} == {f"bn_agg/{name}" for name in AGGREGATES}
    by_layer = [config.metric_regex for config in lines if config.use_metric_regex]
    assert by_layer == ["bn_mean_gap/.*", "bn_var_gap/.*"]
    assert {config.x_axis for config in lines} == {"trainer/global_step"}
    assert [config.media_keys for config in configs if hasattr(config, "media_keys")] == [[key] for key in IMAGES]


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2.interface", None)
    with pytest.raises(ImportError, match=r"lightning-bn\[workspace\]"):
        wandb_workspace("someone", "resnet")
