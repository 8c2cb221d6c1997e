"""`python -m lightning_bn.report RUN`: one HTML page of what `BNStatsMonitor` logged, to be read offline."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_bn.plots.page import run_page
from lightning_bn.plots.runs import read_run


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Reads the run and writes its page.

    Args:
        run: An offline W&B run's folder, a TensorBoard log directory, or a CSVLogger's log directory.
        out: The file to write; by default `bn_report.html` in the run's folder.

    Returns:
        The file.

    Raises:
        ValueError: `run` is none of the three.
        ImportError: It is a TensorBoard log, and `tensorboard` is not installed.
    """
    path = Path(out) if out else Path(run) / "bn_report.html"
    page = run_page(read_run(run))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m lightning_bn.report", description=__doc__)
    parser.add_argument(
        "run",
        metavar="RUN",
        type=Path,
        help="wandb/offline-run-... or wandb/latest-run, a TensorBoard log directory, or a CSVLogger's log directory",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page (default: RUN/bn_report.html)")
    chosen = parser.parse_args(arguments)
    try:
        print(write_report(chosen.run, chosen.out))
    except (ImportError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
