"""The command and its report.

    python -m recipes.batch_leakage --preset demo
    python -m recipes.batch_leakage --preset demo --data.classes 8 --data.each 4 --seeds [0,1]
    python -m recipes.batch_leakage --preset full --data-root ~/data/cifar-10-batches-py
    python -m recipes.batch_leakage --preset demo --print_config > mine.yaml
    python -m recipes.batch_leakage --config mine.yaml

The figure in docs/assets is the demo's:
    cp runs/batch_leakage/demo/batch_leakage.png docs/assets/
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace  # type: ignore[attr-defined, unused-ignore]
from matplotlib.figure import Figure

from recipes import classifier, figures
from recipes.batch_leakage import LISTING
from recipes.batch_leakage.claims import judge, outcome
from recipes.batch_leakage.data import LeakyData
from recipes.batch_leakage.experiment import ARMS, STATISTICS, Results, measure
from recipes.images import FASHION_MNIST
from recipes.run import Recipe, quiet_lightning, run

DEFAULTS: dict[str, Any] = {**classifier.TRAINER, "model.width": 16, "model.lr": 0.1}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"data.train_images": 1024, "data.val_images": 256, "model.width": 8, "trainer.max_epochs": 1},
    "demo": {"trainer.max_epochs": 8},
    "full": {
        "data_root": FASHION_MNIST,
        "data.train_images": 12_000,
        "data.val_images": 4000,
        "trainer.max_epochs": 40,
        "seeds": [0, 1, 2],
    },
}
SECTIONS = """\
## Validation error over the epochs (Fig. 8)

![Validation error with population and mini-batch statistics](batch_leakage.png)

{errors}

*random*: random training batches. *pattern*: batches of {pattern} images. *Ghost BN*: the same batches, of which each
layer normalizes one image of every class jointly. Population statistics are the EMA's. *Same pattern* uses other draws
of the validation images than the other two, so compare it with its curve under *random*, too.

## BatchLeakageMonitor

{alarms}

At level {alpha:g}. Positive correlation: samples that a layer normalizes jointly are alike. Negative: they are
balanced, as with Ghost BN, where no class occurs twice. After an alarm the monitor stops testing.
"""


class BatchLeakageRecipe(Recipe[Results]):
    """Trains on random batches, on batches of a pattern, and on the latter with Ghost BN."""

    name, listing = "batch_leakage", LISTING
    title = "Leakage through batches of several images per class"
    unit = "Errors are validation errors in percent."
    defaults, presets = DEFAULTS, PRESETS
    measure = staticmethod(measure)
    claims = staticmethod(judge)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--alpha", type=float, default=0.01, help="share of runs without leakage that may alarm")
        classifier.add_arguments(parser, LeakyData)

    def setting(self, results: Results, config: Namespace) -> str:
        images = f"an epoch has {results.training_images:,} images, an error {results.validation_images:,}"
        training = classifier.training(config, config.data.classes * config.data.each)
        return f"{results.data}, {results.classes} classes; {images}; {training}"

    def figures(self, results: Results) -> dict[str, Figure]:
        panels = []
        for arm in ARMS:
            trainings = results.of(arm)
            errors = {key: [training.errors[key] for training in trainings] for key in STATISTICS}
            alarms = [training.alarm for training in trainings if training.alarm is not None]
            panels.append(figures.LeakageCurves(arm, **errors, alarms=alarms))
        return {"batch_leakage": figures.leakage_curves(panels)}

    def table(self, results: Results) -> list[str]:
        """Fig. 8 at about ten epochs."""
        epochs = len(results.trainings[0].errors["population"])
        shown = sorted({max(1, round(epochs * part / 10)) for part in range(1, 11)})
        lines = [
            f"| trained with | statistics, epoch | {' | '.join(map(str, shown))} |",
            "|---" * (len(shown) + 2) + "|",
        ]
        for arm in ARMS:
            trainings = results.of(arm)
            for number, (statistics, name) in enumerate(STATISTICS.items()):
                means = [sum(t.errors[statistics][epoch - 1] for t in trainings) / len(trainings) for epoch in shown]
                cells = " | ".join(f"{mean:.1f}" for mean in means)
                lines.append(f"| {'' if number else arm} | {name} | {cells} |")
        return lines

    def sections(self, results: Results, config: Namespace) -> str:
        alarms = ["| trained with | seed | monitor | correlation of the worst layer, by epoch |", "|---" * 4 + "|"]
        for training in results.trainings:
            by_epoch = ", ".join(f"{value:+.3f}" for value in training.icc)
            alarms.append(f"| {training.arm} | {training.seed} | {outcome(training)} | {by_epoch} |")
        errors, pattern = "\n".join(self.table(results)), results.pattern
        return SECTIONS.format(errors=errors, pattern=pattern, alarms="\n".join(alarms), alpha=config.alpha)

    def as_json(self, results: Results) -> dict[str, Any]:
        return asdict(results)


def main(arguments: Sequence[str] | None = None) -> Path:
    return run(BatchLeakageRecipe(), arguments)


if __name__ == "__main__":
    quiet_lightning()
    main()
