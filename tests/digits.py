"""Real images of many classes: MNIST's digits in eight orientations, and a network's features of them."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bn import find_bn
from recipes.classifier import ResNet
from recipes.images import mnist_5k

CLASSES = 80


@functools.cache
def oriented_digits() -> tuple[Tensor, Tensor]:
    """4,000 images ``(1, 28, 28)``, each turned and mirrored in one of eight ways at random, which makes 80 classes."""
    digits, _ = mnist_5k()
    ways = torch.randint(8, (len(digits.labels),), generator=torch.Generator().manual_seed(1))
    pixels = digits.pixels.float()
    turned = [torch.rot90(image, int(way), (-2, -1)) for image, way in zip(pixels, ways, strict=True)]
    images = torch.stack([image.flip(-1) if way >= 4 else image for image, way in zip(turned, ways, strict=True)])
    return (images - images.mean()) / images.std(), 8 * digits.labels + ways


def several_of_some_classes(batches: int, generator: torch.Generator, each: int = 2, classes: int = 16) -> Tensor:
    """Indices of batches as in Fig. 8, ``(batches, classes * each)``: 16 classes x 2 images, c0, c0, c1, c1, ..."""
    _, labels = oriented_digits()
    of_class = [(labels == label).nonzero()[:, 0] for label in range(CLASSES)]
    found = []
    for _ in range(batches):
        chosen = torch.randperm(CLASSES, generator=generator)[:classes].tolist()
        found += [of_class[c][torch.randperm(len(of_class[c]), generator=generator)[:each]] for c in chosen]
    return torch.cat(found).view(batches, -1)


@functools.cache
def features(epochs: int) -> list[dict[str, Tensor]]:
    """Of each epoch of a ResNet-8's training: layer's name -> channel means of what it is given for each image."""
    torch.manual_seed(0)
    images, labels = oriented_digits()
    model = ResNet(1, CLASSES, 16, blocks=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    found = []
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(32):
            loss = F.cross_entropy(model.train()(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(_inputs(model.eval(), images))
    return found


@torch.no_grad()
def _inputs(model: ResNet, images: Tensor) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {name: [] for name in find_bn(model)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, seen=seen[name]: seen.append(args[0].mean((2, 3))))
        for name, layer in find_bn(model).items()
    ]
    for batch in images.split(500):
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(means) for name, means in seen.items()}
