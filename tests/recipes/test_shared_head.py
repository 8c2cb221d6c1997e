"""The recipe of Table 5: its levels, its three trainings for six rows, and what its command writes."""

import json
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, hub, nn

import lightning_bn as lbn
from recipes.scenes import SceneData, as_lists
from recipes.shared_head import experiment
from recipes.shared_head.__main__ import SharedHead, main
from recipes.shared_head.detector import HEADS, Detector
from recipes.shared_head.experiment import ROWS, TRAININGS

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


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    Recorded.seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "Detector", Recorded)
        return main([*TINY, "--out", str(tmp_path_factory.mktemp("smoke"))])


@pytest.mark.filterwarnings("ignore")
def test_two_rows_are_one_training_with_the_statistics_of_each_row_and_the_report_has_the_papers(command: Path) -> None:
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

    markdown = (command / "report.md").read_text()
    assert "| 3 | domain | shared | shared | 34.1 |" in markdown and "**" in markdown
    assert (command / "ap.png").stat().st_size > 5000 and list((command / "wandb").glob("offline-run-*"))


def test_two_rows_of_a_training_differ_in_the_population_statistics_alone() -> None:
    for (shared, domain), trained in TRAININGS.items():
        assert ROWS[domain] == trained and trained.population_statistics == "domain"
        assert ROWS[shared] == trained._replace(population_statistics="shared")


@pytest.mark.parametrize("detector", ["retinanet", "fcos"])
def test_only_the_head_has_batch_norm_which_runs_on_every_level(
    detector: Literal["retinanet", "fcos"], data: SceneData
) -> None:
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


def test_three_levels_have_objects(data: SceneData) -> None:
    """A level has an object if its anchors overlap it most."""
    from torchvision.ops import box_iou

    net: Any = Detector(pretrained=False).model
    images = torch.zeros(1, 3, 128, 128)
    pyramid = list(net.backbone(images).values())
    anchors = net.anchor_generator(net.transform(list(images))[0], pyramid)[0]
    level = torch.repeat_interleave(torch.arange(4), torch.tensor([9 * x.shape[-1] ** 2 for x in pyramid]))
    boxes = torch.cat([data.train_set[index][1]["boxes"] for index in range(40)])
    best = level[box_iou(boxes, anchors).argmax(1)].bincount(minlength=4) / len(boxes)
    assert (best[:3] > 0.1).all(), best


def test_weights_that_cannot_be_downloaded_are_an_error_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"mobilenet_v2-.* cannot be downloaded .*{tmp_path}/checkpoints"):
        Detector(pretrained=True)
