"""What the experiment measures is what it says it measures."""

import pytest
import torch
from torch import nn

import lightning_bn as lbn
from recipes.classifier import ImageClassifier
from recipes.ema_vs_precise.experiment import (
    EMATrace,
    Parts,
    Run,
    batch_mean_cloud,
    hash_of_parameters,
    sweep_samples,
)
from recipes.evaluation import mean_and_spread
from recipes.images import ImageData


@pytest.fixture
def parts() -> Parts:
    data = ImageData(train_images=60, val_images=30, batch_size=20, shift=0)
    return Parts(ImageClassifier(width=8), data, lbn.PreciseBNCallback(), lbn.BNStatsMonitor(), {})


@pytest.fixture
def run(parts: Parts) -> Run:
    """A run that has trained for no step."""
    state = {name: value.clone() for name, value in parts.model.state_dict().items()}
    return Run("EMA", 0, epochs=[1.0], errors=[90.0], weights=["-"], states=[state], steps=[1])


@pytest.mark.parametrize(("network", "layers"), [("resnet8", 9), ("resnet20", 21), ("plain20", 19)])
def test_networks_have_as_many_bn_layers_as_they_say(network: str, layers: int) -> None:
    assert len(lbn.find_bn(ImageClassifier(network=network))) == layers


def test_a_width_that_corrupts_the_heap_on_some_cpus_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 8 but is 7"):
        ImageClassifier(width=7)


def test_the_hash_sees_one_bit_of_one_weight_and_no_buffer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = hash_of_parameters(model)
    model[1].running_mean.add_(1)
    assert hash_of_parameters(model) == before
    assert hash_of_parameters(model.to(memory_format=torch.channels_last)) == before
    weight = model[0].weight.data.view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    assert hash_of_parameters(model) != before


def test_the_hash_takes_weights_of_any_type() -> None:
    assert len({hash_of_parameters(nn.Linear(2, 2).to(dtype)) for dtype in (torch.float64, torch.bfloat16)}) == 2


def test_the_spread_is_that_of_the_draws_not_of_the_seeds() -> None:
    steady_seeds = [torch.tensor([[1.0, 0, 0, 0]] * 3), torch.tensor([[1.0, 1, 1, 0]] * 3)]
    assert mean_and_spread(*steady_seeds) == "50.0 ± 0.0"
    assert mean_and_spread(torch.tensor([[1.0, 0], [0, 0]])) == "25.0 ± 35.4"
    assert mean_and_spread(torch.tensor([[1.0, 0]])) == "50.0"


def test_a_cloud_holds_the_means_of_batches_under_the_weights_of_its_step(parts: Parts, run: Run) -> None:
    trace = EMATrace()
    trace.means = [torch.zeros(60)]
    cloud = batch_mean_cloud(parts, run, trace, batches=3)
    assert cloud.batch_means[1].shape == (3, len(cloud.channels))
    assert cloud.channels[8] == ("network.block1.bn1", 0)

    images = torch.cat([images for images, _ in parts.data.training_sample(60, torch.Generator())])
    stem = parts.model.get_submodule("network.conv")(images).transpose(0, 1).flatten(1)
    assert cloud.batch_means[1][:, :8].mean(0) == pytest.approx(stem.mean(1).detach().numpy(), abs=1e-5)
    assert cloud.std[1][:8] == pytest.approx(stem.std(1).detach().numpy(), rel=1e-3)
    assert cloud.batch_means[1][:, :8].std(0).min() > 0, "three batches, three different means"


def test_a_sweep_starts_every_draw_from_the_checkpoint(parts: Parts, run: Run) -> None:
    sweep = sweep_samples(parts, run, 0, samples=[20, 60, 500], draws=2, say=lambda line: None)
    assert {n: tuple(wrong.shape) for n, wrong in sweep.precise.items()} == {20: (2, 30), 60: (1, 30)}
    again = sweep_samples(parts, run, 0, samples=[20, 60, 500], draws=2, say=lambda line: None)
    assert torch.equal(sweep.ema, again.ema)
    assert all(torch.equal(sweep.precise[n], again.precise[n]) for n in sweep.precise)
