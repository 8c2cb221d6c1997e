"""The BatchNorm toolkit for PyTorch Lightning: *Rethinking "Batch" in BatchNorm* (Wu & Johnson, 2021) in practice.

A callback changes which batch a BatchNorm layer normalises over, and leaves everything else alone. The same verbs
exist for plain PyTorch.
"""

from lightning_bn.callbacks.freeze_bn import FreezeBNCallback
from lightning_bn.callbacks.precise_bn import PreciseBNCallback
from lightning_bn.functional.freeze import freeze_bn
from lightning_bn.functional.precise import precise_bn
from lightning_bn.functional.sync import sync_bn
from lightning_bn.layers.find import find_bn
from lightning_bn.statistics.moments import Moments
from lightning_bn.statistics.population import LayerStatistics, PopulationStatistics

__all__ = [
    "FreezeBNCallback",
    "LayerStatistics",
    "Moments",
    "PopulationStatistics",
    "PreciseBNCallback",
    "find_bn",
    "freeze_bn",
    "precise_bn",
    "sync_bn",
]
