"""What the results are turned into: figures, `report.md` and `report.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lightning_bn import plots
from recipes.claims import Claim
from recipes.evaluation import mean_and_spread
from recipes.precise_batch_size.experiment import Estimate, Results, Row
from recipes.report import claims_table, write_report
from recipes.tolerance import plain, tolerance_section

REPORT = """\
# PreciseBN's normalization batch B: `{preset}`

{data}, {training_images:,} training and {validation_images:,} validation images; {training}; {layers} BN layers;
{seeds}. Took {seconds:.0f} s on {machine}.

## What the paper says, and what was measured

{claims}

Errors are validation errors in percent. Verdicts follow the fixed rules of `recipes/claims.py`: the ± of a
difference is the half-width of its 95 % interval, over repetitions or over validation images, whichever is
wider. What the interval cannot decide is *within noise*.

## Validation error by B (Table 2)

{errors}

![Validation error against B](batch_size.png)

Every B sees the same {images:,} training images; the last column is all of them as one batch, which is exact. ± is the
standard deviation over {draws} draws of the images. The models differ in how many images of a training batch were
normalized together (Ghost BN), and in nothing else: same first weights, same batches, same steps.

## Seconds a pass

{times}

Up to the size of a training batch, B images are one micro-batch; a larger B is several in lockstep, each forwarded
once. On a busy machine these say little.

## In depth

![Distance from the exact statistics, layer by layer](depth.png)

Mean gap: root mean square over channels of the distance of the means, in sigma; variance gap: that of the log ratio of
the variances. Both from the exact statistics of the same images.
{samples_needed}
`python -m recipes.precise_batch_size --config config.yaml` repeats this run ({versions}).
"""


def draw(results: Results) -> dict[str, Figure]:
    """The figures by file name."""
    sweeps, depths = [], []
    for nbs in results.trained:
        rows = results.of(nbs)
        by_b = rows[0].precise
        errors = {b: [100 * float(e) for row in rows for e in row.precise[b].wrong.mean(1)] for b in by_b}
        ema = 100 * float(torch.cat([row.ema.wrong for row in rows]).mean())
        sweeps.append(plots.SampleSweep(f"trained with NBS {nbs}", ema, errors))
        gaps = {f"B = {b:,}": _gaps([row.precise[b] for row in rows]) for b in by_b if b != results.images}
        depths.append(plots.DepthProfile(f"trained with NBS {nbs}", gaps, ema_gaps=_gaps([row.ema for row in rows])))
    return {
        "batch_size": plots.error_against_samples(sweeps, xlabel="normalization batch B of PreciseBN"),
        "depth": plots.gaps_in_depth(depths),
    }


def write(
    folder: Path,
    results: Results,
    verdicts: Sequence[Claim],
    figures: Mapping[str, Figure],
    about: Mapping[str, Any],
) -> list[Path]:
    """Writes the figures and both reports; returns their paths."""
    seeds = len(results.of(results.trained[0]))
    markdown = REPORT.format(
        **about,
        data=results.data,
        training_images=results.training_images,
        validation_images=results.validation_images,
        images=results.images,
        layers=len(results.layers),
        seeds=f"{seeds} seeds; errors are means over seeds" if seeds > 1 else "1 seed",
        claims="\n".join(claims_table(verdicts)),
        errors="\n".join(errors_table(results)),
        times="\n".join(_times_table(results)),
        draws=len(next(iter(results.rows[0].precise.values())).seconds),
        samples_needed=tolerance_section(results.stops),
    )
    return write_report(folder, markdown, _plain(results, verdicts, about), figures)


def errors_table(results: Results) -> list[str]:
    """Table 2."""
    lines = _header(results, "| trained with | EMA |")
    for nbs in results.trained:
        rows = results.of(nbs)
        ema = mean_and_spread(*(row.ema.wrong for row in rows))
        cells = [mean_and_spread(*(row.precise[b].wrong for row in rows)) for b in rows[0].precise]
        lines.append(f"| NBS {nbs} | {ema} | {' | '.join(cells)} |")
    return lines


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
    """Of every layer, mean over seeds and draws."""
    mean = torch.cat([estimate.gaps for estimate in estimates]).mean(0)
    return [(float(of_mean), float(of_var)) for of_mean, of_var in mean]


def _plain(results: Results, verdicts: Sequence[Claim], about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "recipe": "precise_batch_size",
        "about": dict(about),
        "data": results.data,
        "training_images": results.training_images,
        "validation_images": results.validation_images,
        "images": results.images,
        "layers": results.layers,
        "claims": [asdict(claim) for claim in verdicts],
        "rows": [_plain_row(row) for row in results.rows],
        "samples_needed": plain(results.stops),
    }


def _plain_row(row: Row) -> dict[str, Any]:
    return {
        "nbs": row.nbs,
        "seed": row.seed,
        "ema_error": 100 * float(row.ema.wrong.mean()),
        "ema_gaps": row.ema.gaps.mean(0).tolist(),
        "batch_sizes": {
            str(b): {
                "errors": (100 * found.wrong.mean(1)).tolist(),
                "seconds": found.seconds,
                "gaps": found.gaps.mean(0).tolist(),
            }
            for b, found in row.precise.items()
        },
    }
