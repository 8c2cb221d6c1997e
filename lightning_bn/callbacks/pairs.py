"""Which callbacks go together on one layer, and what becomes of it: the table of the docs, and what is refused."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Pair(NamedTuple):
    """Two callbacks on one layer."""

    verdict: Literal["works", "warns", "refused"]
    why: str


_OBSERVED = "the monitor only looks; it comes after the other, wherever it stands in the list"

_TESTED = "the monitor only looks, at the end of an epoch"

PAIRS: dict[frozenset[str], Pair] = {
    frozenset(names): pair
    for names, pair in {
        ("PreciseBNCallback", "FreezeBNCallback"): Pair(
            "works", "evaluation is precise until the switch; from then on the statistics are frozen and no pass runs"
        ),
        ("PreciseBNCallback", "MiniBatchInferenceCallback"): Pair(
            "works", "mini-batch inference's stages use the batch, all others and checkpoints the precise statistics"
        ),
        ("PreciseBNCallback", "AdaBNCallback"): Pair(
            "works", "the precise statistics of the source are what adapting starts from and puts back"
        ),
        ("PreciseBNCallback", "GhostBNCallback"): Pair(
            "works", "a pass normalizes whole batches: estimates want large ones (Table 2)"
        ),
        ("PreciseBNCallback", "SyncBNCallback"): Pair(
            "works", "a pass does not wait for other ranks, and pools their moments at its end"
        ),
        ("FreezeBNCallback", "MiniBatchInferenceCallback"): Pair(
            "works", "until the switch; a frozen layer evaluates with its frozen statistics"
        ),
        ("FreezeBNCallback", "AdaBNCallback"): Pair(
            "warns", "weights trained with frozen statistics fit those: accuracy fell from 77.9 to 48.5 % in a trial"
        ),
        ("FreezeBNCallback", "GhostBNCallback"): Pair("works", "ghosts until the switch; frozen layers have none"),
        ("FreezeBNCallback", "SyncBNCallback"): Pair(
            "works", "synchronized until the switch; frozen layers need nobody"
        ),
        ("MiniBatchInferenceCallback", "AdaBNCallback"): Pair(
            "refused", "both say which statistics evaluation uses, the batch's or the target's"
        ),
        ("MiniBatchInferenceCallback", "GhostBNCallback"): Pair(
            "works", "one acts in training, the other in evaluation, which takes the whole batch"
        ),
        ("MiniBatchInferenceCallback", "SyncBNCallback"): Pair(
            "works", "one acts in training, the other in evaluation, which takes the own rank's batch"
        ),
        ("AdaBNCallback", "GhostBNCallback"): Pair("works", "one acts in training, the other in evaluation"),
        ("AdaBNCallback", "SyncBNCallback"): Pair("works", "one acts in training, the other in evaluation"),
        ("GhostBNCallback", "SyncBNCallback"): Pair(
            "refused", "one makes the normalization batch smaller than the device's, the other larger"
        ),
        ("DomainSpecificBNCallback", "PreciseBNCallback"): Pair(
            "works", "a pass estimates each domain, or all together, as they are trained and evaluated"
        ),
        ("DomainSpecificBNCallback", "FreezeBNCallback"): Pair(
            "works", "a frozen layer normalizes each domain with the population that evaluation uses"
        ),
        ("DomainSpecificBNCallback", "MiniBatchInferenceCallback"): Pair(
            "refused", "both say which statistics evaluation uses, the domain's or the batch's"
        ),
        ("DomainSpecificBNCallback", "AdaBNCallback"): Pair(
            "refused", "both say which statistics evaluation uses, the domain's or the target's"
        ),
        ("DomainSpecificBNCallback", "GhostBNCallback"): Pair(
            "refused", "both say which parts of a batch are normalized by themselves"
        ),
        ("DomainSpecificBNCallback", "SyncBNCallback"): Pair(
            "refused", "ranks would wait for each other where they are shown different domains"
        ),
        ("BNStatsMonitor", "DomainSpecificBNCallback"): Pair(
            "works", _OBSERVED + "; it shows the running statistics, those of all domains together"
        ),
        ("BNStatsMonitor", "PreciseBNCallback"): Pair(
            "works", _OBSERVED + ", and logs how far each pass moved a layer"
        ),
        ("BNStatsMonitor", "FreezeBNCallback"): Pair("works", _OBSERVED + ", and shows the drift from what was frozen"),
        ("BNStatsMonitor", "MiniBatchInferenceCallback"): Pair("works", _OBSERVED),
        ("BNStatsMonitor", "AdaBNCallback"): Pair("works", _OBSERVED),
        ("BNStatsMonitor", "GhostBNCallback"): Pair("works", _OBSERVED + "; its noise is that of the whole batch"),
        ("BNStatsMonitor", "SyncBNCallback"): Pair("works", _OBSERVED + "; its noise is that of all ranks' batch"),
        ("RoIShuffleCallback", "PreciseBNCallback"): Pair(
            "works", "a pass exchanges nothing: in it ranks do not wait for each other"
        ),
        ("RoIShuffleCallback", "FreezeBNCallback"): Pair(
            "works", "exchanged until the switch; frozen layers do not mind whose rows they get"
        ),
        ("RoIShuffleCallback", "MiniBatchInferenceCallback"): Pair(
            "works", "one acts in training, the other in evaluation, which takes the own rank's rows"
        ),
        ("RoIShuffleCallback", "AdaBNCallback"): Pair("works", "one acts in training, the other in evaluation"),
        ("RoIShuffleCallback", "GhostBNCallback"): Pair("works", "ghosts are groups of the rows that were exchanged"),
        ("RoIShuffleCallback", "SyncBNCallback"): Pair(
            "refused", "rows that all ranks normalize as one batch need not be exchanged"
        ),
        ("RoIShuffleCallback", "BNStatsMonitor"): Pair(
            "works", _OBSERVED + "; its batches are those of exchanged rows"
        ),
        ("BatchLeakageMonitor", "PreciseBNCallback"): Pair("works", _TESTED + ", with the statistics of the last pass"),
        ("BatchLeakageMonitor", "FreezeBNCallback"): Pair(
            "works", _TESTED + ", until the switch; through frozen statistics nothing leaks"
        ),
        ("BatchLeakageMonitor", "MiniBatchInferenceCallback"): Pair(
            "works", _TESTED + "; `log_errors=True` is refused where validation has no population"
        ),
        ("BatchLeakageMonitor", "AdaBNCallback"): Pair(
            "works", _TESTED + ", and evaluates in fits alone, AdaBN outside"
        ),
        ("BatchLeakageMonitor", "GhostBNCallback"): Pair(
            "works", _TESTED + "; its normalization batches are the ghosts"
        ),
        ("BatchLeakageMonitor", "SyncBNCallback"): Pair(
            "works", _TESTED + "; its normalization batches are all ranks'"
        ),
        ("BatchLeakageMonitor", "BNStatsMonitor"): Pair("works", "both only look"),
        ("DomainSpecificBNCallback", "RoIShuffleCallback"): Pair(
            "refused", "rows that go to another rank do not take their domain along"
        ),
        ("BatchLeakageMonitor", "DomainSpecificBNCallback"): Pair(
            "refused", "rows of several domains differ by their domain, which would read as a leak"
        ),
        ("BatchLeakageMonitor", "RoIShuffleCallback"): Pair(
            "works", _TESTED + "; its pass exchanges nothing, so it tests the rows of each rank as they were"
        ),
    }.items()
}
"""Every pair of two callbacks."""


def compatibility(one: type, other: type) -> Pair | None:
    """What is known of two callbacks of these classes, or of those they are derived from."""
    for a in one.__mro__:
        for b in other.__mro__:
            pair = PAIRS.get(frozenset((a.__name__, b.__name__)))
            if pair is not None:
                return pair
    return None


def as_markdown() -> str:
    """The table of the docs."""
    order = {"works": 0, "warns": 1, "refused": 2}
    lines = ["| together on one layer | | |", "|---|---|---|"]
    for names, pair in sorted(PAIRS.items(), key=lambda item: order[item[1].verdict]):
        lines.append(f"| {' + '.join(f'`{name}`' for name in sorted(names))} | **{pair.verdict}** | {pair.why} |")
    return "\n".join(lines)
