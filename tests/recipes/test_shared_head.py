"""The recipe of Table 5: its levels, its three trainings for six rows, and what its command writes."""

import json
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from torch import Tensor, hub, nn

import lightning_bn as lbn
from recipes.scenes import SceneData, as_lists
from recipes.shared_head import experiment
from recipes.shared_head.__main__ import SharedHead, main
from recipes.shared_head.detector import HEADS, Detector
from recipes.shared_head.experiment import ROWS, TRAININGS
from tests.callbacks.zoo import raising

TINY = ["--preset", "smoke", "--data.train_images", "8", "--data.val_images", "1", "--model.warmup_steps", "1"]
TINY += ["--rows", "[1,2,3,4,5,6]", "--parts", "1"]


class Recorded(Detector):
    """Records the state of its first shared layer in every evaluation."""

    seen: list[tuple[dict[str, Tensor], bool, float]]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        layer: Any = self.model.head.classification_head.conv[0][1]  # type: ignore[union-attr, index]
        buffers = {name: value.clone() for name, value in layer.named_buffers()}
        digest = float(sum(p.detach().double().abs().sum() for p in self.parameters()))
        self.seen.append((buffers, hasattr(layer, "domain_weight"), digest))
        super().validation_step(batch, batch_idx)


@pytest.fixture(scope="module")
def data() -> SceneData:
    config = SharedHead().parser("demo").parse_args([]).data.as_dict()
    return SceneData(**{**config, "train_images": 40, "val_images": 4})


@pytest.mark.filterwarnings("ignore")
def test_two_rows_are_one_training_with_the_statistics_of_each_row_and_the_report_has_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorded.seen = []
    monkeypatch.setattr(experiment, "Detector", Recorded)
    command = main([*TINY, "--out", str(tmp_path)])
    report = json.loads((command / "report.json").read_text())
    assert [row["row"] for row in report["rows"]] == list(ROWS)
    assert report["rows"][0]["seconds"] == report["rows"][1]["seconds"], "trained once"
    assert (report["ranks"], report["steps"], report["images_per_step"], report["levels"]) == (1, 2, 4, 4)
    for row, (buffers, separate_affine, digest) in zip(ROWS, Recorded.seen, strict=True):
        assert ("domain_mean" in buffers) == (ROWS[row].population_statistics == "domain")
        assert separate_affine == (ROWS[row].affine == "domain")
        assert digest == Recorded.seen[row - 1 + row % 2][2], "one training"
    assert len({digest for _, _, digest in Recorded.seen}) == 3
    mean = Recorded.seen[1][0]["domain_mean"]
    assert mean.shape[0] == 4 and (mean[0] - mean[2]).abs().max() > 0.5 * mean.abs().max(), "levels differ"

    assert "| 3 | domain | shared | shared | 34.1 |" in (command / "report.md").read_text()
    assert (command / "ap.png").stat().st_size > 5000 and list((command / "wandb").glob("offline-run-*"))


def test_two_rows_of_a_training_differ_in_the_population_statistics_alone() -> None:
    for (shared, domain), trained in TRAININGS.items():
        assert ROWS[domain] == trained and trained.population_statistics == "domain"
        assert ROWS[shared] == trained._replace(population_statistics="shared")


@pytest.mark.parametrize("detector", ["retinanet", "fcos"])
def test_only_the_head_has_batch_norm_which_runs_on_every_level(detector: Any, data: SceneData) -> None:
    model = Detector(detector=detector, pretrained=False)
    layers = lbn.find_bn(model)
    assert len(layers) == 8 and list(lbn.find_bn(model, f"{HEADS}.*")) == list(layers)
    assert not any(isinstance(module, nn.GroupNorm) for module in model.modules())
    inputs: list[Tensor] = []
    first = next(iter(layers.values()))
    first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.training_step(as_lists([data.train_set[0], data.train_set[1]]), 0).backward()
    assert [x.shape[-1] for x in inputs] == [16, 8, 4, 2]
    assert all(layer.weight.grad is not None for layer in layers.values())


def test_weights_that_cannot_be_downloaded_are_an_error_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "download_url_to_file", raising(URLError("no network")))
    monkeypatch.setattr(hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"mobilenet_v2-.* cannot be downloaded .*{tmp_path}/checkpoints"):
        Detector(pretrained=True)
