"""AdaBN evaluates each dataloader with its own statistics, and restores those of the model."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_bn import AdaBNCallback, FromLoader, MiniBatchInferenceCallback, PreciseBNCallback
from tests.callbacks import zoo
from tests.callbacks.zoo import At, Images, TinyNet, caught, digest, fit, statistics_of, train_loader, trainer_with
from tests.functional.test_adapt_bn import adapting
from tests.ranks import run_on_ranks


class Domain(Images):
    """Images as a domain sees them: scaled and shifted."""

    def __init__(self, size: int, scale: float, shift: float) -> None:
        super().__init__(size)
        self.images = self.images * scale + shift


def domains(n: int = 2) -> Any:
    return [DataLoader(Domain(*d), batch_size=5) for d in ((13, 3.0, 1.0), (9, 0.5, -2.0))[:n]]


class Evaluating(TinyNet):
    """Has trained statistics."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for bn in (self.bn1, self.bn2):
            bn.running_mean.copy_(torch.randn(bn.num_features, generator=generator))
            bn.running_var.copy_(0.5 + torch.rand(bn.num_features, generator=generator))


class Statistics(Callback):
    """Records the statistics that each batch is evaluated with, and those at the end."""

    def __init__(self) -> None:
        self.of_batches: list[dict[str, Tensor]] = []
        self.at_end: dict[str, Tensor] = {}

    def of_batch(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.of_batches.append(statistics_of(pl_module))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.at_end = statistics_of(pl_module)

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end = of_batch
    on_validation_end = on_predict_end = on_test_end


def evaluate(callbacks: Any, stage: str = "test", loaders: Any = None, module: Any = None, **kwargs: Any) -> Any:
    trainer, module = trainer_with(callbacks, **kwargs), module or Evaluating()
    silent = {} if stage == "predict" else {"verbose": False}
    results = getattr(trainer, stage)(module, domains() if loaders is None else loaders, **silent)
    return results if stage == "predict" else {k: v for result in results for k, v in result.items()}


exact = functools.partial(zoo.expected, together=False)
assert_statistics = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stage", "prior"), [("validate", 0), ("test", 13), ("predict", 0)])
def test_each_dataloader_is_evaluated_with_the_statistics_of_its_own_samples(stage: str, prior: int) -> None:
    module, seen, callback = Evaluating(), Statistics(), AdaBNCallback(prior_samples=prior)
    original, state = statistics_of(module), digest(module.state_dict())
    evaluate([callback, seen], stage, module=module)
    assert len(seen.of_batches) == 3 + 2
    for loader, samples, batches in zip(domains(), (13, 9), (seen.of_batches[:3], seen.of_batches[3:]), strict=True):
        share = prior / (prior + samples)
        target = exact(module, loader)
        expected = {key: share * original[key] + (1 - share) * target[key] for key in target}
        for statistics in batches:
            assert_statistics(statistics, expected)
    assert digest(seen.at_end) == digest(original) and digest(module.state_dict()) == state
    assert [result.num_samples for result in callback.results] == [13, 9]


def test_statistics_are_restored_after_a_step_that_trains_the_layers() -> None:
    """Test-time training (TENT) does so. The module's own hook at the end already finds the original statistics."""

    class Training(Evaluating):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.train()
            self(batch[0])
            self.eval()

        def on_test_epoch_end(self) -> None:
            self.at_end = digest(self.state_dict())

    module = Training()
    before = digest(module.state_dict())
    evaluate(AdaBNCallback(forward="forward"), module=module)
    assert digest(module.state_dict()) == module.at_end == before


@pytest.mark.parametrize(("num_samples", "batches"), [(5, 1), (6, 2), (None, 3)])
def test_num_samples_counts_in_whole_batches_within_the_trainers_limits(num_samples: int | None, batches: int) -> None:
    module, seen = Evaluating(), Statistics()
    evaluate([AdaBNCallback(num_samples), seen], loaders=domains(1), module=module)
    assert_statistics(seen.of_batches[0], exact(module, list(domains(1)[0])[:batches]))
    callback = AdaBNCallback(num_samples)
    evaluate(callback, limit_test_batches=1)
    assert [result.num_samples for result in callback.results] == [5, 5]


def test_combined_loaders_are_one_domain() -> None:
    class Both(Evaluating):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            for one in batch:
                super().test_step(one, batch_idx)

    module, seen = Both(), Statistics()
    evaluate([AdaBNCallback(), seen], loaders=CombinedLoader(domains(), "min_size"), module=module)
    together = [batch for pair in zip(*domains(), strict=False) for batch in pair]
    assert_statistics(seen.of_batches[0], exact(module, together))


def test_other_forwards_give_the_same() -> None:
    for forward in ("forward", lambda module, batch: module(batch[0])):
        assert evaluate(AdaBNCallback(forward=forward)) == evaluate(AdaBNCallback())


PERSISTENT = {"num_workers": 1, "persistent_workers": True}
ONLINE = {"online": True, "log_unadapted": True}


@pytest.mark.parametrize(
    ("stage", "workers", "options"),
    [("validate", {}, {}), ("predict", {"num_workers": 1}, {}), *(("test", PERSISTENT, o) for o in ({}, ONLINE))],
)
def test_the_live_loader_and_random_numbers_are_not_disturbed(stage: str, workers: Any, options: Any) -> None:
    def note(trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        found.append((digest(batch), digest(list(zoo.random_states()))))

    seen = []
    for callbacks in ([], [AdaBNCallback(**options)]):
        torch.manual_seed(3)
        found: list[Any] = []
        at_ends = At(note, *(f"on_{kind}_batch_end" for kind in ("test", "validation", "predict")))
        evaluate([*callbacks, at_ends], stage, train_loader(12, 4, zoo.torch_noise, shuffle=True, **workers))
        seen.append(found)
    assert len(seen[0]) == 3 and seen[0] == seen[1]


def test_it_acts_in_the_chosen_stages_only() -> None:
    plain, callback = evaluate([], "validate"), AdaBNCallback(stages=["test"])
    assert evaluate(callback, "validate") == plain and not callback.results
    assert evaluate(callback, "test") != evaluate([], "test") and callback.results
    evaluate([AdaBNCallback(stages=["test"]), MiniBatchInferenceCallback(stages=["predict"])])
    evaluate([AdaBNCallback(stages=["test"]), AdaBNCallback(stages=["predict"])])
    ours = [AdaBNCallback(layers="bn2"), AdaBNCallback(online=True, layers="bn1")]
    first, second = (fit(TinyNet(), callbacks).callback_metrics["val_loss"] for callbacks in ([], ours))
    assert first == second, "not within a fit"


@pytest.mark.parametrize(("stage", "online"), [("validate", False), ("test", True), ("predict", False)])
def test_log_unadapted_logs_the_metrics_without_adaptation_as_well(stage: str, online: bool) -> None:
    callback, memory = AdaBNCallback(log_unadapted=True, online=online), zoo.InMemory()
    adapted, plain = evaluate(callback, stage, logger=memory), evaluate([], stage)
    assert digest(adapted) == digest(evaluate(AdaBNCallback(online=online), stage)) != digest(plain)
    if stage == "predict":
        assert callback.source_metrics == {}
    else:
        assert callback.source_metrics == {f"unadapted/{key}": value for key, value in plain.items()}
        assert callback.source_metrics in [row for _, row in memory.rows]
    logged = {key: value for _, row in memory.rows for key, value in row.items()}
    for i, samples in enumerate((13, 9) if stage == "validate" else ()):
        assert logged[f"ada_bn/dataloader_idx_{i}/num_samples"] == samples
        assert logged[f"ada_bn/dataloader_idx_{i}/mean_gap_max"] > 0


def test_only_the_first_of_several_may_log_unadapted() -> None:
    first, second = AdaBNCallback(layers="bn1", log_unadapted=True), AdaBNCallback(layers="bn2")
    evaluate([first, second])
    assert first.source_metrics
    with pytest.raises(ValueError, match="log_unadapted=True is only for the first AdaBNCallback in the list"):
        evaluate([AdaBNCallback(layers="bn1"), AdaBNCallback(layers="bn2", log_unadapted=True)])


def test_online_each_batch_is_normalized_with_all_batches_so_far_of_its_domain() -> None:
    module = Evaluating()
    state = digest(module.state_dict())
    predictions = evaluate(AdaBNCallback(online=True, prior_samples=4), "predict", module=module)
    assert digest(module.state_dict()) == state
    for loader, logits in zip(domains(), predictions, strict=True):
        expected = adapting(Evaluating().eval(), [x for x, _ in loader], 4)  # held against the formula with adapt_bn
        for ours, (_, theirs) in zip(logits, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_online_a_nan_batch_affects_its_own_predictions_only_and_warns() -> None:
    first, bad, last = (torch.randn(5, 3, 6, 6) for _ in range(3))
    bad[2, 0, 0, 0] = torch.nan
    loader = DataLoader([(x, torch.tensor(0)) for x in torch.cat([first, bad, last])], batch_size=5)
    with pytest.warns(UserWarning, match=r"\d calls of layers got NaN or infinite values, and were left out"):
        logits = evaluate([AdaBNCallback(online=True)], "predict", loader)
    assert [bool(batch.isfinite().all()) for batch in logits] == [True, False, True]


def test_frozen_layers_keep_their_statistics_with_a_warning() -> None:
    module, seen = Evaluating(), Statistics()
    module.train().bn1.eval()
    before = statistics_of(module)
    with caught("AdaBNCallback") as said:
        evaluate([AdaBNCallback(), seen], module=module)
        module.bn2.eval()
        evaluate([AdaBNCallback()], module=module)
    assert "1 layers are frozen or in eval mode ('bn1' first)" in said[0] and "all of its layers are frozen" in said[1]
    assert digest(seen.of_batches[0]["bn1.running_mean"]) == digest(before["bn1.running_mean"])
    assert digest(seen.of_batches[0]["bn2.running_mean"]) != digest(before["bn2.running_mean"])


def test_it_adapts_after_precise_bn_and_restores_its_statistics() -> None:
    module, plain, seen = Evaluating(), Evaluating(), Statistics()
    precise = PreciseBNCallback(20, stages=["test"], source=FromLoader(lambda trainer: train_loader()))
    evaluate([AdaBNCallback(prior_samples=5), precise, seen], loaders=domains(1), module=module)
    together = [torch.cat(parts) for parts in zip(*zoo.first_batches(3), strict=True)]
    source, target = exact(plain, [together]), exact(plain, domains(1)[0])
    assert_statistics(seen.of_batches[0], {key: 5 / 18 * source[key] + 13 / 18 * target[key] for key in source})
    assert_statistics(seen.at_end, source)


def batches_of(sizes: list[int]) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(sum(sizes))
    for size in sizes:
        yield torch.randn(size, 3, 6, 6, generator=generator) + size, torch.zeros(size, dtype=torch.long)


class Batches(IterableDataset[Any]):
    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __iter__(self) -> Iterator[Any]:
        return batches_of(self.sizes)


def test_loaders_and_forwards_that_cannot_be_used_are_errors() -> None:
    with pytest.raises(ValueError, match=r"generator is an iterator.*online=True"):
        evaluate(AdaBNCallback(), loaders=batches_of([4]))
    evaluate(AdaBNCallback(online=True), loaders=batches_of([4]))
    with pytest.raises(RuntimeError, match="StopIteration"):
        evaluate(AdaBNCallback(forward=lambda module, batch: next(iter([]))))


@pytest.mark.parametrize(("error", "log_unadapted"), [(ZeroDivisionError, False), (SystemExit, True)])
def test_an_error_while_reading_ahead_is_raised_and_all_is_restored(error: Any, log_unadapted: bool) -> None:
    class Failing(Evaluating):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().test_step(batch, batch_idx)
            if batch_idx == 1:
                raise error

    found: dict[str, Any] = {}

    def look(trainer: Trainer, pl_module: LightningModule, *at: Any) -> None:
        modules = [(type(m), sorted(vars(m)), m.training) for m in pl_module.modules()]
        states = trainer.loggers, trainer.state.stage, id(trainer.test_loop._results)
        after = at and isinstance(at[0], BaseException)
        found["after" if after else "before"] = modules, digest(pl_module.state_dict()), states

    looking = At(look, "on_test_batch_start", "on_exception")
    with pytest.raises(error):
        evaluate([looking, AdaBNCallback(log_unadapted=log_unadapted)], module=Failing())
    assert found["after"] == found["before"]


UNEVEN = [[[8, 5], []], [[3], [6, 6, 2]]]
"""Batch sizes of each rank, for two dataloaders."""


def evaluate_on_rank(shards: Any, online: bool) -> Any:
    rank = torch.distributed.get_rank()
    module, seen, callback = Evaluating(), Statistics(), AdaBNCallback(log_unadapted=True, online=online)
    state = digest(module.state_dict())
    trainer = trainer_with([callback, seen], devices=2, strategy="ddp")
    loaders = [DataLoader(Batches(sizes), batch_size=None) for sizes in shards[rank]]
    trainer.test(module, loaders)
    return callback.results, seen.of_batches, digest(module.state_dict()) == state


@pytest.mark.ddp
@pytest.mark.parametrize("shards", [UNEVEN, [[[], []], [[4, 4], [3]]]], ids=["uneven", "a rank without batches"])
def test_ranks_with_uneven_shards_adapt_to_the_whole_domain(shards: Any) -> None:
    ranks = run_on_ranks(evaluate_on_rank, 2, shards, False)
    for domain in range(2):
        target = exact(Evaluating(), [batch for shard in shards for batch in batches_of(shard[domain])])
        for shard, (results, of_batches, restored) in zip(shards, ranks, strict=True):
            assert restored
            assert results[domain].num_samples == sum(sum(s[domain]) for s in shards)
            start = len(shard[0]) * domain
            for statistics in of_batches[start : start + len(shard[domain])]:
                assert_statistics(statistics, target)
    first = [digest([vars(s) for s in result.values()]) for result in ranks[0][0]]
    assert all([digest([vars(s) for s in r.values()]) for r in results] == first for results, *_ in ranks)


@pytest.mark.ddp
def test_online_ranks_do_not_wait_for_each_other() -> None:
    assert all(restored for *_, restored in run_on_ranks(evaluate_on_rank, 2, UNEVEN, True))
