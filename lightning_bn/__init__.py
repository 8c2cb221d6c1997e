"""The BatchNorm toolkit for PyTorch Lightning: *Rethinking "Batch" in BatchNorm* (Wu & Johnson, 2021) in practice.

A callback changes which batch a BatchNorm layer normalizes over. The functions do the same in plain PyTorch.

LightningCLI finds a callback by its full name, ``lightning_bn.PreciseBNCallback``. The short name works once the class
has been imported.
"""

from typing import TYPE_CHECKING

from lightning_bn.lazy import lazily

_MODULES = {
    "callbacks.ada_bn": ["AdaBNCallback"],
    "callbacks.batch_leakage_monitor": ["BatchLeakageMonitor"],
    "callbacks.bn_stats_monitor": ["BNStatsMonitor"],
    "callbacks.domain_specific_bn": ["DomainSpecificBNCallback"],
    "callbacks.forecast_bn": ["ForecastBNCallback"],
    "callbacks.freeze_bn": ["FreezeBNCallback"],
    "callbacks.ghost_bn": ["GhostBNCallback"],
    "callbacks.mini_batch_inference": ["MiniBatchInferenceCallback"],
    "callbacks.precise_bn": ["PreciseBNCallback"],
    "callbacks.roi_shuffle": ["RoIShuffleCallback"],
    "callbacks.sync_bn": ["SyncBNCallback"],
    "core.exchange": ["Exchange", "exchange_rows", "restore_rows"],
    "core.moments": ["Moments"],
    "core.population": ["LayerStatistics", "PopulationStatistics"],
    "core.ranks": ["AnotherRankFailedError"],
    "functional.adapt": ["Adaptation", "adapt_bn"],
    "functional.domain.bn": ["DomainHandle", "domain_bn"],
    "functional.freeze": ["freeze_bn"],
    "functional.ghost": ["ghost_bn"],
    "functional.leakage": ["BatchLeakage", "batch_leakage"],
    "functional.mini_batch": ["MiniBatchHandle", "mini_batch_inference"],
    "functional.normalization_batch": ["normalization_batch_size"],
    "functional.precise": ["precise_bn"],
    "functional.roi_shuffle": ["Shuffle", "roi_shuffle"],
    "functional.sync": ["sync_bn"],
    "layers.behavior": ["Handle"],
    "layers.find": ["find_bn"],
    "lockstep.pooled": ["NotEnoughMemoryError"],
    "lockstep.scheduler": ["LockstepError"],
    "tracking.metrics": ["DeadChannels", "MeanGap", "NonFiniteChannels", "VarGap"],
    "trainer.pass_config": ["FromLoader", "PassConfig", "Replay"],
    "plots": ["plots"],
}
__all__ = sorted(name for names in _MODULES.values() for name in names)

if TYPE_CHECKING:
    from lightning_bn import plots as plots
    from lightning_bn.callbacks.ada_bn import AdaBNCallback as AdaBNCallback
    from lightning_bn.callbacks.batch_leakage_monitor import BatchLeakageMonitor as BatchLeakageMonitor
    from lightning_bn.callbacks.bn_stats_monitor import BNStatsMonitor as BNStatsMonitor
    from lightning_bn.callbacks.domain_specific_bn import DomainSpecificBNCallback as DomainSpecificBNCallback
    from lightning_bn.callbacks.forecast_bn import ForecastBNCallback as ForecastBNCallback
    from lightning_bn.callbacks.freeze_bn import FreezeBNCallback as FreezeBNCallback
    from lightning_bn.callbacks.ghost_bn import GhostBNCallback as GhostBNCallback
    from lightning_bn.callbacks.mini_batch_inference import MiniBatchInferenceCallback as MiniBatchInferenceCallback
    from lightning_bn.callbacks.precise_bn import PreciseBNCallback as PreciseBNCallback
    from lightning_bn.callbacks.roi_shuffle import RoIShuffleCallback as RoIShuffleCallback
    from lightning_bn.callbacks.sync_bn import SyncBNCallback as SyncBNCallback
    from lightning_bn.core.exchange import Exchange as Exchange
    from lightning_bn.core.exchange import exchange_rows as exchange_rows
    from lightning_bn.core.exchange import restore_rows as restore_rows
    from lightning_bn.core.moments import Moments as Moments
    from lightning_bn.core.population import LayerStatistics as LayerStatistics
    from lightning_bn.core.population import PopulationStatistics as PopulationStatistics
    from lightning_bn.core.ranks import AnotherRankFailedError as AnotherRankFailedError
    from lightning_bn.functional.adapt import Adaptation as Adaptation
    from lightning_bn.functional.adapt import adapt_bn as adapt_bn
    from lightning_bn.functional.domain.bn import DomainHandle as DomainHandle
    from lightning_bn.functional.domain.bn import domain_bn as domain_bn
    from lightning_bn.functional.freeze import freeze_bn as freeze_bn
    from lightning_bn.functional.ghost import ghost_bn as ghost_bn
    from lightning_bn.functional.leakage import BatchLeakage as BatchLeakage
    from lightning_bn.functional.leakage import batch_leakage as batch_leakage
    from lightning_bn.functional.mini_batch import MiniBatchHandle as MiniBatchHandle
    from lightning_bn.functional.mini_batch import mini_batch_inference as mini_batch_inference
    from lightning_bn.functional.normalization_batch import normalization_batch_size as normalization_batch_size
    from lightning_bn.functional.precise import precise_bn as precise_bn
    from lightning_bn.functional.roi_shuffle import Shuffle as Shuffle
    from lightning_bn.functional.roi_shuffle import roi_shuffle as roi_shuffle
    from lightning_bn.functional.sync import sync_bn as sync_bn
    from lightning_bn.layers.behavior import Handle as Handle
    from lightning_bn.layers.find import find_bn as find_bn
    from lightning_bn.lockstep.pooled import NotEnoughMemoryError as NotEnoughMemoryError
    from lightning_bn.lockstep.scheduler import LockstepError as LockstepError
    from lightning_bn.tracking.metrics import DeadChannels as DeadChannels
    from lightning_bn.tracking.metrics import MeanGap as MeanGap
    from lightning_bn.tracking.metrics import NonFiniteChannels as NonFiniteChannels
    from lightning_bn.tracking.metrics import VarGap as VarGap
    from lightning_bn.trainer.pass_config import FromLoader as FromLoader
    from lightning_bn.trainer.pass_config import PassConfig as PassConfig
    from lightning_bn.trainer.pass_config import Replay as Replay
else:  # type checkers would take any name from a module that has a __getattr__
    __getattr__, __dir__ = lazily(__name__, {name: module for module, names in _MODULES.items() for name in names})
