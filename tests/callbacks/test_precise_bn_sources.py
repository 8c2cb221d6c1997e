"""PreciseBNCallback: which batches a pass is shown, from loaders, replays and functions, and which are refused."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_bn import FromLoader, PreciseBNCallback, Replay
from tests.callbacks import zoo
from tests.callbacks.zoo import Images, Stream, TinyNet, caught, first_batches, fit, statistics_of, train_loader


def assert_stored(module: TinyNet, shown: list[Any]) -> None:
    assert_close(statistics_of(module), zoo.expected(module, shown), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_samples", "last"), [(1, 1), (20, 3), (60, 8)])
def test_a_replay_shows_the_last_training_batches(num_samples: int, last: int) -> None:
    trained, precise = TinyNet(), PreciseBNCallback(num_samples, source="replay")
    fit(trained, precise, train_loader(64, batch_size=8), limit_train_batches=4)
    assert precise.result.num_batches == last
    assert_stored(trained, (2 * first_batches(4, size=64))[-last:])


def test_a_replay_that_cannot_fit_is_refused_with_the_numbers() -> None:
    needed = 1000 * (3 * 6 * 6 * 4 + 8)  # an image and its label
    refused = rf"1000 samples a rank of 440 bytes take {needed:,} bytes, more than max_bytes={needed - 1:,}.*Replay"
    with pytest.raises(ValueError, match=refused):
        fit(TinyNet(), PreciseBNCallback(1000, source=Replay(max_bytes=needed - 1)))
    fit(TinyNet(), PreciseBNCallback(1000, source=Replay(max_bytes=needed)), max_epochs=1)


def test_an_empty_replay_warns() -> None:
    """As Lightning validates first when it resumes a checkpoint written in the middle of a validation."""
    module, precise = TinyNet(), PreciseBNCallback(16, source="replay", stages=["validate"])
    with pytest.warns(UserWarning, match="no batches to replay before the first training batch, nor right after a"):
        zoo.trainer_with(precise).validate(module, zoo.val_loader())
    assert_close(statistics_of(module), statistics_of(TinyNet()))


def test_a_second_fit_does_not_replay_batches_of_the_first() -> None:
    precise, module = PreciseBNCallback(64, source="replay"), TinyNet()
    fit(TinyNet(), precise, train_loader(40))
    fit(module, precise, max_epochs=1)
    assert precise.result.num_samples == 32
    assert_stored(module, first_batches(4))


class Grows(TinyNet):
    """Its batches change their structure in the middle of training."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["of"] if isinstance(batch, dict) else batch, batch_idx)


def test_a_later_batch_that_cannot_be_kept_for_a_replay_is_left_out_with_one_warning() -> None:
    def count(batch: Any) -> int:
        if isinstance(batch, dict):
            raise ValueError("unknown batch")
        return len(batch[0])

    first, *whole = first_batches(4)
    precise = PreciseBNCallback(32, source="replay", batch_size_fn=count)
    with caught("could not keep a batch for the replay") as said:
        fit(Grows(), precise, DataLoader([first, {"of": whole[0]}, {"of": whole[1]}, whole[2]], batch_size=None))
    assert len(said) == 1 and "unknown batch" in said[0] and precise.result.num_samples == 32
    precise = PreciseBNCallback(32, source="replay", batch_size_fn=count)
    with pytest.raises(ValueError, match=r"^PreciseBNCallback: unknown batch"):
        fit(Grows(), precise, DataLoader([{"of": first}], batch_size=None))


class Several(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = batch.values() if isinstance(batch, dict) else batch
        return super().training_step(next(part for part in parts if part is not None), batch_idx)


def live(trainer: Trainer) -> Any:
    return trainer.train_dataloader


def test_the_function_of_a_loader_is_called_with_the_trainer_once_per_pass() -> None:
    asked: list[int] = []

    def source(trainer: Trainer) -> list[Any]:
        asked.append(trainer.global_step)
        return first_batches(2, size=24)

    trained = TinyNet()
    fit(trained, PreciseBNCallback(10**6, source=FromLoader(source)))
    assert asked == [4, 8]
    assert_stored(trained, first_batches(2, size=24))
    with pytest.raises(ValueError, match="No batch reached a BatchNorm layer"):
        fit(TinyNet(), PreciseBNCallback(20, source=FromLoader(lambda _: [])))


@pytest.mark.parametrize(
    ("mode", "kind", "source", "last"),
    [
        ("min_size", dict, "train_dataloader", []),
        ("max_size", list, "train_dataloader", first_batches(4)[3:]),
        *(("max_size_cycle", dict, s, first_batches(1, size=24)) for s in ("train_dataloader", FromLoader(live))),
    ],
)
def test_several_train_loaders_come_as_in_training(mode: Any, kind: type, source: Any, last: list[Any]) -> None:
    loaders = {"a": train_loader(24), "b": train_loader(32)}
    combined = CombinedLoader(loaders if kind is dict else list(loaders.values()), mode)
    module, precise = Several(), PreciseBNCallback(10**6, source=source)
    fit(module, precise, combined, max_epochs=1)
    assert precise.result.num_batches == 3 + len(last)
    assert_stored(module, first_batches(4, size=24) + last)


def test_an_iterable_dataset_is_read_from_its_start_and_no_more_than_an_epoch_may_read() -> None:
    module, precise = TinyNet(), PreciseBNCallback(10**6)
    fit(module, precise, DataLoader(Stream(), batch_size=8), limit_train_batches=2)
    assert precise.result.num_batches == 2
    assert_stored(module, first_batches(2))


def bn1_only(module: TinyNet, batch: Any) -> Tensor:
    return module.bn1(module.conv1(batch[0]))


class FetchesItself(TinyNet):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class NeedsGradients(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + torch.autograd.grad(loss, self.conv1.weight, create_graph=True)[0].square().sum()


@pytest.mark.parametrize(
    ("module", "does"), [(FetchesItself, "takes a dataloader_iter"), (NeedsGradients, "needs gradients itself")]
)
def test_an_unusable_training_step_is_refused_and_the_alternatives_work(module: type[TinyNet], does: str) -> None:
    refused = rf"{module.__name__}\.training_step {does}.*forward='forward' or a function"
    with pytest.raises((ValueError, RuntimeError), match=refused):
        fit(module(), PreciseBNCallback(20))
    source = {"source": FromLoader(lambda _: first_batches(3))} if module is FetchesItself else {}
    for forward in ("forward", lambda module, batch: module(batch[0])):
        trained = module()
        fit(trained, PreciseBNCallback(20, forward=forward, **source), max_epochs=1)
        assert_stored(trained, first_batches(3))
    precise = PreciseBNCallback(20, forward=bn1_only, **source)
    fit(module(), precise, max_epochs=1)
    assert list(precise.result) == ["bn1"]


@pytest.mark.parametrize("update", [zoo.lerp_data, zoo.other_data])
def test_a_momentum_encoder_is_measured_as_the_next_step_will_use_it(update: Callable[..., Any]) -> None:
    module, precise = zoo.MomentumEncoder(update), PreciseBNCallback(20)
    fit(module, precise)
    convolution = copy.deepcopy(module.teacher[0]).double()
    for own, theirs in zip(convolution.parameters(), module.student[0].parameters(), strict=True):
        own.data.lerp_(theirs.data.double(), 0.1)  # once, though the pass has run three steps
    inputs = convolution(torch.cat([x for x, _ in first_batches(3)]).double())
    var, mean = torch.var_mean(inputs, (0, 2, 3), correction=0)
    assert_close(precise.result["teacher.1"].mean.double(), mean, rtol=1e-5, atol=1e-5)
    assert_close(precise.result["teacher.1"].var.double(), var, rtol=1e-5, atol=1e-5)


class Stateful(DataLoader[Any]):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StatefulImages(Images):
    state_dict, load_state_dict = Stateful.state_dict, Stateful.load_state_dict


class Resets(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


class UsedUp(Stream):
    """Looks like an iterator: whoever reads it takes from the others."""

    def __next__(self) -> Any:
        raise StopIteration


class Own:
    def __iter__(self) -> Iterator[Any]:
        return iter(first_batches(4))


WITH_OTHER_SOURCE: dict[str, tuple[Callable[[], Any], str]] = {
    "stateful loader": (lambda: Stateful(Images(32), batch_size=8), r"stateful \(Stateful\)"),
    "stateful dataset": (lambda: DataLoader(StatefulImages(32), batch_size=8), r"stateful \(StatefulImages\)"),
    "own __iter__": (lambda: Resets(Images(32), batch_size=8), "Resets overrides __iter__"),
    "iterator dataset": (lambda: DataLoader(UsedUp(), batch_size=8), "UsedUp is an iterator"),
    "own iterable": (Own, "is a Own"),
    "generator": (lambda: (batch for batch in first_batches(4)), "generator is an iterator"),
    "one of several": (lambda: {"a": train_loader(), "b": Own()}, "is a Own"),
}


@pytest.mark.parametrize(("loader", "refused"), WITH_OTHER_SOURCE.values(), ids=WITH_OTHER_SOURCE)
def test_a_loader_that_cannot_be_read_twice_is_refused_and_both_alternatives_work(loader: Any, refused: str) -> None:
    several = isinstance(loader(), dict)
    module = Several if several else TinyNet
    with pytest.raises(ValueError, match=rf"{refused}.*source='replay'.*FromLoader"):
        fit(module(), PreciseBNCallback(20), loader())
    batches = [{"a": b, "b": b} for b in first_batches(4)] if several else first_batches(4)
    for source in ("replay", FromLoader(lambda _: batches)):
        trained, precise = module(), PreciseBNCallback(20, source=source)
        fit(trained, precise, loader(), max_epochs=1)
        assert precise.result.num_samples == 24
