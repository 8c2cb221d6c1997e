"""The BatchNorm toolkit for PyTorch Lightning: *Rethinking "Batch" in BatchNorm* (Wu & Johnson, 2021) in practice.

A callback changes which batch a BatchNorm layer normalizes over, and leaves everything else alone. The same verbs
exist for plain PyTorch.
"""

from typing import TYPE_CHECKING

from lightning_bn.lazy import lazily

__all__ = [
    "AdaBNCallback",
    "BNStatsMonitor",
    "BatchLeakage",
    "BatchLeakageMonitor",
    "DeadChannels",
    "DomainSpecificBNCallback",
    "ForecastBNCallback",
    "FreezeBNCallback",
    "FromLoader",
    "GhostBNCallback",
    "LayerStatistics",
    "MeanGap",
    "MiniBatchInferenceCallback",
    "Moments",
    "NonFiniteChannels",
    "PassConfig",
    "PopulationStatistics",
    "PreciseBNCallback",
    "Replay",
    "RoIShuffleCallback",
    "SyncBNCallback",
    "VarGap",
    "adapt_bn",
    "batch_leakage",
    "domain_bn",
    "exchange_rows",
    "find_bn",
    "freeze_bn",
    "ghost_bn",
    "mini_batch_inference",
    "normalization_batch_size",
    "plots",
    "precise_bn",
    "restore_rows",
    "roi_shuffle",
    "sync_bn",
]

if TYPE_CHECKING:
    from lightning_bn import plots as plots
    from lightning_bn.callbacks.ada_bn import AdaBNCallback
    from lightning_bn.callbacks.batch_leakage_monitor import BatchLeakageMonitor
    from lightning_bn.callbacks.bn_stats_monitor import BNStatsMonitor
    from lightning_bn.callbacks.domain_specific_bn import DomainSpecificBNCallback
    from lightning_bn.callbacks.forecast_bn import ForecastBNCallback
    from lightning_bn.callbacks.freeze_bn import FreezeBNCallback
    from lightning_bn.callbacks.ghost_bn import GhostBNCallback
    from lightning_bn.callbacks.mini_batch_inference import MiniBatchInferenceCallback
    from lightning_bn.callbacks.precise_bn import PreciseBNCallback
    from lightning_bn.callbacks.roi_shuffle import RoIShuffleCallback
    from lightning_bn.callbacks.sync_bn import SyncBNCallback
    from lightning_bn.core.exchange import exchange_rows, restore_rows
    from lightning_bn.core.moments import Moments
    from lightning_bn.core.population import LayerStatistics, PopulationStatistics
    from lightning_bn.functional.adapt import adapt_bn
    from lightning_bn.functional.domain.bn import domain_bn
    from lightning_bn.functional.freeze import freeze_bn
    from lightning_bn.functional.ghost import ghost_bn
    from lightning_bn.functional.leakage import BatchLeakage, batch_leakage
    from lightning_bn.functional.mini_batch import mini_batch_inference
    from lightning_bn.functional.normalization_batch import normalization_batch_size
    from lightning_bn.functional.precise import precise_bn
    from lightning_bn.functional.roi_shuffle import roi_shuffle
    from lightning_bn.functional.sync import sync_bn
    from lightning_bn.layers.find import find_bn
    from lightning_bn.tracking.metrics import DeadChannels, MeanGap, NonFiniteChannels, VarGap
    from lightning_bn.trainer.pass_config import FromLoader, PassConfig, Replay
else:  # type checkers take any name from a module that they see a __getattr__ of
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "AdaBNCallback": "callbacks.ada_bn",
            "BNStatsMonitor": "callbacks.bn_stats_monitor",
            "BatchLeakage": "functional.leakage",
            "BatchLeakageMonitor": "callbacks.batch_leakage_monitor",
            "DeadChannels": "tracking.metrics",
            "DomainSpecificBNCallback": "callbacks.domain_specific_bn",
            "ForecastBNCallback": "callbacks.forecast_bn",
            "FreezeBNCallback": "callbacks.freeze_bn",
            "FromLoader": "trainer.pass_config",
            "GhostBNCallback": "callbacks.ghost_bn",
            "LayerStatistics": "core.population",
            "MeanGap": "tracking.metrics",
            "MiniBatchInferenceCallback": "callbacks.mini_batch_inference",
            "Moments": "core.moments",
            "NonFiniteChannels": "tracking.metrics",
            "PassConfig": "trainer.pass_config",
            "PopulationStatistics": "core.population",
            "PreciseBNCallback": "callbacks.precise_bn",
            "Replay": "trainer.pass_config",
            "RoIShuffleCallback": "callbacks.roi_shuffle",
            "SyncBNCallback": "callbacks.sync_bn",
            "VarGap": "tracking.metrics",
            "adapt_bn": "functional.adapt",
            "batch_leakage": "functional.leakage",
            "domain_bn": "functional.domain.bn",
            "exchange_rows": "core.exchange",
            "find_bn": "layers.find",
            "freeze_bn": "functional.freeze",
            "ghost_bn": "functional.ghost",
            "mini_batch_inference": "functional.mini_batch",
            "normalization_batch_size": "functional.normalization_batch",
            "plots": "plots",
            "precise_bn": "functional.precise",
            "restore_rows": "core.exchange",
            "roi_shuffle": "functional.roi_shuffle",
            "sync_bn": "functional.sync",
        },
    )
