"""The recipe of Table 5: three trainings fill six rows, levels have objects, verdicts are decided by the numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, hub, nn

import lightning_bn as lbn
from recipes.average_precision import AP
from recipes.detection import Parts
from recipes.scenes import SceneData, as_lists
from recipes.shared_head.__main__ import main, make_parser
from recipes.shared_head.claims import ORDERINGS, PAPER, claims
from recipes.shared_head.detector import HEADS, Detector
from recipes.shared_head.experiment import ROWS, TRAININGS, Results, Row, shared_head
from tests.recipes.offline import offline  # noqa: F401

SCHEDULE = Path(__file__).parents[2] / "recipes" / "shared_head" / "coco.yaml"


@pytest.fixture(scope="module")
def data() -> SceneData:
    return of_demo(train_images=40, val_images=4)


def of_demo(**settings: Any) -> SceneData:
    config = make_parser("demo").parse_args([]).data.as_dict()
    return SceneData(**{**config, **settings})


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    main(["--preset", "smoke", "--out", str(folder)])
    return folder


def test_one_training_fills_two_rows(smoke: Path) -> None:
    report = json.loads((smoke / "report.json").read_text())
    assert [row["row"] for row in report["rows"]] == [3, 4]
    assert report["rows"][0]["seconds"] == report["rows"][1]["seconds"], "trained once"
    assert (report["ranks"], report["steps"], report["images_per_step"], report["levels"]) == (1, 4, 4, 4)
    assert len(report["claims"]) == 1


def test_the_report_has_the_papers_numbers_and_a_picture(smoke: Path) -> None:
    markdown = (smoke / "report.md").read_text()
    assert "| 3 | domain | shared | shared | 34.1 |" in markdown
    assert (smoke / "ap.png").stat().st_size > 5000 and list((smoke / "wandb").glob("offline-run-*"))


def test_two_rows_of_a_training_differ_in_the_population_statistics_alone() -> None:
    assert sorted(row for both in TRAININGS for row in both) == list(ROWS)
    for (shared, domain), trained in TRAININGS.items():
        assert ROWS[domain] == trained and trained.population == "domain"
        assert ROWS[shared] == trained._replace(population="shared")


class Recorded(Detector):
    """Keeps what its first shared layer was evaluated with, in place of APs."""

    seen: list[Any]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        layer: Any = self.model.head.classification_head.conv[0][1]  # type: ignore[union-attr, index]
        buffers = {name: value.clone() for name, value in layer.named_buffers()}
        self.seen.append((buffers, hasattr(layer, "domain_weight"), digest(self.parameters())))
        super().validation_step(batch, batch_idx)


def digest(parameters: Any) -> float:
    return float(sum(p.detach().double().abs().sum() for p in parameters))


@pytest.mark.filterwarnings("ignore")
def test_rows_of_a_training_are_one_model_with_the_statistics_of_their_row() -> None:
    seen: list[Any] = []

    def make() -> Parts[Detector]:
        torch.set_num_threads(1)
        model = Recorded(pretrained=False, warmup_steps=1)
        model.seen = seen
        quiet = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False}
        return Parts(model, of_demo(train_images=8, val_images=1), quiet)

    found = shared_head(make, precise_images=8, parts=1, say=lambda line: None)
    assert [row.row for row in found.rows] == list(ROWS) and found.steps == 2
    for row, (buffers, own_affine, weights) in zip(ROWS, seen, strict=True):
        assert ("domain_mean" in buffers) == (ROWS[row].population == "domain")
        assert own_affine == (ROWS[row].affine == "domain")
        assert weights == seen[row - 1 + row % 2][2], "one training"
    assert len({weights for _, _, weights in seen}) == 3
    mean = seen[1][0]["domain_mean"]
    assert mean.shape[0] == 4 and (mean[0] - mean[2]).abs().max() > 0.01, "levels differ"


@pytest.mark.parametrize("detector", ["retinanet", "fcos"])
def test_only_the_head_has_batch_norm_which_every_level_runs_through(
    detector: Literal["retinanet", "fcos"], data: SceneData
) -> None:
    model = Detector(detector=detector, pretrained=False)
    layers = lbn.find_bn(model)
    assert len(layers) == 8 and list(lbn.find_bn(model, f"{HEADS}.*")) == list(layers)
    assert not any(isinstance(module, nn.GroupNorm) for module in model.modules())
    shown: list[Tensor] = []
    first = next(iter(layers.values()))
    first.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    model.training_step(as_lists([data.train_set[0], data.train_set[1]]), 0).backward()
    assert [x.shape[-1] for x in shown] == [16, 8, 4, 2]
    assert all(layer.weight.grad is not None for layer in layers.values())


def test_objects_are_found_by_three_levels(data: SceneData) -> None:
    """Which level's anchors overlap an object most."""
    model = Detector(pretrained=False)
    net: Any = model.model
    images = torch.zeros(1, 3, 128, 128)
    pyramid = list(net.backbone(images).values())
    anchors = net.anchor_generator(net.transform(list(images))[0], pyramid)[0]
    level = torch.repeat_interleave(torch.arange(4), torch.tensor([9 * x.shape[-1] ** 2 for x in pyramid]))
    boxes = torch.cat([data.train_set[index][1]["boxes"] for index in range(40)])
    from torchvision.ops import box_iou

    best = level[box_iou(boxes, anchors).argmax(1)].bincount(minlength=4) / len(boxes)
    assert (best[:3] > 0.1).all(), best


def results(ap: dict[int, float], spread: float = 0.02) -> Results:
    """Three seeds and four parts, whose APs spread around these."""
    rows = []
    for seed in range(3):
        for row, of_row in ap.items():
            own = torch.Generator().manual_seed(100 * seed + row)
            parts = (of_row + spread * torch.randn(5, generator=own)).tolist()
            rows.append(Row(row, seed, AP(parts[0], parts[1:]), 1.0))
    return Results("data", 4, 1, 10, 4, 20, rows)


def test_the_papers_own_numbers_hold_and_reversed_ones_do_not() -> None:
    assert {claim.verdict for claim in claims(results(PAPER))} == {"holds"}
    turned = claims(results({row: 80 - ap for row, ap in PAPER.items()}))
    ordered = [claim for claim in turned if "as good" not in claim.claim]
    assert len(ordered) == 6 and {claim.verdict for claim in ordered} == {"does not hold"}


def test_a_wide_spread_decides_nothing() -> None:
    assert {claim.verdict for claim in claims(results(PAPER, spread=200.0))} == {"within noise"}


def test_claims_need_their_rows_only_and_every_row_has_one() -> None:
    some = replace(results(PAPER), rows=[row for row in results(PAPER).rows if row.row in (3, 4)])
    assert [claim.paper for claim in claims(some)] == ["39.1 and 34.1"]
    assert {row for _, a, b, _ in ORDERINGS for row in (a, b)} == set(PAPER) == set(ROWS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"seeds": []}, "seeds is empty"), ({"rows": [7]}, "rows must be some of 1, 2"), ({"rows": []}, "rows must be")],
)
def test_impossible_settings_are_refused_before_any_training(settings: dict[str, Any], words: str) -> None:
    def make() -> Parts[Detector]:
        raise AssertionError("nothing is made")

    with pytest.raises(ValueError, match=words):
        shared_head(make, **settings)


def test_ragged_steps_are_refused(data: SceneData) -> None:
    with pytest.raises(ValueError, match="images_per_step is 6, but a training has 8 images on its 2 ranks"):
        shared_head(lambda: Parts(Detector(pretrained=False), data, {}), ranks=2, images_per_step=6)


def test_the_config_of_the_papers_schedule_is_read() -> None:
    config = make_parser("demo").parse_args(["--config", str(SCHEDULE), "--data-root", "coco"])
    assert (
        config.data.root == Path("coco") and config.images_per_step == 16 == config.ranks * config.data.images_per_gpu
    )
    assert config.trainer.max_steps == 270_000
    assert Detector(**{**config.model.as_dict(), "pretrained": False}).levels == 5


def test_weights_that_cannot_be_fetched_are_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"mobilenet_v2-.* cannot be fetched .*{tmp_path}/checkpoints"):
        Detector(pretrained=True)
