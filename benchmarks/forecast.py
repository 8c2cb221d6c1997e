"""Claim: statistics forecast from training steps recover most of PreciseBN's gain over the EMA, without a pass.

Trainings on real images. After every epoch, validation error is measured three times with the same weights: with the
EMA, with the forecast, and with a PreciseBN pass over 1,000 training images in batches of the training's size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, field
from statistics import median
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bn import find_bn, precise_bn
from lightning_bn.functional.precise import write_running_stats
from lightning_bn.tracking.forecast import StatisticsForecaster
from recipes.classifier import ResNet
from recipes.images import FASHION_MNIST, ImageData, Images, LabelledImages, ShiftedImages

TITLE = "A forecast from training steps recovers most of PreciseBN's gain"
CLAIM = (
    "`ForecastBNCallback` recovers at least 90 % of the decrease in validation error from the EMA to a PreciseBN "
    "pass, and "
    "is in no epoch worse than the EMA by more than noise."
)
PASS_SAMPLES = 1000
LEAST_GAIN = 0.5
"""In points of validation error; no share is reported for a smaller gain."""

THRESHOLDS = (0.05, 0.1, 0.2, 0.4)


def conv(in_channels: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Creates a convolution and BN."""
    layer = nn.Conv2d(in_channels, channels, size, stride, size // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(channels)]


class Inverted(nn.Module):
    """MobileNetV2's block: 1x1 up, 3x3 depthwise, 1x1 down, added to its input if shapes are equal."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = 3 * in_channels
        depthwise = conv(wide, wide, 3, stride, wide)
        layers = [*conv(in_channels, wide, 1), nn.ReLU6(), *depthwise, nn.ReLU6(), *conv(wide, channels, 1)]
        self.body = nn.Sequential(*layers)
        self.adds = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


def small_mobilenet() -> nn.Module:
    """Creates a network of 17 BN layers, most of them depthwise or linear bottlenecks."""
    shapes = ((8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 24, 2), (24, 24, 1))
    blocks = [Inverted(*shape) for shape in shapes]
    head = [*conv(24, 64, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*conv(1, 8, 3, 2), nn.ReLU6(), *blocks, *head)


def mlp() -> nn.Module:
    """Creates four hidden layers of 96, each with BatchNorm1d."""
    widths = [(64, 96), (96, 96), (96, 96), (96, 96)]
    hidden = [m for i, o in widths for m in (nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(96, 10))


def mnist() -> tuple[LabelledImages, LabelledImages]:
    """MNIST-5k, with each validation image shifted in two ways."""
    data = ImageData()
    train, val = data.train_set, data.val_set
    assert isinstance(train, ShiftedImages) and isinstance(val, ShiftedImages)
    twice = Images(val.padded.repeat(2, 1, 1, 1), val.labels.repeat(2))
    return train, ShiftedImages(twice, val.mean, val.std, shift=3)


def fashion() -> tuple[LabelledImages, LabelledImages]:
    """2,000 training and 2,000 validation images of Fashion-MNIST."""
    data = ImageData(FASHION_MNIST, train_images=2000, val_images=2000, shift=2)
    return data.train_set, data.val_set


def digits() -> tuple[LabelledImages, LabelledImages]:
    """scikit-learn's 8x8 digits."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pixels, labels = torch.tensor(loaded.images * 15).byte()[:, None], torch.tensor(loaded.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    mean, std = pixels.float().mean()[None], pixels.float().std()[None]
    parts = [Images(pixels[part], labels[part]) for part in (order[:1297], order[1297:])]
    return ShiftedImages(parts[0], mean, std, shift=1), ShiftedImages(parts[1], mean, std, shift=0)


@dataclass(frozen=True)
class Case:
    """Data, network and hyperparameters of a training."""

    name: str
    data: Callable[[], tuple[LabelledImages, LabelledImages]]
    network: Callable[[], nn.Module]
    batch: int
    lr: float
    epochs: int = 10

    def __str__(self) -> str:
        return f"{self.name} | {self.batch}"


CASES = (
    Case("digits, MLP", digits, mlp, 100, 0.5),
    Case("MNIST-5k, ResNet-8", mnist, lambda: ResNet(1, 10, 8, blocks=1), 250, 0.5),
    Case("MNIST-5k, ResNet-8", mnist, lambda: ResNet(1, 10, 8, blocks=1), 32, 0.1, epochs=4),
    Case("Fashion-MNIST, MobileNet", fashion, small_mobilenet, 200, 0.5),
)


@dataclass
class Run:
    """Validation errors of a training, after every epoch, in percent."""

    ema: list[float] = field(default_factory=list)
    forecast: list[float] = field(default_factory=list)
    precise: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)  # of the EMA, as forecast, in the worst layer
    validation_images: int = 0
    steps: int = 0
    microseconds: float = 0.0
    share_of_step: float = 0.0

    @property
    def gain(self) -> float:
        """Error with the EMA minus error with PreciseBN, mean over epochs."""
        return mean(self.ema) - mean(self.precise)

    @property
    def recovered(self) -> float:
        """Error with the EMA minus error with the forecast, mean over epochs."""
        return mean(self.ema) - mean(self.forecast)


def train(case: Case, seed: int, device: str, epochs: int) -> Run:
    """Trains once and measures; measuring does not change the weights."""
    train_set, val_set = case.data()
    torch.manual_seed(1)
    val_images = len(cast(Sized, val_set))
    validation = next(batches(val_set, torch.arange(val_images), val_images, device))
    torch.manual_seed(seed)
    model = case.network().to(device)
    images = len(cast(Sized, train_set))
    steps = epochs * (images // case.batch)
    sgd = torch.optim.SGD(model.parameters(), case.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
    layers = find_bn(model)
    forecast, run = StatisticsForecaster(layers), Run(validation_images=val_images)
    watching, stepping = 0.0, 0.0
    for _ in range(epochs):
        for x, y in batches(train_set, torch.randperm(images), case.batch, device):
            begun = time.perf_counter()
            forecast.before_batch()
            ready = time.perf_counter()
            F.cross_entropy(model(x), y).backward()
            sgd.step()
            sgd.zero_grad()
            schedule.step()
            stepped = time.perf_counter()
            forecast.after_batch()
            watching += ready - begun + time.perf_counter() - stepped
            stepping += stepped - ready
            run.steps += 1
        state = {name: value.clone() for name, value in model.state_dict().items()}
        run.ema.append(error(model, *validation))
        begun = time.perf_counter()
        run.gap.append(max(forecast.ema_gaps().values()))  # takes in the steps that are left
        watching += time.perf_counter() - begun
        write_running_stats(layers, forecast.statistics())
        run.forecast.append(error(model, *validation))
        pass_batches = batches(train_set, torch.randperm(images)[:PASS_SAMPLES], case.batch, device)
        precise_bn(model, pass_batches, normalization_batch_size="loader")
        run.precise.append(error(model, *validation))
        model.load_state_dict(state)
    run.microseconds = 1e6 * watching / run.steps
    run.share_of_step = watching / stepping
    return run


def batches(images: LabelledImages, order: Tensor, size: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields whole batches of images in the given order."""
    for part in order.split(size):
        if len(part) == size:
            x, y = zip(*(images[i] for i in part.tolist()), strict=True)
            yield torch.stack(x).to(device), torch.stack(y).to(device)


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Error in percent with the current running statistics."""
    model.eval()
    wrong = 100 * float((model(x).argmax(1) != y).double().mean())
    model.train()
    return wrong


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def noise(run: Run, epoch: int) -> float:
    """Two standard errors, in points, of the difference of two validation errors of about the EMA's size."""
    p = min(max(run.ema[epoch], 1.0), 99.0) / 100
    return float(200 * (2 * p * (1 - p) / run.validation_images) ** 0.5)


def report(device: str, quick: bool) -> str:
    """Measures on a device; returns tables, verdicts and method in Markdown."""
    torch.set_num_threads(1)
    seeds = (0,) if quick else (0, 1, 2)
    rows, needed = [], []
    everything: list[Run] = []
    for case in CASES:
        runs = [train(case, seed, device, 1 if quick else case.epochs) for seed in seeds]
        everything += runs
        rows.append(_row(case, runs))
        print(rows[-1], flush=True)
        needed.append(f"| {case} | {' | '.join(_needed(runs))} |")
    columns = ["images, network", "batch"]
    measured = ["error with EMA, %", "forecast", "PreciseBN", "share recovered, at least 90 %", "its seeds"]
    measured += ["worst epoch against EMA, points", "epochs worse by more than noise", "µs per step", "of the step"]
    head = _head([*columns, *measured])
    passes = _head([*columns, *(f"skip_below={t}" for t in THRESHOLDS)])
    gain, recovered = (sum(getattr(run, name) for run in everything) for name in ("gain", "recovered"))
    worse = sum(len(_worse(run)) for run in everything)
    epochs = sum(len(run.ema) for run in everything)
    method = (
        "**Method.** SGD with momentum 0.9 and a cosine rate; "
        f"{len(seeds)} seeds. Errors are means over epochs and seeds. The share is (EMA - forecast) / "
        f"(EMA - PreciseBN) of these means, where that gain is at least {LEAST_GAIN} points; followed by that of each "
        "seed. Noise is two standard errors of a difference of two independent errors on the validation images (500 "
        "digits, 2,000 of the others); in a few of many epochs the difference exceeds it by chance. Microseconds are "
        "those of "
        "watching a step, in 1 thread: the mean over all steps, including the forecast after every epoch. In the "
        "second "
        "table a pass is run after an epoch only if the forecast says that the EMA is off by more than `skip_below` "
        "in some layer: passes saved, and the increase of the mean error in points."
    )
    lines = [
        f"- Recovered of the gain, all trainings together: {100 * recovered / gain:.1f} %.",
        f"- Worse than the EMA by more than noise: {worse} of {epochs} epochs.",
    ]
    return "\n".join([*head, *rows, "", *lines, "", *passes, *needed, "", method])


def _head(columns: list[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _row(case: Case, runs: list[Run]) -> str:
    gain, recovered = mean([r.gain for r in runs]), mean([r.recovered for r in runs])
    share, seeds = "no gain", "-"
    if gain >= LEAST_GAIN:
        share = f"{100 * recovered / gain:.1f} %" + ("" if recovered >= 0.9 * gain else " **missed**")
        seeds = ", ".join(f"{100 * r.recovered / r.gain:.1f}" if r.gain >= LEAST_GAIN else "-" for r in runs)
    worst = max(f - e for r in runs for e, f in zip(r.ema, r.forecast, strict=True))
    worse = sum(len(_worse(r)) for r in runs)
    errors = " | ".join(
        f"{mean([mean(getattr(r, name)) for r in runs]):.1f}" for name in ("ema", "forecast", "precise")
    )
    cost = f"{median(r.microseconds for r in runs):.0f} | {100 * median(r.share_of_step for r in runs):.1f} %"
    return (
        f"| {case} | {errors} | {share} | {seeds} | {worst:+.1f} | "
        f"{worse} of {sum(len(r.ema) for r in runs)} | {cost} |"
    )


def _worse(run: Run) -> list[int]:
    """Epochs in which the forecast is worse than the EMA by more than noise."""
    return [i for i in range(len(run.ema)) if run.forecast[i] - run.ema[i] > noise(run, i)]


def _needed(runs: list[Run]) -> list[str]:
    """Passes saved for each threshold, and the resulting increase of the error."""
    cells = []
    epochs = [each for r in runs for each in zip(r.gap, r.ema, r.precise, strict=True)]
    for threshold in THRESHOLDS:
        saved = [ema - precise for gap, ema, precise in epochs if gap <= threshold]
        cells.append(f"{100 * len(saved) / len(epochs):.0f} % saved, {sum(saved) / len(epochs):+.2f}")
    return cells
