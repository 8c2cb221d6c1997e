"""PreciseBNCallback: when it runs, on which weights, what it writes, shows and logs, and on several ranks."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging, progress
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from schedulefree import SGDScheduleFree
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

from lightning_bn import FromLoader, PreciseBNCallback, freeze_bn
from tests.callbacks import zoo
from tests.callbacks.zoo import Evaluated, TinyNet, digest, expected, first_batches, fit, statistics_of, train_loader
from tests.ranks import run_on_ranks


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class InTheSecondEpoch(PreciseBNCallback):
    def should_run(self, trainer: Trainer) -> bool:
        return trainer.current_epoch == 1


TWO_EPOCHS = [("validation", 4), ("validation", 8)]
AT_EPOCH_ENDS = [("epoch end", 4), ("epoch end", 8)]
QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps")


@pytest.mark.parametrize(
    ("moments", "callback", "trainer"),
    [
        (TWO_EPOCHS, {}, {"num_sanity_val_steps": 2}),
        (TWO_EPOCHS[1:], {"every_n_validations": 2}, {}),
        (TWO_EPOCHS[1:], {"cls": InTheSecondEpoch}, {}),
        ([("validation", s) for s in (2, 4, 6, 8)], {}, {"val_check_interval": 2}),
        ([("validation", 3), ("epoch end", 4), ("validation", 7), ("epoch end", 8)], {}, {"val_check_interval": 3}),
        ([("epoch end", 4), ("validation", 8)], {}, {"check_val_every_n_epoch": 2}),
        (AT_EPOCH_ENDS, {}, {"limit_val_batches": 0}),
        (AT_EPOCH_ENDS, {}, {"val": None}),
        (AT_EPOCH_ENDS, {}, {"val": DataLoader(Empty())}),
        ([("epoch end", 4), ("epoch end", 6)], {}, {"limit_val_batches": 0, "max_steps": 6}),
        ([("validation", 4), ("epoch end", 6)], {}, {"max_steps": 6}),
        ([("validation", 2), ("validation", 4)], {}, {"accumulate_grad_batches": 2}),
        ([("validation", 1)], {}, {"fast_dev_run": True}),
        (TWO_EPOCHS, {}, {"barebones": True, "log_every_n_steps": None, **dict.fromkeys(QUIET)}),
    ],
)
def test_it_runs_before_validations_and_else_at_an_epochs_last_update(
    moments: list[tuple[str, int]], callback: dict[str, Any], trainer: dict[str, Any]
) -> None:
    cls = callback.get("cls", PreciseBNCallback)
    precise, module = cls(20, **{k: v for k, v in callback.items() if k != "cls"}), TinyNet()
    passes = zoo.Passes(precise)
    fit(module, [precise, passes], **trainer)
    assert passes.seen == moments
    shown = first_batches(1 if "fast_dev_run" in trainer else 3)
    assert_close(statistics_of(module), expected(module, shown), rtol=1e-5, atol=1e-5)


class Sequential(zoo.TinyData):
    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader()


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_outside_of_a_fit_it_runs_on_request_only(verb: str) -> None:
    for before, seen in (((), []), ([verb], [({"validate": "validation"}.get(verb, verb), 0)])):
        precise, module = PreciseBNCallback(20, stages=before), TinyNet()
        passes = zoo.Passes(precise)
        getattr(zoo.trainer_with([precise, passes]), verb)(module, datamodule=Sequential())
        assert passes.seen == seen
        truth = expected(module, first_batches(3)) if seen else statistics_of(TinyNet())
        assert_close(statistics_of(module), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("verb", "beside"), [("validate", "val_loss"), ("test", "test_loss")])
def test_before_a_verb_metrics_are_logged_at_its_step(verb: str, beside: str) -> None:
    trainer = fit(TinyNet(), PreciseBNCallback(20, stages=[verb]), Sequential(), max_epochs=1)
    getattr(trainer, verb)(trainer.model, datamodule=Sequential())
    logged = trainer.logger.logged
    assert max(logged("precise_bn/seconds")) == max(logged(beside)) == trainer.global_step


@pytest.mark.parametrize("part", ["bn1", ""], ids=["one layer in eval", "the whole model in eval"])
def test_outside_of_a_fit_a_layer_in_eval_counts_as_frozen_unless_the_whole_model_is(part: str) -> None:
    precise, module = PreciseBNCallback(20, stages=["predict"]), TinyNet()
    module.get_submodule(part).eval()
    zoo.trainer_with(precise).predict(module, datamodule=Sequential())
    assert list(precise.result) == (["bn2"] if part else ["bn1", "bn2"])


class SetUpForFit(zoo.TinyData):
    def train_dataloader(self) -> DataLoader[Any]:
        return self.made_by_setup_in_a_fit


def test_without_training_data_a_pass_before_a_verb_is_refused_and_a_loader_of_the_user_supplies_the_batches() -> None:
    with pytest.raises(ValueError, match=r"trainer\.predict has no training data.*train_dataloader.*source="):
        zoo.trainer_with(PreciseBNCallback(stages=["predict"])).predict(TinyNet(), zoo.val_loader())
    refused = r"SetUpForFit\.train_dataloader fails under trainer\.validate.*setup for every stage, or pass source="
    with pytest.raises(ValueError, match=refused):
        zoo.trainer_with(PreciseBNCallback(20, stages=["validate"])).validate(TinyNet(), datamodule=SetUpForFit())
    module, own = TinyNet(), FromLoader(lambda _: first_batches(2))
    zoo.trainer_with(PreciseBNCallback(10**6, stages=["validate"], source=own)).validate(module, zoo.val_loader())
    assert_close(statistics_of(module), expected(module, first_batches(2)), rtol=1e-5, atol=1e-5)


def test_each_validation_metric_is_that_of_exact_statistics_of_the_weights_at_that_step() -> None:
    evaluated, ema = Evaluated(), Evaluated()
    fit(TinyNet(), [PreciseBNCallback(20), evaluated], val_check_interval=2)
    fit(TinyNet(), ema, val_check_interval=2)
    for state, metrics, stale in zip(evaluated.states, evaluated.metrics, ema.metrics, strict=True):
        oracle = zoo.loaded(state)
        oracle.load_state_dict(expected(oracle, first_batches(3)), strict=False)
        assert metrics["val_loss"] == pytest.approx(zoo.validation_loss(oracle), rel=1e-5)
        assert metrics["val_loss"] != pytest.approx(stale["val_loss"], rel=1e-2)


@pytest.mark.parametrize(("num_samples", "shown"), [(8, 8), (9, 16), (10**6, 29)])
def test_whole_batches_are_shown_until_enough_and_the_result_is_what_is_written(num_samples: int, shown: int) -> None:
    precise, module = PreciseBNCallback(num_samples), TinyNet()
    fit(module, precise, train_loader(29))
    batches = -(-shown // 8)
    assert (precise.result.num_samples, precise.result.num_batches) == (shown, batches)
    for name, (mean, var) in zoo.exact_statistics(module, first_batches(batches, size=29)).items():
        assert_close(precise.result[name].mean, mean, rtol=1e-5, atol=1e-5)
        assert_close(precise.result[name].var, var, rtol=1e-5, atol=1e-5)
        for kind in ("mean", "var"):
            written = getattr(module.get_submodule(name), f"running_{kind}")
            assert digest(written) == digest(getattr(precise.result[name], kind).float())


@pytest.mark.parametrize("freeze", [lambda m: m.bn1.eval(), lambda m: freeze_bn(m, layers="bn1")], ids=["eval", "ours"])
@pytest.mark.parametrize("forward", ["training_step", "forward"])
def test_frozen_layers_keep_their_statistics(freeze: Callable[[TinyNet], Any], forward: str) -> None:
    module, precise = TinyNet(), PreciseBNCallback(20, forward=forward)
    before = statistics_of(module)
    freeze(module)
    fit(module, precise, max_epochs=1)
    assert list(precise.result) == ["bn2"]
    kept = [digest(value) == digest(before[key]) for key, value in statistics_of(module).items()]
    assert kept == [True, True, False, False]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_statistics_are_those_of_a_forward_in_the_trainers_precision(precision: str) -> None:
    module, plain = TinyNet(), TinyNet()
    precise = PreciseBNCallback(20)
    fit(module, precise, precision=precision)
    plain.load_state_dict(module.state_dict())
    for name, (mean, _) in zoo.exact_statistics(plain, first_batches(3)).items():
        assert 1e-6 < (precise.result[name].mean - mean).abs().max() < 0.05


@pytest.mark.parametrize(
    ("at_train_epoch_end", "trainer"),
    [(True, {}), (False, {"val_check_interval": 2}), (None, {"accumulate_grad_batches": 2})],
)
def test_checkpoints_reproduce_the_logged_metric(at_train_epoch_end: Any, trainer: Any, tmp_path: Path) -> None:
    evaluated, when = Evaluated(), {"save_on_train_epoch_end": at_train_epoch_end}
    saving = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True, save_top_k=-1, **when)
    fit(TinyNet(), [PreciseBNCallback(20), evaluated, saving], **trainer)
    logged = [metrics["val_loss"] for metrics in evaluated.metrics]
    assert saving.best_k_models and len(set(logged)) == len(logged)
    saved = {path: score.item() for path, score in saving.best_k_models.items()} | {saving.last_model_path: logged[-1]}
    assert set(saved.values()) <= set(logged)
    for path, score in saved.items():
        state = torch.load(path, weights_only=True)["state_dict"]
        assert zoo.validation_loss(zoo.loaded(state)) == pytest.approx(score, abs=1e-6)


class OncePerEpoch(WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


AVERAGING: dict[str, Callable[[], WeightAveraging]] = {
    "EMA": functools.partial(EMAWeightAveraging, decay=0.8),
    "EMA from the second epoch": functools.partial(EMAWeightAveraging, decay=0.8, update_starting_at_step=5),
    "EMA, buffers not averaged": functools.partial(EMAWeightAveraging, decay=0.8, use_buffers=False),
    "once per epoch": OncePerEpoch,
}


@pytest.mark.parametrize(("kind", "val"), [*((kind, "default") for kind in AVERAGING), ("EMA", None)])
def test_averaged_weights_get_statistics_of_their_own(kind: str, val: Any, tmp_path: Path) -> None:
    evaluated, module = Evaluated(), TinyNet()
    callbacks = [AVERAGING[kind](), PreciseBNCallback(20), evaluated, ModelCheckpoint(tmp_path, save_top_k=-1)]
    fit(module, callbacks, val=val)
    checkpoints = [torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")]
    assert len(checkpoints) == 2 and len(evaluated.states) == (2 if val else 0)
    for state in [*evaluated.states, *(c["state_dict"] for c in checkpoints), module.state_dict()]:
        plain = zoo.loaded(state)
        assert_close(statistics_of(plain), expected(plain, first_batches(3)), rtol=1e-4, atol=1e-5)
    current = [digest(c["current_model_state"]["head.weight"]) for c in checkpoints]
    assert current != [digest(c["state_dict"]["head.weight"]) for c in checkpoints], "nothing was averaged"


def test_training_under_weight_averaging_is_bit_for_bit_the_same_and_its_place_is_before_the_pass() -> None:
    traces = []
    for precise in ([], [PreciseBNCallback(20)]):
        recorder = zoo.Recorder()
        fit(TinyNet(0.5), [AVERAGING["EMA"](), *precise, recorder], train_loader(shuffle=True), val_check_interval=3)
        traces.append(recorder.trace)
    assert traces[0] == traces[1]
    refused = r"PreciseBNCallback is before EMAWeightAveraging.*swap them, EMAWeightAveraging first"
    with pytest.raises(ValueError, match=refused):
        fit(TinyNet(), [PreciseBNCallback(20), EMAWeightAveraging()])


class ScheduleFree(TinyNet):
    """Evaluates other weights than it trains, if one of the hooks below switches its optimizer to these."""

    def configure_optimizers(self) -> Any:
        return SGDScheduleFree(self.parameters(), lr=0.5)

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.optimizers().optimizer.train()

    def on_train_start(self) -> None:
        self.optimizers().optimizer.train()


class WithTheModel(ScheduleFree):
    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.optimizers().optimizer.eval()


class AtTheEpochsStart(ScheduleFree):
    def on_validation_epoch_start(self) -> None:
        self.optimizers().optimizer.eval()


@pytest.mark.parametrize("module", [WithTheModel, AtTheEpochsStart])
def test_schedule_free_optimizers_get_statistics_of_the_weights_they_evaluate(module: type[ScheduleFree]) -> None:
    evaluated, trained = Evaluated(), Evaluated()
    fit(module(), [PreciseBNCallback(20), evaluated])
    fit(ScheduleFree(), [trained])
    assert len(evaluated.states) == 2
    for state, not_switched in zip(evaluated.states, trained.states, strict=True):
        assert not torch.equal(state["head.weight"], not_switched["head.weight"])
        plain = zoo.loaded(state)
        assert_close(statistics_of(plain), expected(plain, first_batches(3)), rtol=1e-5, atol=1e-5)


def test_a_pass_has_a_line_in_the_tqdm_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    update = Tqdm.update

    def watched(bar: Any, n: float = 1) -> Any:
        if bar.desc.startswith("PreciseBN"):
            lines.append((bar.total, bar.unit, n))
        return update(bar, n)

    monkeypatch.setattr(Tqdm, "update", watched)
    fit(TinyNet(), [PreciseBNCallback(20), progress.TQDMProgressBar()], enable_progress_bar=True)
    assert {line[:2] for line in lines} == {(20, "sample")} and sum(n for *_, n in lines) == 2 * 24


@pytest.mark.parametrize("val", ["default", None], ids=["validation", "no validation"])
def test_a_pass_has_a_line_in_the_rich_bar(val: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    totals, bar = [], progress.RichProgressBar()
    add_task = bar._add_task

    def watched(total: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        totals.extend([total] if "PreciseBN" in description else [])
        return add_task(total, description, *args, **kwargs)

    monkeypatch.setattr(bar, "_add_task", watched)
    fit(TinyNet(), [PreciseBNCallback(20), bar], val=val, enable_progress_bar=True)
    assert totals == [20, 20]
    assert not [task for task in bar.progress.tasks if "PreciseBN" in task.description], "the line is still there"


ALWAYS_LOGGED = {"seconds", "num_samples"} | {f"{gap}_{of}" for gap in ("mean_gap", "var_gap") for of in ("p50", "max")}


AT_STEPS = [{}, {"val_check_interval": 2}, {"val": None, "max_steps": 6}, {"val": None, "accumulate_grad_batches": 2}]


@pytest.mark.parametrize("trainer", AT_STEPS)
def test_duration_and_gaps_are_logged_at_the_steps_of_the_modules_metrics(trainer: dict[str, Any]) -> None:
    beside = "train_loss_epoch" if "val" in trainer else "val_loss"
    logged = fit(TinyNet(), PreciseBNCallback(20), **trainer).logger.logged
    assert len(logged(beside)) >= 2
    for key in ALWAYS_LOGGED:
        assert list(logged(f"precise_bn/{key}")) == list(logged(beside))
        assert all(value > 0 for value in logged(f"precise_bn/{key}").values())
    assert set(logged("precise_bn/num_samples").values()) == {24}


def batches_of_ranks(world_size: int) -> list[Any]:
    """All batches that DistributedSamplers deal out, those of all ranks together."""
    data, shares = zoo.Images(44), [torch.arange(44)[rank::world_size] for rank in range(world_size)]
    return [(data.images[part], data.labels[part]) for share in shares for part in share.split(4)]


def uneven_loader(trainer: Trainer) -> list[Any]:
    """Five batches: two ranks get three and two, four ranks two, one, one and one."""
    return first_batches(5, size=37)


def nothing_on_rank_1(trainer: Trainer) -> list[Any]:
    return first_batches(3) if trainer.global_rank != 1 else []


def own_on_each_rank(trainer: Trainer) -> list[Any]:
    return first_batches(5, size=37)[trainer.global_rank :]


def shuffled_with_workers(trainer: Trainer) -> DataLoader[Any]:
    options = {"num_workers": 1, "multiprocessing_context": "fork"}  # a forkserver takes 10 s to start
    return train_loader(37, shuffle=True, **options)


def fit_precisely(world_size: int, num_samples: int, source: Any) -> Any:
    module, precise = TinyNet(), PreciseBNCallback(num_samples, source=source)
    dealing = DistributedSampler(range(44), shuffle=False)  # type: ignore[arg-type]
    loader = train_loader(44, batch_size=4, sampler=dealing)
    fit(module, precise, loader, devices=world_size, strategy="ddp", max_epochs=1)
    return module.state_dict(), precise.result


def precise_on_ranks(world_size: int, num_samples: int, source: Any) -> tuple[TinyNet, Any]:
    """The trained module and the result, after checking that all ranks ended with the same."""
    found = run_on_ranks(fit_precisely, world_size, world_size, num_samples, source)
    first, *others = (digest([state, [(s.mean, s.var) for s in result.values()]]) for state, result in found)
    assert all(other == first for other in others)
    return zoo.loaded(found[0][0]), found[0][1]


@pytest.mark.ddp
@pytest.mark.parametrize(("world_size", "source"), [(2, "train_dataloader"), (4, "replay")])
def test_ranks_end_with_the_statistics_of_all_ranks_data(world_size: int, source: str) -> None:
    module, result = precise_on_ranks(world_size, 44, source)
    assert result.num_samples == 44
    assert_close(statistics_of(module), expected(module, batches_of_ranks(world_size)), rtol=1e-5, atol=1e-5)


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("world_size", "source", "shard", "batches"),
    [
        (4, uneven_loader, True, first_batches(5, size=37)),
        (2, shuffled_with_workers, True, first_batches(5, size=37)),
        (2, uneven_loader, False, first_batches(5, size=37) * 2),
        (2, own_on_each_rank, False, first_batches(5, size=37) + first_batches(5, size=37)[1:]),
        (2, nothing_on_rank_1, False, first_batches(3)),
    ],
)
def test_ranks_share_batches_or_each_takes_its_own(world_size: int, source: Any, shard: bool, batches: Any) -> None:
    module, result = precise_on_ranks(world_size, 10**6, FromLoader(source, shard=shard))
    assert (result.num_samples, result.num_batches) == (sum(len(x) for x, _ in batches), len(batches))
    assert_close(statistics_of(module), expected(module, batches), rtol=1e-5, atol=1e-5)


SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "by Lightning": dict,
    "by the user, shuffled": lambda: {"sampler": DistributedSampler(range(44), seed=3)},  # type: ignore[arg-type]
    "every rank for itself": lambda: {"sampler": RandomSampler(range(20)), "generator": torch.Generator()},
}


def fit_with_and_without(dealing: str) -> list[Any]:
    """On one rank: the traces of trainings without a pass, with one over the train dataloader and over a loader."""
    traces = []
    for precise in ([], [PreciseBNCallback(20)], [PreciseBNCallback(20, source=FromLoader(uneven_loader))]):
        recorder = zoo.Recorder()
        loader = train_loader(44, batch_size=4, augment=zoo.torch_noise, **SAMPLERS[dealing]())
        options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": dealing == "by Lightning"}
        fit(TinyNet(0.5), [*precise, recorder], loader, val_check_interval=3, **options)
        traces.append(recorder.trace)
    return traces


@pytest.mark.ddp
@pytest.mark.parametrize("dealing", SAMPLERS)
def test_distributed_training_is_bit_for_bit_the_same_on_every_rank(dealing: str) -> None:
    for without, *others in run_on_ranks(fit_with_and_without, 2, dealing):
        assert len(without) > 40
        for observed in others:
            assert observed == without
