"""Table of the features that cannot act on one layer, named by the ``kind`` of their behavior or callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import nn
from torch.nn import SyncBatchNorm

from lightning_bn.layers.behavior import behaviors_of

FEATURES = {
    "population": "PreciseBN",
    "forecast": "ForecastBN",
    "frozen": "FreezeBN",
    "mini-batch": "mini-batch inference",
    "adapted": "AdaBN",
    "ghost": "Ghost BN",
    "sync": "SyncBN",
    "domain": "domain-specific BN",
    "row shuffle": "RoIShuffle",
    "stats monitor": "BNStatsMonitor",
    "leakage monitor": "BatchLeakageMonitor",
}
"""Kind -> name of the feature."""


class Pair(NamedTuple):
    """Rates two features on one layer."""

    verdict: Literal["works", "warns", "refused"]
    reason: str


_ROWS: list[tuple[str, str, Literal["works", "warns", "refused"], str]] = [
    ("population", "frozen", "works", "PreciseBN until the switch, then frozen statistics and no passes"),
    ("population", "mini-batch", "works", "batch statistics only in the stages of mini-batch inference"),
    ("population", "adapted", "works", "AdaBN starts from PreciseBN's statistics and restores them"),
    ("population", "ghost", "works", "a pass normalizes whole batches: estimates need large ones (Table 2)"),
    ("population", "sync", "works", "in a pass ranks do not synchronize; their moments are merged at its end"),
    ("population", "domain", "works", "a pass estimates the statistics of evaluation: per domain, or shared"),
    ("population", "row shuffle", "works", "a pass exchanges no rows"),
    ("forecast", "frozen", "works", "a forecast until the switch, then frozen statistics"),
    ("forecast", "population", "refused", "both write the running statistics that evaluation uses"),
    ("frozen", "mini-batch", "works", "mini-batch statistics until the switch, then frozen ones"),
    ("frozen", "ghost", "works", "ghost batches until the switch; frozen layers have none"),
    ("frozen", "sync", "works", "synchronized until the switch; frozen layers need no other rank"),
    ("frozen", "domain", "works", "a frozen layer uses the statistics of evaluation: per domain, or shared"),
    ("frozen", "row shuffle", "works", "rows are exchanged until the switch"),
    ("frozen", "adapted", "warns", "weights trained with frozen statistics need those: accuracy 77.9 -> 48.5 %"),
    ("ghost", "row shuffle", "works", "ghost batches are groups of the exchanged rows"),
    ("leakage monitor", "mini-batch", "works", "`log_errors=True` is refused if validation uses batch statistics"),
    ("leakage monitor", "row shuffle", "works", "its pass exchanges no rows, so it tests each rank's own rows"),
    ("mini-batch", "adapted", "refused", "both choose the statistics of evaluation: the batch's or the target's"),
    ("mini-batch", "domain", "refused", "both choose the statistics of evaluation: the batch's or the domain's"),
    ("adapted", "domain", "refused", "both choose the statistics of evaluation: the target's or the domain's"),
    ("ghost", "sync", "refused", "one makes the normalization batch smaller than the device's, the other larger"),
    ("ghost", "domain", "refused", "both choose which samples of a batch are normalized together"),
    ("sync", "domain", "refused", "ranks with different domains would wait for each other"),
    ("sync", "row shuffle", "refused", "ranks that normalize their rows as one batch need not exchange them"),
    ("domain", "row shuffle", "refused", "rows that move to another rank lose their domain"),
    ("domain", "leakage monitor", "refused", "rows of several domains differ, which the test reports as leakage"),
]
PAIRS = {frozenset(row[:2]): Pair(*row[2:]) for row in _ROWS}
"""Pairs that are not listed work and do not affect each other."""

REPEATABLE = ("frozen", "mini-batch")
"""A layer may have two of these kinds: they do the same as one."""


def find_conflict(kind: str, other: str) -> str | None:
    """Return why two features cannot act on one layer; None if they can."""
    if kind == other:
        return "both do the same"
    pair = PAIRS.get(frozenset((kind, other)))
    return pair.reason if pair and pair.verdict == "refused" else None


def check_conflicts(layers: Mapping[str, nn.Module], kind: str, model: nn.Module | None = None) -> None:
    """Raise if a layer, or a module of ``model`` that contains it, has a behavior that conflicts with a feature."""
    changed = [m for m in model.modules() if behaviors_of(m)] if model is not None else []
    for name, layer in layers.items():
        around = [m for m in changed if m is not layer and any(layer is inner for inner in m.modules())]
        for behavior in (b for module in (layer, *around) for b in behaviors_of(module)):
            reason = find_conflict(kind, behavior.kind)
            if reason is None or (kind == behavior.kind and kind in REPEATABLE):
                continue
            if kind == behavior.kind:
                raise ValueError(f"Layer {name!r} already has {FEATURES[kind]}: undo() its handle first.")
            raise ValueError(
                f"Layer {name!r} cannot have {FEATURES[kind]}, because it has {FEATURES[behavior.kind]}: {reason}. "
                "Leave the layer out by layers=, or undo() the other handle first."
            )
        if isinstance(layer, SyncBatchNorm) and (reason := find_conflict(kind, "sync")):
            raise TypeError(
                f"Layer {name!r} is a SyncBatchNorm and cannot have {FEATURES[kind]}: {reason}. Leave it out by "
                "layers=, or do not convert it (sync_batchnorm=False)."
            )
