"""FreezeBNCallback: when it switches, with which statistics, what stays constant and what trains on, also on ranks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

import lightning_bn as lbn
from lightning_bn import FreezeBNCallback, PassConfig, PreciseBNCallback
from tests.callbacks import zoo
from tests.callbacks.zoo import At, Stream, TinyNet, digest, first_batches, fit, said, statistics_of, train_loader
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:FreezeBNCallback freezes statistics that were never trained")

EPOCH = 4
"""Batches in an epoch."""


class Watch(Callback):
    """Records the state and learning rates of each batch. Put it after FreezeBNCallback."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.ended: list[dict[str, Any]] = []
        self.rates_in_step: list[list[float]] = []
        self.rates_between: list[list[float]] = []
        self._hooks: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for optimizer in trainer.optimizers:  # again for each batch: behind the hooks of others, to see what they did
            self._hooks.append(optimizer.register_step_pre_hook(self._note_rates))
        self.started.append(snapshot(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ended.append(snapshot(pl_module))
        self.rates_between.append([rate for o in trainer.optimizers for rate in rates(o)])

    def _note_rates(self, optimizer: Optimizer, *_: Any) -> None:
        self.rates_in_step.append(rates(optimizer))

    @property
    def frozen(self) -> list[bool]:
        """For each batch, whether it left the statistics of every BatchNorm layer as they were."""
        return [
            all(torch.equal(before[key], after[key]) for key in before if is_statistic(key))
            for before, after in zip(self.started, self.ended, strict=True)
        ]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def is_statistic(key: str) -> bool:
    return key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def assert_exact(module: TinyNet, batches: list[Any]) -> None:
    for name, (mean, var) in zoo.exact_statistics(module, batches).items():
        layer = module.get_submodule(name)
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=0)


def freeze(**kwargs: Any) -> FreezeBNCallback:
    """The callback, by default from the second epoch on; arguments of the pass may be given directly."""
    if not {"last_n_epochs", "start_epoch", "start_step", "start_fraction"} & set(kwargs):
        kwargs["start_epoch"] = 1
    config = {key: kwargs.pop(key) for key in ("num_samples", "source", "forward") if key in kwargs}
    return FreezeBNCallback(precise=PassConfig(**{"num_samples": 20, **config}), **kwargs)


@pytest.mark.parametrize(
    ("when", "trainer", "batches"),
    [
        ({"last_n_epochs": 1}, {}, 2 * EPOCH),
        ({"last_n_epochs": 3}, {}, 0),
        ({"start_epoch": 1}, {"max_epochs": -1, "max_steps": 7}, EPOCH),
        ({"start_step": 5}, {}, 5),
        ({"start_step": 3}, {"accumulate_grad_batches": 2}, 6),
        ({"start_fraction": 0.4}, {"max_epochs": -1, "max_steps": 10}, 4),
        ({"start_fraction": 0.5}, {"max_steps": 8}, 4),  # the steps end the fit sooner than the epochs
        ({"start_fraction": 0.5}, {"max_steps": 1000}, 6),  # and here the epochs
    ],
)
def test_it_freezes_from_exactly_there_on(when: dict[str, Any], trainer: dict[str, Any], batches: int) -> None:
    watch = Watch()
    fit(TinyNet(), [freeze(**when), watch], **{"max_epochs": 3, **trainer})
    assert watch.frozen == [number >= batches for number in range(len(watch.frozen))]


def test_another_rule_can_be_given_by_overriding_should_freeze() -> None:
    class FromTheThirdBatch(FreezeBNCallback):
        def should_freeze(self, trainer: Trainer, batch_idx: int) -> bool:
            return batch_idx >= 2

    watch = Watch()
    fit(TinyNet(), [FromTheThirdBatch(start_epoch=0), watch], max_epochs=1)
    assert watch.frozen == [False, False, True, True]


@pytest.mark.parametrize(
    ("options", "switch", "shown"),
    [
        ({"start_epoch": 1}, 4, first_batches(3)),  # 24 samples: whole batches until there are 20
        # of a replay, the batch that is about to be trained on has come already, as one of the two
        ({"start_step": 6, "source": "replay", "num_samples": 16}, 6, first_batches(3)[1:]),
    ],
    ids=["train dataloader", "replay"],
)
def test_precise_statistics_are_those_of_the_weights_at_the_switch(options: Any, switch: int, shown: Any) -> None:
    watch, at_switch = Watch(), TinyNet()
    logged = fit(TinyNet(dropout=0.5), [freeze(**options), watch]).logger.logged
    at_switch.load_state_dict(watch.started[switch])
    assert_exact(at_switch, shown)
    assert logged("freeze_bn/num_samples") == {switch: 8 * len(shown)}
    assert len(logged("freeze_bn/seconds")) == len(logged("freeze_bn/mean_gap_max")) == 1


def test_ema_keeps_the_running_statistics_as_they_are() -> None:
    watch = Watch()
    fit(TinyNet(), [freeze(statistics="ema"), watch])
    assert digest(watch.ended[EPOCH - 1]) == digest(watch.started[EPOCH])


def sgd(module: nn.Module) -> Optimizer:
    return SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(module: nn.Module) -> Optimizer:
    return AdamW(module.parameters(), lr=0.02, weight_decay=0.5)


def cosine(optimizer: Optimizer) -> Any:
    return schedulers.CosineAnnealingLR(optimizer, T_max=3 * EPOCH)


class Configured(TinyNet):
    def __init__(self, optimizer: Any = sgd) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine(optimizer), "interval": "step"}}


def train_by_hand(module: Configured, switch: int, factors: list[float], affine: bool, clip: Any) -> None:
    """The truth: from the switch on BatchNorm in eval mode, rates scaled one by one, affine gradients left out."""
    optimizer = module.optimizer(module)
    scheduler = cosine(optimizer)
    batches = list(train_loader()) * 3
    layers = [module.bn1, module.bn2]
    for number, (x, y) in enumerate(batches):
        frozen = number >= switch
        if number == switch:
            lbn.precise_bn(module, batches[:EPOCH], num_samples=20, normalization_batch_size=100)
        for layer in layers:
            layer.train(not frozen)
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        if frozen and affine:
            for layer in layers:
                layer.weight.grad = layer.bias.grad = None
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        own = rates(optimizer)
        (group,), (rate,) = optimizer.param_groups, own
        group["lr"] = rate * (factors[number - switch] if 0 <= number - switch < len(factors) else 1.0)
        optimizer.step()
        group["lr"] = rate
        scheduler.step()


@pytest.mark.parametrize(
    ("optimizer", "affine", "clip"), [(sgd, False, None), (sgd, True, 0.05), (adamw, True, None), (adamw, False, 0.05)]
)
def test_a_fit_is_bit_for_bit_the_loop_by_hand(optimizer: Any, affine: bool, clip: float | None) -> None:
    ours, truth = Configured(optimizer), Configured(optimizer)
    fit(ours, freeze(start_step=5, affine=affine), max_epochs=3, gradient_clip_val=clip)
    train_by_hand(truth.train(), 5, [0.25, 0.5, 0.75, 1.0], affine, clip)
    assert digest(dict(ours.named_parameters())) == digest(dict(truth.named_parameters()))
    assert digest(statistics_of(ours)) == digest(statistics_of(truth))


def test_two_callbacks_freeze_their_own_layers_and_warm_up_once() -> None:
    watch = Watch()
    module = TinyNet(lr=0.5)
    fit(module, [freeze(layers="bn1", affine=True), freeze(layers="bn2", start_step=5), watch], max_epochs=3)
    last, at_switch = watch.ended[-1], watch.started[EPOCH]
    assert torch.equal(last["bn1.weight"], at_switch["bn1.weight"])
    assert not torch.equal(last["bn2.weight"], watch.started[5]["bn2.weight"])
    assert torch.equal(last["bn2.running_mean"], watch.started[5]["bn2.running_mean"])
    assert [rate / 0.5 for (rate,) in watch.rates_in_step[EPOCH:]] == pytest.approx([0.25, 0.25, 0.5, 0.75, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "trainer", "factors"),
    [
        ({}, {}, [1 / 4, 2 / 4, 3 / 4, 1]),
        ({"warmup_epochs": 0.5}, {}, [1 / 2, 1]),
        ({"warmup_epochs": 1.5}, {}, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]),
        ({"warmup_epochs": 0}, {}, []),
        ({"warmup_steps": 3}, {}, [1 / 3, 2 / 3, 1]),
        ({}, {"accumulate_grad_batches": 2}, [1 / 2, 1]),
        ({}, {"accumulate_grad_batches": 3}, [1 / 2, 1]),  # 4 batches: a step of three, a step of one
    ],
)
def test_the_warm_up_is_counted_in_optimizer_steps(arguments: Any, trainer: Any, factors: list[float]) -> None:
    watch = Watch()
    trained = fit(TinyNet(lr=0.5), [freeze(**arguments), watch], max_epochs=3, **trainer)
    steps = trained.global_step // 3  # of an epoch
    seen = [rate / 0.5 for (rate,) in watch.rates_in_step]
    expected = [1.0] * steps + factors
    assert seen == pytest.approx(expected + [1.0] * (3 * steps - len(expected)))
    assert all(rate == 0.5 for (rate,) in watch.rates_between)


@pytest.mark.parametrize(("val_check_interval", "accumulate"), [(1.0, 1), (0.5, 2)])
def test_the_factor_is_logged_at_the_step_of_the_loss(val_check_interval: float, accumulate: int) -> None:
    options = {"val_check_interval": val_check_interval, "accumulate_grad_batches": accumulate}
    logged = fit(TinyNet(), freeze(warmup_epochs=2), max_epochs=4, **options).logger.logged
    steps, losses = EPOCH // accumulate, list(logged("train_loss_step"))
    assert losses == list(range(4 * steps))
    # the second and third epoch warm up
    factors = {losses[steps + n]: pytest.approx((n + 1) / (2 * steps)) for n in range(2 * steps)}
    assert logged("freeze_bn/lr_factor") == factors


class TwoOptimizers(TinyNet):
    """Optimizes manually, ``raw`` past Lightning's wrappers: features at every batch, the head at every other."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw = raw

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers(use_pl_optimizer=not self.raw)
        x, y = batch
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(x), y))
        for number, optimizer in enumerate(optimizers):
            if batch_idx % (number + 1) == number:
                optimizer.step()

    def configure_optimizers(self) -> Any:
        features = [p for name, p in self.named_parameters() if not name.startswith("head")]
        return [SGD(features, lr=0.1), SGD(self.head.parameters(), lr=0.5)]


@pytest.mark.parametrize("raw", [False, True])
def test_with_manual_optimization_each_optimizer_warms_up_in_its_own_steps(raw: bool) -> None:
    watch = Watch()
    fit(TwoOptimizers(raw), [freeze(forward="forward", affine=True), watch], max_epochs=4)
    in_order = iter(watch.rates_in_step)
    features, head = list[float](), list[float]()
    for batch in range(4 * EPOCH):
        features.append(next(in_order)[0] / 0.1)
        head += [next(in_order)[0] / 0.5] if batch % 2 == 1 else []
    assert features == pytest.approx([1.0] * 4 + [0.25, 0.5, 0.75, 1.0] + [1.0] * 8)
    assert head == pytest.approx([1.0] * 2 + [0.25, 0.5, 0.75, 1.0] + [1.0] * 2)
    assert all(watch.frozen[EPOCH:])
    affine = [digest([batch["bn1.weight"], batch["bn2.bias"]]) for batch in watch.ended[EPOCH:]]
    assert affine == [affine[0]] * len(affine)


def test_epochs_of_unknown_length_need_warmup_steps() -> None:
    with pytest.raises(ValueError, match="pass warmup_steps"):
        fit(TinyNet(), freeze(), train=DataLoader(Stream(), 8), val=None)
    watch = Watch()
    fit(TinyNet(lr=0.5), [freeze(warmup_steps=2), watch], train=DataLoader(Stream(), 8), val=None, max_epochs=3)
    assert [r / 0.5 for (r,) in watch.rates_in_step] == pytest.approx([1.0] * 4 + [0.5, 1.0] + [1.0] * 6)
    assert watch.frozen == [False] * 4 + [True] * 8
    watch = Watch()
    fit(TinyNet(), [freeze(warmup_epochs=0), watch], train=DataLoader(Stream(), 8), val=None)
    assert watch.frozen == [False] * 4 + [True] * 4


class CallsModes(TinyNet):
    def on_train_batch_end(self, *_: Any) -> None:
        assert self.bn1.training  # each layer reports the mode that the user has set

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.eval(), self.train(), self.bn1.eval(), self.bn1.train()

    def on_validation_model_train(self) -> None:
        self.train()

    def on_validation_model_eval(self) -> None:
        self.eval()


def assert_kept(statistics: dict[str, Tensor], watch: Watch) -> None:
    """Every statistic is that of the switch."""
    assert all(torch.equal(watch.started[EPOCH][k], v) for k, v in statistics.items() if is_statistic(k))


def test_train_and_eval_calls_do_not_thaw() -> None:
    watch, module = Watch(), CallsModes()
    fit(module, [freeze(), watch], max_epochs=3, val_check_interval=0.5)
    assert watch.frozen == [False] * 4 + [True] * 8
    assert_kept(snapshot(module), watch)


def test_batches_that_cannot_be_counted_do_not_end_a_fit_without_a_pass() -> None:
    class FromLists(TinyNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(torch.tensor(batch)).square().mean()

    watch = Watch()
    batches = DataLoader([x.tolist() for x, _ in train_loader()], batch_size=None)
    fit(FromLists(), [freeze(statistics="ema"), watch], train=batches, val=None)
    assert watch.frozen == [False] * 4 + [True] * 4


def test_lbfgs_is_refused_before_training_if_it_holds_the_affine() -> None:
    module, watch = Configured(lambda m: torch.optim.LBFGS(m.parameters())), Watch()
    with pytest.raises(TypeError, match="LBFGS"):
        fit(module, [freeze(affine=True), watch])
    assert not watch.started


@pytest.mark.parametrize("when", [{"last_n_epochs": 1}, {"start_fraction": 0.5}])
def test_an_endless_fit_has_no_last_epochs(when: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="pass start_epoch or start_step"):
        fit(TinyNet(), freeze(**when), max_epochs=-1)


@pytest.mark.parametrize("freeze_first", [True, False])
def test_precise_bn_runs_until_the_switch_and_then_rests(freeze_first: bool) -> None:
    watch, module, precise = Watch(), TinyNet(), PreciseBNCallback(20)
    ours: list[Callback] = [freeze(), precise] if freeze_first else [precise, freeze()]
    found = said("all of its layers are frozen", module, [*ours, watch], max_epochs=4, val_check_interval=0.5)
    assert watch.frozen == [False] * 4 + [True] * 12
    assert_kept(snapshot(module), watch)
    assert precise.result is not None and not found, "a pass in the first epoch"


def test_with_weight_averaging_the_trained_weights_keep_their_frozen_statistics() -> None:
    watch, module = Watch(), TinyNet()
    fit(module, [WeightAveraging(), freeze(), watch], max_epochs=3)
    assert watch.frozen == [False] * 4 + [True] * 8
    assert_kept(watch.ended[-1], watch)


def _fit_on_ranks() -> tuple[Any, ...]:
    """Each rank has two of the four batches of an epoch; the switch comes at the second epoch."""
    watch, batches, module = Watch(), [], TinyNet()
    callback = freeze(start_step=2, num_samples=32, affine=True)
    note = At(lambda trainer, module, batch, _: batches.append(batch), "on_train_batch_start")
    fit(module, [callback, watch, note], max_epochs=3, devices=2, strategy="ddp")
    return [snapshot(module), watch.started[2], watch.frozen], watch.rates_in_step, batches[2:4]


@pytest.mark.ddp
def test_ranks_freeze_together_with_the_statistics_of_all_ranks_data() -> None:
    (found, in_step, batches), (found_there, _, batches_there) = run_on_ranks(_fit_on_ranks, 2)
    assert digest(found_there) == digest(found)
    _, at_switch, frozen = found
    assert frozen == [False] * 2 + [True] * 4
    assert [rate / 0.1 for (rate,) in in_step] == pytest.approx([1, 1, 0.5, 1, 1, 1])
    module = TinyNet()
    module.load_state_dict(at_switch)
    assert_exact(module, batches + batches_there)
