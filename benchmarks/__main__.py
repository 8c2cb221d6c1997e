"""Measure the speed claims and write benchmarks/RESULTS.md: `python -m benchmarks`, or `make bench`."""

from __future__ import annotations

import argparse
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks import exact, forecast, ghost, leakage, monitor, operators, precise_pass, roi_shuffle, sync
from benchmarks.results import machine, update, versions

BENCHMARKS = {
    "exact": exact,
    "forecast": forecast,
    "ghost": ghost,
    "leakage": leakage,
    "monitor": monitor,
    "operators": operators,
    "precise_pass": precise_pass,
    "roi_shuffle": roi_shuffle,
    "sync": sync,
}
RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    """Runs the chosen benchmarks on every device."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    names = [f"{name}.{device}" for name in BENCHMARKS for device in devices]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", nargs="+", choices=devices, default=devices, help="default: all that there are")
    parser.add_argument("--only", nargs="+", choices=names, help="what to measure; default: all")
    parser.add_argument("--quick", action="store_true", help="run each with few rounds, to check it; writes no results")
    arguments = parser.parse_args()
    minutes: dict[str, float] = {}
    for chosen in arguments.only or [name for name in names if name.split(".")[1] in arguments.device]:
        name, device = chosen.split(".")
        benchmark = BENCHMARKS[name]
        print(f"{chosen}: {benchmark.CLAIM}", flush=True)
        started = time.perf_counter()
        report = benchmark.report(device, arguments.quick)
        minutes[chosen] = (time.perf_counter() - started) / 60
        if arguments.quick:
            print(report)
            continue
        measured = (
            f"**Measured** on {date.today()} in {minutes[chosen]:.0f} minutes by `python -m benchmarks --only "
            f"{chosen}` on "
            f"{machine(device)}; {versions('torch', 'torchvision', 'fvcore')}, {torch.get_num_threads()} threads."
        )
        title = f"## {benchmark.TITLE} ({'CPU' if device == 'cpu' else 'CUDA'})"
        update(RESULTS, {chosen: "\n\n".join([title, f"**Claim.** {benchmark.CLAIM}", measured, report])})
        print(f"written to {RESULTS}")
    slowest = max(minutes, key=lambda name: minutes[name])
    print(f"Slowest: {slowest}, {minutes[slowest]:.1f} of {sum(minutes.values()):.1f} minutes.")


if __name__ == "__main__":
    main()
