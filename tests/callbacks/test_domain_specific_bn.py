"""DomainSpecificBNCallback: levels and datasets through whole fits, checkpoints, averages, passes and ranks."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from torch import Tensor, nn

from lightning_bn import DomainSpecificBNCallback, PreciseBNCallback
from tests.callbacks.zoo import At, Images, TinyNet, digest, fit, labels, said, train_loader, trainer_with, val_loader
from tests.functional.domains import CONSISTENT, ROWS, choices
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*")


class Head(nn.Module):
    """A tower that is run on each of three levels, as torchvision's heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
        self.classes = nn.Linear(4, 3)

    def forward(self, levels: list[Tensor]) -> Tensor:
        return self.classes(sum(self.conv(x).mean((2, 3)) for x in levels))


class Pyramid(TinyNet):
    """A classifier by a head on three levels of the image."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.head = Head()
        self.conv1 = self.bn1 = self.conv2 = self.bn2 = None

    def levels(self, x: Tensor) -> list[Tensor]:
        return [x, 3 * F.avg_pool2d(x, 2) + 1, F.avg_pool2d(x, 3) - 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.levels(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def of_levels(row: int = 4) -> DomainSpecificBNCallback:
    return DomainSpecificBNCallback(3, level_modules="head", **choices(row))


def of_labels(row: int = 4) -> DomainSpecificBNCallback:
    return DomainSpecificBNCallback(3, domain_fn=labels, **choices(row))


def validated(module: Any, callback: Any, checkpoint: Path | None = None) -> Any:
    return trainer_with(callback).validate(module, val_loader(), ckpt_path=checkpoint)


DATA = {"levels": (Pyramid, of_levels), "datasets": (TinyNet, of_labels)}
BOTH = pytest.mark.parametrize(("net", "make"), DATA.values(), ids=DATA)


@pytest.mark.parametrize("row", [1, 2, 4, 6])
@BOTH
def test_each_row_of_table_5_is_trained_and_saved_with_all(net: Any, make: Any, row: int, tmp_path: Path) -> None:
    module, last, later = net(), tmp_path / "last.ckpt", tmp_path / "later.ckpt"
    trainer = fit(module, [make(row), ModelCheckpoint(tmp_path, filename="last")])
    after = trainer.validate(module, val_loader())
    trainer.save_checkpoint(later)
    assert validated(net(), make(row), last) == validated(net(), make(row), later) == after
    plain = {k for k in net().state_dict() if not k.startswith("bn") or module.bn1 is not None}
    extra = set(torch.load(last, weights_only=True)["state_dict"]) - plain
    assert all("domain_" in k for k in extra) and bool(extra) == (ROWS[row][2] == "domain")
    assert set(module.state_dict()) == plain  # and nothing is left
    assert [type(m) for m in module.modules()] == [type(m) for m in net().modules()]


@pytest.mark.parametrize("row", [2, 3, 4, 5])
def test_inconsistent_rows_warn_with_the_papers_numbers(row: int) -> None:
    ap = {2: "2.1", 3: "34.1", 5: "35.5"}
    messages = said("inconsistent", Pyramid(), of_levels(row), max_epochs=1)
    assert len(messages) == (row not in CONSISTENT)
    assert all(f"{ap[row]} AP" in s and "39.1" in s for s in messages)


def test_what_is_not_known_in_testing_is_refused(tmp_path: Path) -> None:
    module = Pyramid()
    with pytest.raises(ValueError, match="has no statistics of domains"):
        validated(module, of_levels())
    fit(module, [of_levels(), ModelCheckpoint(tmp_path, filename="last")], max_epochs=1)
    with pytest.raises(ValueError, match="saved for 3 domains, but the layer has 2 domains"):
        validated(module, DomainSpecificBNCallback(2, level_modules="head"), tmp_path / "last.ckpt")

    class Fewer(Pyramid):
        def levels(self, x: Tensor) -> list[Tensor]:
            return super().levels(x)[: 3 if self.trainer.training else 2]

    fewer = Fewer()
    trainer = fit(fewer, of_levels(), val=None, max_epochs=1)
    with pytest.raises(RuntimeError, match="called 2 times in one forward of 'head', but num_domains=3"):
        trainer.test(fewer, val_loader())


def test_a_dataset_that_was_never_trained_on_is_refused() -> None:
    module = TinyNet()
    with pytest.warns(UserWarning, match="all training batches to be of domain 0"):
        trainer = fit(module, DomainSpecificBNCallback(2))
    trainer.test(module, val_loader())
    with pytest.raises(ValueError, match="Domain 1 is evaluated, but layer 'bn1' was never trained on it"):
        trainer.test(module, [val_loader(), val_loader()])
    trainer = trainer_with(DomainSpecificBNCallback(2))
    with pytest.raises(ValueError, match=r"There are 2 train dataloaders.*domain_fn="):
        trainer.fit(TinyNet(), {"a": train_loader(), "b": train_loader()})


def test_averaged_weights_have_averaged_statistics_of_domains_that_a_checkpoint_keeps(tmp_path: Path) -> None:
    module, callback = Pyramid(), of_levels()
    saving, averaging = ModelCheckpoint(tmp_path, filename="last"), EMAWeightAveraging(decay=0.5)
    found, average = [], []

    def used(trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        found.append(pl_module.head.conv[1].domain_mean.clone())

    def twin(trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        average[:] = [averaging._average_model.module.head.conv[1].domain_mean.clone()]
        own = pl_module.head.conv[1].domain_mean
        assert own.shape == (3, 4) and (trainer.global_step == 1) == torch.equal(average[0], own)

    seen = At(used, "on_validation_batch_end")
    fit(module, [callback, averaging, saving, seen, At(twin, "on_train_batch_end")])
    torch.testing.assert_close(found[-1], average[0])  # validation uses the average's
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    torch.testing.assert_close(state["averaged"][0]["head.conv.1"]["domain_mean"], average[0])
    validated(Pyramid(), [of_levels(), seen], tmp_path / "last.ckpt")
    torch.testing.assert_close(found[-1], average[0])  # and so does a test of its weights
    with pytest.raises(ValueError, match="must come before EMAWeightAveraging"):
        fit(Pyramid(), [EMAWeightAveraging(), of_levels()])


@BOTH
def test_a_resumed_fit_with_averaged_weights_is_the_uninterrupted_one(net: Any, make: Any, tmp_path: Path) -> None:
    def train(epochs: int, folder: str, **options: Any) -> dict[str, Any]:
        saving = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        callbacks = [callback := make(6), EMAWeightAveraging(decay=0.5), PreciseBNCallback(16), saving]
        fit(module := net(), callbacks, max_epochs=epochs, **options)
        last = torch.load(tmp_path / folder / f"epoch={epochs - 1}.ckpt", weights_only=True)
        return {"module": module.state_dict(), "domains": callback.state_dict(), "saved": last["callbacks"]}

    whole = train(2, "whole")
    resumed = train(2, "resumed", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    own = make(6).state_key
    assert digest([resumed["module"], resumed["domains"]]) == digest([whole["module"], whole["domains"]])
    assert digest(resumed["saved"][own]) == digest(whole["saved"][own]) and whole["saved"][own]["averaged"]


def noting(state: dict[str, Tensor], weights: dict[str, Tensor]) -> Callback:
    """Puts statistics of domains and the weights while a validation runs into the two dictionaries."""

    def note(trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        named = pl_module.named_buffers()
        state.update({k: v.clone() for k, v in named if "domain_" in k or "running" in k})
        weights.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    return At(note, "on_validation_batch_end")


@pytest.mark.parametrize("batch_size", ["auto", "loader"])
@pytest.mark.parametrize("row", [1, 4])
def test_a_pass_estimates_each_dataset(row: int, batch_size: Any) -> None:
    """bn1, whose inputs are not normalized before: each class's and all images' moments, in float64."""
    (state, weights), net, data = ({}, {}), TinyNet(), Images(32)
    callbacks = [of_labels(row), PreciseBNCallback(32, normalization_batch_size=batch_size), noting(state, weights)]
    assert not said("each batch alone", TinyNet(), callbacks, max_epochs=1), "they went in lockstep"
    net.load_state_dict(weights)
    rows = net.conv1.double()(data.images.double()).detach().movedim(1, -1)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(state["bn1.running_mean"].double(), rows.flatten(0, -2).mean(0))
    for domain in range(3) if row == 4 else ():
        own = rows[data.labels == domain].flatten(0, -2)
        close(state["bn1.domain_mean"][domain].double(), own.mean(0))
        close(state["bn1.domain_var"][domain].double(), own.var(0, correction=0))


def test_a_module_that_is_compiled_trains_as_one_that_is_not() -> None:
    compiled, eager = TinyNet(), TinyNet()
    compiled.features = torch.compile(compiled.features, backend="eager")
    fit(compiled, of_labels(), max_epochs=1)
    fit(eager, of_labels(), max_epochs=1)
    assert digest(list(compiled.parameters())) == digest(list(eager.parameters()))


def fit_on_rank(row: int, data: str) -> Any:
    net, make = DATA[data]
    module, state, options = net(), {}, {"devices": 2, "strategy": "ddp", "max_epochs": 1}
    fit(module, [make(row), PreciseBNCallback(20), noting(state, {})], train_loader(44, 4), **options)
    return digest(state), digest(module.state_dict())


@pytest.mark.ddp
@pytest.mark.parametrize(("row", "data"), [(1, "levels"), (6, "levels"), (4, "datasets")])
def test_ranks_agree(row: int, data: str) -> None:
    first, second = run_on_ranks(fit_on_rank, 2, row, data)
    assert first == second


def test_a_fit_that_does_not_begin_keeps_what_the_one_before_has_found(tmp_path: Path) -> None:
    module, callback = TinyNet(), of_labels(6)
    after = fit(module, callback).validate(module, val_loader())
    kept = digest(callback.state_dict())
    without = Pyramid()
    without.head = nn.Identity()
    with pytest.raises(ValueError, match="BatchNorm"):
        fit(without, callback)
    saving = ModelCheckpoint(tmp_path, save_weights_only=True)  # refused when layers have their domains
    with pytest.raises(ValueError, match="save_weights_only=True"):
        fit(TinyNet(), [callback, saving])
    fit(TinyNet(), [of_labels(1), saving], max_epochs=1)  # which has nothing to lose
    with pytest.raises(ValueError, match="state of DomainSpecificBNCallback is incomplete"):
        callback.load_state_dict({"statistics": {}})
    assert digest(callback.state_dict()) == kept
    assert validated(module, callback) == after


def test_a_domain_that_is_validated_in_a_fit_before_it_was_trained_on_warns_once() -> None:
    two = [val_loader(), val_loader()]
    (message,) = said("never trained on", TinyNet(), DomainSpecificBNCallback(2), val=two, num_sanity_val_steps=1)
    assert "Domain 1 is" in message and "domain_fn=" in message
    assert not said("never trained on", TinyNet(), of_labels(), num_sanity_val_steps=1)


def test_what_domain_fn_returns_and_raises_is_named() -> None:
    with pytest.raises(TypeError, match=r"domain_fn\(batch\) is None: return an int"):
        fit(TinyNet(), DomainSpecificBNCallback(2, domain_fn=lambda _: None))
    with pytest.raises(RuntimeError, match="domain_fn raised StopIteration"):
        fit(TinyNet(), DomainSpecificBNCallback(2, domain_fn=lambda _: next(iter([]))))
    as_numpy, as_int = (DomainSpecificBNCallback(2, domain_fn=lambda _, one=one: one) for one in (np.int64(1), 1))
    fit(TinyNet(), as_numpy), fit(TinyNet(), as_int)
    assert digest(as_numpy.state_dict()) == digest(as_int.state_dict())


def test_a_state_of_other_choices_is_refused_by_name() -> None:
    module, shared, callback = TinyNet(), of_labels(5), of_labels(6)
    fit(module, shared, max_epochs=1)  # keeps the affine of domains, and no statistics
    callback.load_state_dict(shared.state_dict())
    with pytest.raises(ValueError, match=r"no statistics of domains for layer 'bn1'.*population_statistics="):
        validated(module, callback)
