"""`python -m lightning_bn.report RUN` writes what `BNStatsMonitor` logged in a run as one HTML page."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_bn.report.page import write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m lightning_bn.report", description=__doc__)
    kinds = "wandb/offline-run-... or wandb/latest-run, a TensorBoard log directory, or a CSVLogger's log directory"
    parser.add_argument("run", metavar="RUN", type=Path, help=kinds)
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page (default: RUN/bn_report.html)")
    parsed = parser.parse_args(arguments)
    try:
        print(write_report(parsed.run, out=parsed.out))
    except (ImportError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
