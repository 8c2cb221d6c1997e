"""RoIShuffleCallback: fits on two ranks, torchvision's detectors as they are, and resuming."""

from __future__ import annotations

import copy
import os
import re
import signal
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

import lightning_bn as lbn
from lightning_bn import RoIShuffleCallback
from tests.callbacks.zoo import At, Images, TinyNet, digest, fit, said, statistics_of, train_loader
from tests.ranks import run_on_ranks

ON_TWO_RANKS: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}


class Scenes(torch.utils.data.Dataset[Any]):
    """An image a rank and step, with boxes and masks; every fourth has none."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        own = torch.Generator().manual_seed(index)
        image = torch.rand(3, 64, 64, generator=own, dtype=torch.float64)
        count = (2, 3, 1, 0)[index % 4]
        corner = torch.rand(count, 2, generator=own, dtype=torch.float64) * 32
        boxes = torch.cat([corner, corner + 24], 1)
        masks = torch.zeros(count, 64, 64, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        return image, {"boxes": boxes, "labels": torch.ones(count, dtype=torch.int64), "masks": masks}


def detector(masks: bool, norm: Any) -> nn.Module:
    """torchvision's Faster or Mask R-CNN on a small backbone, with ``norm`` in its heads."""
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
    trunk.out_channels = 8
    options: dict[str, Any] = {"num_classes": 3, "min_size": 64, "max_size": 64, "rpn_pre_nms_top_n_train": 50}
    options |= {"rpn_post_nms_top_n_train": 20, "rpn_anchor_generator": AnchorGenerator(((16, 32),), ((1.0,),))}
    options["box_head"] = FastRCNNConvFCHead((8, 7, 7), [8], [1024], norm_layer=norm)
    if masks:
        options["mask_head"] = MaskRCNNHeads(8, [256], 1, norm_layer=norm)
    return (MaskRCNN if masks else FasterRCNN)(trunk, **options)


class Detects(LightningModule):
    """A detector, with BatchNorm in its heads or without, that notes how many rows these are given."""

    def __init__(self, masks: bool, bn: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = detector(masks, nn.BatchNorm2d if bn else None)
        self.double()
        self.rows: list[tuple[str, int]] = []
        self.losses: list[dict[str, float]] = []
        for name, head in self.model.roi_heads.named_children():
            if name.endswith("_head") and head is not None:
                head.register_forward_pre_hook(lambda _, args, name=name: self.rows.append((name, len(args[0]))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = zip(*batch, strict=True)
        torch.manual_seed(batch_idx)  # the samplers' random numbers
        losses = self.model(list(images), list(targets))
        self.losses.append({name: loss.item() for name, loss in losses.items()})
        return sum(losses.values())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def gradients_into(found: dict[str, Tensor]) -> Callback:
    def note(trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        found.update({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})

    return At(note, "on_before_optimizer_step")


def detected(masks: bool, bn: bool, callbacks: list[Any]) -> tuple[Detects, dict[str, Tensor]]:
    """Two steps of an image a rank: of two and three objects, of one and none."""
    module, gradients = Detects(masks, bn), {}
    scenes = torch.utils.data.Subset(Scenes(), [dist.get_rank(), 2 + dist.get_rank()])
    options = {"max_epochs": 1, "val": None, **ON_TWO_RANKS}
    fit(module, [*callbacks, gradients_into(gradients)], DataLoader(scenes, 1, collate_fn=list), **options)
    assert list(module.state_dict()) == list(Detects(masks, bn).state_dict())
    return module, gradients


def with_and_without(masks: bool, bn: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("without", "with"):
        shuffle = RoIShuffleCallback(modules="model.roi_heads.*_head")
        module, gradients = detected(masks, bn, [shuffle] if kind == "with" else [])
        found[kind] = {"losses": module.losses, "gradients": gradients, "rows": module.rows}
        found["unshuffled"] = shuffle.unshuffled
    return found


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:.*has no BatchNorm layer")
def test_mask_rcnn_without_batchnorm_has_the_losses_and_gradients_of_no_shuffle() -> None:
    results = run_on_ranks(with_and_without, 2, True, False)
    for found in results:
        for ours, theirs in zip(found["with"]["losses"], found["without"]["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        assert found["with"]["gradients"].keys() == found["without"]["gradients"].keys()
        for name, gradient in found["without"]["gradients"].items():
            torch.testing.assert_close(found["with"]["gradients"][name], gradient, rtol=1e-6, atol=1e-6, msg=name)
    before, after = ([dict.fromkeys(("box_head", "mask_head"), 0) for _ in range(4)] for _ in range(2))
    for rank, found in enumerate(results):
        for kind, seen in (("without", before), ("with", after)):
            for call, (name, rows) in enumerate(found[kind]["rows"]):
                seen[2 * (call // 2) + rank][name] = rows
    for step in (0, 2):
        for head in ("box_head", "mask_head"):
            own, given = ([seen[step + rank][head] for rank in range(2)] for seen in (before, after))
            assert given == (own if sum(own) < 4 else [sum(own) - sum(own) // 2, sum(own) // 2])
    assert before[3]["mask_head"] == 0, "this test shows nothing of empty sets"
    assert {found["unshuffled"] for found in results} == {
        sum(before[s]["mask_head"] + before[s + 1]["mask_head"] < 4 for s in (0, 2))
    }


def saves(path: Path) -> Callback:
    def save(trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            trainer.save_checkpoint(path)

    return At(save, "on_train_batch_end")


def trained(callbacks: list[Any], batch: int = 8, **kwargs: Any) -> dict[str, Any]:
    """Two epochs of four equal batches, so that it does not matter which of them Lightning repeats on resuming."""
    module, classes, keys = TinyNet(), set(), set()

    def look(trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        classes.update(type(m) for m in copy.deepcopy(pl_module).modules())
        keys.add(tuple(pl_module.state_dict()))

    own = Images(16 + dist.get_rank())
    same = torch.utils.data.ConcatDataset([torch.utils.data.Subset(own, range(batch))] * 4)
    fit(module, [*callbacks, At(look, "on_train_batch_start")], DataLoader(same, batch), **ON_TWO_RANKS, **kwargs)
    plain = TinyNet()
    assert classes == {type(m) for m in plain.modules()} and keys == {tuple(plain.state_dict())}
    assert [type(m) for m in module.modules()] == [type(m) for m in plain.modules()]
    shuffle = next((c for c in callbacks if isinstance(c, RoIShuffleCallback)), None)
    return {
        "weights": digest(dict(module.named_parameters())),
        "statistics": digest(statistics_of(module)),
        "state": digest(shuffle.state_dict()) if shuffle else None,
    }


def resumed(folder: Path) -> list[dict[str, Any]]:
    checkpoint = folder / "5.ckpt"
    found = [trained([RoIShuffleCallback(modules="bn*"), saves(checkpoint)])]
    dist.barrier()
    (saved,) = torch.load(checkpoint, weights_only=True)["callbacks"].values()
    assert set(saved) == {"generator", "unshuffled"}
    found.append(trained([RoIShuffleCallback(modules="bn*")], ckpt_path=checkpoint))
    return [*found, trained([RoIShuffleCallback(modules="bn*", seed=1)]), trained([])]


@pytest.mark.ddp
def test_a_resumed_training_is_the_uninterrupted_one_and_ranks_agree(tmp_path: Path) -> None:
    first, second = run_on_ranks(resumed, 2, tmp_path)
    whole, again, other_seed, plain = first
    assert again == whole, "resumed differently"
    assert other_seed["weights"] != whole["weights"] != plain["weights"]
    for ours, theirs in zip(first, second, strict=True):
        assert ours["weights"] == theirs["weights"] and ours["state"] == theirs["state"]


def fit_until_killed() -> None:
    """Rank 1 is killed, between its exchanges."""

    def kill(trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    module, shuffle = TinyNet(), RoIShuffleCallback(modules="bn*")
    try:
        fit(module, [shuffle, At(kill, "on_before_backward")], devices=2, strategy="ddp")
    except RuntimeError as error:
        left = type(module.bn1) is not nn.BatchNorm2d or shuffle._handle is not None
        raise RuntimeError(f"ended with {'something' if left else 'nothing'} left") from error


@pytest.mark.ddp
def test_a_killed_rank_ends_the_fit_of_the_other_with_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0: .*ended with nothing left.*rank 1: died"):
        run_on_ranks(fit_until_killed, 2)


class Within(TinyNet):
    """A layer in a container, which a pass leaves in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bn2 = nn.Sequential(self.bn2)


def drawn(others: list[Any]) -> Any:
    """The generator after a fit, in whose passes the ranks have different numbers of batches."""
    shuffle = RoIShuffleCallback(modules="bn2")
    fit(Within(), [shuffle, *others], train_loader(24), **ON_TWO_RANKS)
    return dist.get_rank(), digest(shuffle.state_dict())


def short_or_long(trainer: Trainer) -> Any:
    return train_loader(8 * (1 + dist.get_rank()))


@pytest.mark.ddp
def test_a_pass_and_frozen_layers_exchange_nothing() -> None:
    plain = run_on_ranks(drawn, 2, [])
    passing = lbn.PreciseBNCallback(100, source=lbn.FromLoader(short_or_long, shard=False))
    assert run_on_ranks(drawn, 2, [passing]) == plain
    frozen = lbn.FreezeBNCallback(start_epoch=1, precise=lbn.PassConfig(8), warmup_epochs=0)
    assert run_on_ranks(drawn, 2, [frozen]) != plain, "as many were drawn as without freezing"


def too_few() -> tuple[Any, ...]:
    shuffle = RoIShuffleCallback(modules=["bn1", "bn2"])
    trained([shuffle], batch=1)  # an earlier fit does not count
    found, plain = trained([shuffle], batch=1), trained([], batch=1)
    return found["weights"] == plain["weights"], shuffle.unshuffled, copy.deepcopy(shuffle).state_dict()["unshuffled"]


@pytest.mark.ddp
def test_with_fewer_than_two_rows_a_rank_they_stay_and_that_is_counted() -> None:
    for same, unshuffled, copied in run_on_ranks(too_few, 2):
        assert same and unshuffled == copied == 2 * 4 * 2


def test_one_process_is_as_it_was_and_warns_once() -> None:
    modules, callback = (TinyNet(), TinyNet()), RoIShuffleCallback(modules="bn*")
    (message,) = said("roi_shuffle", modules[0], callback)
    assert re.search("one process.*Ghost BN", message)
    fit(modules[1])
    assert digest(modules[0].state_dict()) == digest(modules[1].state_dict()) and callback.unshuffled == 0


def test_two_on_modules_within_each_other_are_refused() -> None:
    module = TinyNet()
    module.net = nn.Sequential(module.bn1)
    with pytest.raises(ValueError, match="Two RoIShuffleCallbacks act on layer 'bn1'"):
        fit(module, [RoIShuffleCallback(modules="net"), RoIShuffleCallback(modules="bn1")])


def test_it_resumes_its_count_and_is_sent_to_spawned_processes_without_shared_memory() -> None:
    callback = RoIShuffleCallback(modules="encoder", seed=3)
    callback.load_state_dict({**callback.state_dict(), "unshuffled": 3})
    assert callback.unshuffled == callback.state_dict()["unshuffled"] == 3
    sent = bytes(ForkingPickler.dumps(callback))
    assert b"rebuild_storage" not in sent
    assert digest(ForkingPickler.loads(sent).state_dict()) == digest(callback.state_dict())
