"""Modes of a pass, for models of all kinds and steps that set modes themselves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from lightning_bn import BatchLeakageMonitor, PreciseBNCallback
from lightning_bn.layers.modes import preserve_flags
from lightning_bn.trainer.context import set_modes
from tests.callbacks.zoo import TinyNet, fit, train_loader


def by_hand() -> nn.Module:
    """Dropout, a layer with children (timm's, with dropout and activation), attention, nested containers."""
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), BatchNormAct2d(4))
    return nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, drop_layer=nn.Dropout), inner, nn.Flatten(2), Attends())


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def of_timm() -> nn.Module:
    return timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=3, drop_path_rate=0.5)


Step = Callable[[nn.Module], Any]
train: Step = nn.Module.train


def nothing(net: nn.Module) -> None:
    pass


def back_and_forth(net: nn.Module) -> None:
    net.eval()
    net.train()


def modes_when_called(net: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, bool]:
    seen: dict[nn.Module, bool] = {}
    handles = [m.register_forward_hook(lambda m, *_: seen.update({m: m.training})) for m in net.modules()]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("make", "step", "like_training"),
    [(by_hand, nothing, True), (by_hand, nothing, False), (by_hand, back_and_forth, False), (of_timm, train, True)],
)
def test_only_containers_and_estimated_layers_train_whatever_is_set(make: Any, step: Step, like_training: bool) -> None:
    net, shape = make(), (2, 3, 4, 4) if make is by_hand else (2, 3, 32, 32)
    estimated = [m for m in net.modules() if isinstance(m, _BatchNorm)][1::2]
    with torch.no_grad(), set_modes(dict.fromkeys(net.modules(), True), like_training, estimated) as begin:
        for _ in range(2):
            begin()
            assert net.training == like_training
            step(net)
            for m, mode in modes_when_called(net, lambda: net(torch.randn(shape))).items():
                if not list(m.children()) or isinstance(m, (_BatchNorm, nn.MultiheadAttention)):  # no container
                    assert mode == (m in estimated), f"{type(m).__name__} is in the wrong mode"
                elif step is nothing:
                    assert mode == like_training


@pytest.mark.parametrize("estimated", [(), (1,)])
def test_layers_that_are_not_estimated_normalize_with_the_population(estimated: tuple[int, ...]) -> None:
    net, x = by_hand()[:2], torch.randn(8, 3, 4, 4) * 3 + 1
    expected = copy.deepcopy(net).eval()
    for i in estimated:
        expected[i].train()
        expected[i].drop.eval()
    with torch.no_grad(), set_modes(dict.fromkeys(net.modules(), True), True, [net[i] for i in estimated]):
        net.train()
        assert torch.equal(net(x), expected(x))
    assert net.state_dict().keys() == expected.state_dict().keys()


def test_flags_that_a_step_sets_hold_for_its_own_forward() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    teacher, other = net

    def flags_of_teacher() -> tuple[Any, ...]:
        return teacher.training, teacher.momentum, teacher.track_running_stats

    with preserve_flags([teacher, other], training=True) as flags:
        for _ in range(2):
            flags.set(flags.initial)
            assert flags_of_teacher() == (True, 0.1, True)
            teacher.eval()
            teacher.momentum, teacher.track_running_stats = 0.0, False
            net(torch.randn(4, 3))
            assert flags_of_teacher() == (False, 0.0, False)
            assert other.training
            teacher.of_the_step = True
    assert flags_of_teacher() == (True, 0.1, True) and not hasattr(teacher, "of_the_step")


def test_a_detector_returns_its_losses_with_dropout_off() -> None:
    net = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=64, max_size=64, trainable_backbone_layers=6
    )
    images, targets = (
        [torch.rand(3, 64, 64)],
        [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}],
    )
    layers = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    with torch.no_grad(), set_modes(dict.fromkeys(net.modules(), True), True, layers[:1]) as begin:
        for step in (nothing, train):
            begin()
            step(net)
            seen = modes_when_called(net.backbone, lambda: net(images, targets)["loss_classifier"])
            assert [m for m in layers if seen[m]] == layers[:1]


def test_a_part_in_eval_mode_in_training_is_so_in_a_pass_and_modes_are_restored_and_copies_ordinary_modules() -> None:
    net = nn.Sequential(by_hand(), by_hand())
    modes = {m: m is net or m in set(net[1].modules()) for m in net.modules()}
    estimated = [m for m in net[1].modules() if isinstance(m, _BatchNorm)]
    with pytest.raises(KeyboardInterrupt), set_modes(modes, True, estimated):
        assert net.training and net[1].training and not any(m.training for m in net[0].modules())
        twin = copy.deepcopy(net[1]).train()
        raise KeyboardInterrupt
    assert not torch_module._global_forward_pre_hooks
    for m in (net[1].train(), twin):
        assert all(modes_when_called(m, lambda m=m: m(torch.randn(2, 3, 4, 4))).values())


class OfTimm(TinyNet):
    """Layers with children, ``bn1`` and ``bn2``, and a step that sets modes."""

    def __init__(self, step: Step = nothing) -> None:
        super().__init__(dropout=0.5)
        self.bn1, self.bn2, self.step = BatchNormAct2d(4), BatchNormAct2d(6), step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.step(self)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("step", "forward", "layers"),
    [(nothing, "training_step", "bn1"), (back_and_forth, "training_step", "bn2"), (train, "forward", "bn2")],
)
def test_statistics_of_some_layers_have_the_others_use_the_population(step: Step, forward: Any, layers: str) -> None:
    module, loader = OfTimm(step), train_loader(32, 8)
    precise = PreciseBNCallback(32, layers=layers, forward=forward)
    fit(module, precise, loader)
    inputs: list[Tensor] = []
    truth = copy.deepcopy(module).double().eval()
    truth.get_submodule(layers).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for x, _ in loader:
            truth(x.double())
    var, mean = torch.var_mean(torch.cat(inputs), (0, 2, 3), correction=0)
    assert list(precise.result) == [layers]
    measured = precise.result[layers]
    torch.testing.assert_close(measured.mean.double(), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(measured.var.double(), var, rtol=1e-5, atol=0)


def test_the_leakage_pass_normalizes_with_the_population() -> None:
    module, seen = OfTimm(train), set[bool]()
    for layer in (module.bn1, module.bn2):
        layer.register_forward_hook(lambda m, *_: None if torch.is_grad_enabled() else seen.add(m.training))
    fit(module, BatchLeakageMonitor(24), val=None)
    assert seen == {False}
