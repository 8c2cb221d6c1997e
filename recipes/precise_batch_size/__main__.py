"""The command and its report.

    python -m recipes.precise_batch_size --preset demo
    python -m recipes.precise_batch_size --preset demo --batch_sizes [2,4,8,100] --tolerances [0.05,0.01]
    python -m recipes.precise_batch_size --preset full --data-root ~/data/cifar-10-batches-py --data.shift 4
    python -m recipes.precise_batch_size --preset demo --print_config > mine.yaml
    python -m recipes.precise_batch_size --config mine.yaml

The figures in docs/assets are the demo's:
    for name in batch_size depth; do cp runs/precise_batch_size/demo/$name.png docs/assets/precise_$name.png; done
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace  # type: ignore[attr-defined, unused-ignore]
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure

from recipes import classifier, figures
from recipes.evaluation import mean_and_spread
from recipes.images import FASHION_MNIST, ImageData
from recipes.precise_batch_size import LISTING
from recipes.precise_batch_size.claims import judge
from recipes.precise_batch_size.experiment import Estimate, Results, Row, measure
from recipes.run import Recipe, quiet_lightning, run
from recipes.tolerance import TOLERANCES, tolerance_section

DEFAULTS: dict[str, Any] = {
    **classifier.TRAINER,
    "data.batch_size": 32,
    "model.network": "plain20",  # with shortcuts, errors hardly accumulate over so few layers
    "model.width": 8,
    "model.lr": 0.1,
}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "data.train_images": 600,
        "data.val_images": 200,
        "trainer.max_epochs": 1,
        "images": 200,
        "batch_sizes": [2, 100],
        "draws": 2,
    },
    "demo": {"trainer.max_epochs": 4},
    "full": {
        "data_root": FASHION_MNIST,
        "data.train_images": 30_000,
        "trainer.max_epochs": 3,
        "seeds": [0, 1, 2],
        "images": 20_000,
        "draws": 2,
        "tolerances": list(TOLERANCES),
    },
}
SECTIONS = """\
## Validation error by B (Table 2)

{errors}

![Validation error against B](batch_size.png)

Every B sees the same {images:,} training images. The last column is all of them as one batch, which is exact. ± is the
standard deviation over {draws} draws of the images. The models differ only in how many images of a training batch were
normalized jointly (Ghost BN); first weights, batches and steps are the same.

## Seconds per pass

{times}

Up to the size of a training batch, B images are one micro-batch; larger B are several micro-batches in lockstep. On a
busy machine these times say little.

## By depth

![Distance from the exact statistics, by layer](depth.png)

Distances from the exact statistics of the same images. Mean gap: root mean square over channels of the difference of
means, in sigma. Variance gap: that of the log ratio of variances. The network has {layers} BN layers.
{tolerances}"""


class PreciseBatchSize(Recipe[Results]):
    """Estimates the statistics of trained models with normalization batches of several sizes B."""

    name, listing = "precise_batch_size", LISTING
    title = "PreciseBN's normalization batch B"
    unit = "Errors are validation errors in percent."
    defaults, presets = DEFAULTS, PRESETS
    measure = staticmethod(measure)
    claims = staticmethod(judge)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--nbs", type=list[PositiveInt], default=[32, 2], help="images normalized jointly in training"
        )
        parser.add_argument(
            "--batch_sizes", type=list[PositiveInt], default=[2, 10, 100, 1000], help="the B of Table 2"
        )
        parser.add_argument("--images", type=PositiveInt, default=2000, help="training images of every estimate")
        parser.add_argument("--draws", type=PositiveInt, default=3, help="draws of these images, for the spread")
        parser.add_argument(
            "--tolerances", type=list[float], default=[], help="show where precise_bn(tolerance=) stops"
        )
        classifier.add_arguments(parser, ImageData)

    def setting(self, results: Results, config: Namespace) -> str:
        images = f"{results.training_images:,} training and {results.validation_images:,} validation images"
        return f"{results.data}, {images}; {classifier.training(config, config.data.batch_size)}"

    def figures(self, results: Results) -> dict[str, Figure]:
        sweeps, depths = [], []
        for nbs in results.trained:
            rows, title = results.of(nbs), f"trained with NBS {nbs}"
            sizes = list(rows[0].precise)
            errors = {b: [error for row in rows for error in row.precise[b].errors()] for b in sizes}
            ema = 100 * float(torch.cat([row.ema.wrong for row in rows]).mean())
            sweeps.append(figures.SampleSweep(title, ema, errors))
            gaps = {f"B = {b:,}": _gaps([row.precise[b] for row in rows]) for b in sizes if b != results.images}
            depths.append(figures.DepthProfile(title, gaps, _gaps([row.ema for row in rows])))
        return {
            "batch_size": figures.error_against_samples(sweeps, xlabel="normalization batch B of PreciseBN"),
            "depth": figures.gaps_in_depth(depths),
        }

    def table(self, results: Results) -> list[str]:
        """Table 2."""
        lines = _header(results, "| trained with | EMA |")
        for nbs in results.trained:
            rows = results.of(nbs)
            ema = mean_and_spread(*(row.ema.wrong for row in rows))
            cells = [mean_and_spread(*(row.precise[b].wrong for row in rows)) for b in rows[0].precise]
            lines.append(f"| NBS {nbs} | {ema} | {' | '.join(cells)} |")
        return lines

    def sections(self, results: Results, config: Namespace) -> str:
        return SECTIONS.format(
            errors="\n".join(self.table(results)),
            images=results.images,
            draws=config.draws,
            times="\n".join(_times_table(results)),
            layers=len(results.layers),
            tolerances=tolerance_section(results.stops),
        )

    def as_json(self, results: Results) -> dict[str, Any]:
        rows = [_plain(row) for row in results.rows]
        return {**vars(results), "rows": rows, "stops": [stop.as_json() for stop in results.stops]}


def _plain(row: Row) -> dict[str, Any]:
    sizes = {
        str(b): {"errors": estimate.errors(), "seconds": estimate.seconds, "gaps": estimate.gaps.mean(0).tolist()}
        for b, estimate in row.precise.items()
    }
    ema = {"ema_error": row.ema.errors()[0], "ema_gaps": row.ema.gaps.mean(0).tolist()}
    return {"nbs": row.nbs, "seed": row.seed, **ema, "batch_sizes": sizes}


def _times_table(results: Results) -> list[str]:
    lines = _header(results, "| trained with |")
    for nbs in results.trained:
        rows = results.of(nbs)
        seconds = [torch.tensor([s for row in rows for s in row.precise[b].seconds]) for b in rows[0].precise]
        lines.append(f"| NBS {nbs} | {' | '.join(f'{float(s.mean()):.1f}' for s in seconds)} |")
    return lines


def _header(results: Results, start: str) -> list[str]:
    columns = [f"B={b:,}" for b in results.rows[0].precise]
    columns[-1] = f"N={results.images:,}"
    return [f"{start} {' | '.join(columns)} |", "|---" * (start.count("|") - 1 + len(columns)) + "|"]


def _gaps(estimates: Sequence[Estimate]) -> list[tuple[float, float]]:
    """Mean over seeds and draws, by layer."""
    mean = torch.cat([estimate.gaps for estimate in estimates]).mean(0)
    return [(float(of_mean), float(of_var)) for of_mean, of_var in mean]


def main(arguments: Sequence[str] | None = None) -> Path:
    return run(PreciseBatchSize(), arguments)


if __name__ == "__main__":
    quiet_lightning()
    main()
