"""RoIShuffleCallback: fits on two ranks, torchvision's detectors as they are, and resuming."""

import copy
import os
import signal
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

import lightning_bn as lbn
from lightning_bn import RoIShuffleCallback
from tests.callbacks.zoo import At, Images, TinyNet, digest, fit, statistics_of, train_loader
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


class Detects(LightningModule):
    """torchvision's Mask R-CNN, without BatchNorm in its heads, that notes how many rows these get."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
            trunk.out_channels = 8
            options = {"num_classes": 3, "min_size": 64, "max_size": 64, "rpn_pre_nms_top_n_train": 50}
            options["rpn_anchor_generator"] = AnchorGenerator(((16, 32),), ((1.0,),))
            options["box_head"] = FastRCNNConvFCHead((8, 7, 7), [8], [1024])
            options["mask_head"] = MaskRCNNHeads(8, [256], 1)
            self.model = MaskRCNN(trunk, rpn_post_nms_top_n_train=20, **options)
        self.double()
        self.rows: dict[str, list[int]] = {"box_head": [], "mask_head": []}
        self.losses: list[dict[str, float]] = []
        for name, rows in self.rows.items():
            head = self.model.roi_heads.get_submodule(name)
            head.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(len(args[0])))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = zip(*batch, strict=True)
        torch.manual_seed(batch_idx)  # the samplers' random numbers
        losses = self.model(list(images), list(targets))
        self.losses.append({name: loss.item() for name, loss in losses.items()})
        return sum(losses.values())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def with_and_without() -> list[Any]:
    """Two steps of an image a rank, of two and three objects, of one and none: without a shuffle and with one."""
    found: list[Any] = []
    for callbacks in ([], [RoIShuffleCallback(modules="model.roi_heads.*_head")]):
        module, gradients = Detects(), {}

        def note(trainer: Trainer, pl_module: LightningModule, optimizer: Any, into: Any = gradients) -> None:
            into.update({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})

        scenes = torch.utils.data.Subset(Scenes(), [dist.get_rank(), 2 + dist.get_rank()])
        options = {"max_epochs": 1, "val": None, **ON_TWO_RANKS}
        loader = DataLoader(scenes, 1, collate_fn=list)
        fit(module, [*callbacks, At(note, "on_before_optimizer_step")], loader, **options)
        assert list(module.state_dict()) == list(Detects().state_dict())
        found.append((module.losses, gradients, module.rows))
    return [*found, callbacks[0].unshuffled]


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:.*has no BatchNorm layer")
def test_mask_rcnn_without_batchnorm_has_the_losses_and_gradients_of_no_shuffle() -> None:
    ranks = run_on_ranks(with_and_without, 2)
    for (losses, gradients, _), (ours, shuffled, _), _ in ranks:
        assert ours == [pytest.approx(step, rel=1e-6, abs=1e-6) for step in losses]
        torch.testing.assert_close(shuffled, gradients, rtol=1e-6, atol=1e-6)
    too_few = 0
    for head in ("box_head", "mask_head"):
        before, after = ([rank[kind][2][head] for rank in ranks] for kind in (0, 1))
        for step, (own, given) in enumerate(zip(zip(*before, strict=True), zip(*after, strict=True), strict=True)):
            few = sum(own) < 4
            assert given == (own if few else (sum(own) - sum(own) // 2, sum(own) // 2)), step
            too_few += few
    assert before[1][1] == 0, "this test shows nothing of empty sets"
    assert [unshuffled for *_, unshuffled in ranks] == [too_few, too_few]


def trained(callbacks: list[Any], **kwargs: Any) -> dict[str, Any]:
    """Two epochs of four equal batches, so that it does not matter which of them Lightning repeats on resuming."""
    module, classes, keys = TinyNet(), set(), set()

    def look(trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        classes.update(type(m) for m in copy.deepcopy(pl_module).modules())
        keys.add(tuple(pl_module.state_dict()))

    own = Images(16 + dist.get_rank())
    same = torch.utils.data.ConcatDataset([torch.utils.data.Subset(own, range(8))] * 4)
    fit(module, [*callbacks, At(look, "on_train_batch_start")], DataLoader(same, 8), **ON_TWO_RANKS, **kwargs)
    plain = TinyNet()
    assert classes == {type(m) for m in plain.modules()} and keys == {tuple(plain.state_dict())}
    assert [type(m) for m in module.modules()] == [type(m) for m in plain.modules()]
    numbers = {"weights": digest(dict(module.named_parameters())), "statistics": digest(statistics_of(module))}
    return {**numbers, "state": [digest(c.state_dict()) for c in callbacks if isinstance(c, RoIShuffleCallback)]}


def resumed(folder: Path) -> list[dict[str, Any]]:
    checkpoint = folder / "step=5.ckpt"
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    found = [trained([RoIShuffleCallback(modules="bn*"), saving])]
    dist.barrier()
    saved = torch.load(checkpoint, weights_only=True)["callbacks"][RoIShuffleCallback(modules="bn*").state_key]
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


def drawn(others: list[Any]) -> Any:
    """The generator after a fit, in whose passes the ranks have different numbers of batches."""
    module, shuffle = TinyNet(), RoIShuffleCallback(modules="bn2")
    module.bn2 = nn.Sequential(module.bn2)  # in a container, which a pass leaves in train mode
    fit(module, [shuffle, *others], train_loader(24), **ON_TWO_RANKS)
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
