r"""A forecast of the statistics of the next batch, from those of the last steps.

Candidates are the batch statistics averaged over the last 1, 2, 4, ... 32 steps, and the running statistics. With
$a_{k,t}$ the candidates before step $t$ and $x_t$ the statistics of its batch (means in units of its sigma, and log
variances), the forecast is $\sum_k w_k a_k$ with the weights that would have forecast the last batches best,

$$w = \arg\min_{\sum w = 1} \sum_t 0.9^{T-t} \overline{(\textstyle\sum_k w_k a_{k,t} - x_t)^2} + \lambda |w - w_0|^2,$$

one regression per layer for its means and one for its log variances. The bar is the mean over channels, $w_0$ the best
single candidate and $\lambda$ its error. Negative weights allow trends. The population's variance includes that of the
batch means (paper, Eq. 2), estimated by the forecast's error: $\sigma^2 = \exp(\text{forecast}) (1 + \text{error}^2)$.

`StatisticsForecaster` makes it from training steps, without a forward and without data.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.gaps import mean_offsets, var_offsets
from lightning_bn.core.population import LayerStatistics, PopulationStatistics
from lightning_bn.core.ranks import broadcast_from_rank_zero, get_rank
from lightning_bn.tracking.drift import is_dead
from lightning_bn.tracking.recovery import MAX_ERROR, Snapshot, StepRecorder, recovery_error

STEPS = 32  # in a forecast; in its regression the oldest one weighs 4 % of the newest
SPANS = (1, 2, 4, 8, 16, 32)  # averages over s steps: the weight of a step is 1 - 1/s times that of the next one

_DISCOUNT = 0.9  # weight of a step's error one step later: the best weights change with the learning rate
_RIDGE = 1.0  # pull towards the best single candidate, as a multiple of its squared error
_SAMPLED_CHANNELS = 32  # of a layer in its regressions, evenly spaced: enough for six free weights
_CHANNELS_AT_ONCE = 2048  # in whole layers, that are forecast together, to bound memory
_INACCURATE = "means of many sigma"  # rounding then hides the batch statistics
_SMALLEST_VARIANCE = 1e-12


class Forecast(NamedTuple):
    """Holds the expected statistics of the next batches."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,), over all batches, that of their means included
    error: Tensor  # of the last forecasts, (2, L): means in sigma, and log variances; NaN without two known steps


class Steps(NamedTuple):
    """Holds the last ``N`` steps in order, with the channels of all layers concatenated."""

    batch: Tensor  # mean and variance, (N, 2, C)
    running: Tensor  # running statistics before each step, (N, 2, C)
    known: Tensor  # channels for which both are known, (N, C)


def forecast_statistics(steps: Steps, running: Tensor, eps: Tensor, sizes: Sequence[int]) -> Forecast:
    """Forecast the statistics of the next batch by the formula at the top of this file.

    Dead channels, and steps in which a layer was not called, take no part in the regression. A layer without two known
    steps gets its running statistics, ``(2, C)``. ``eps``, ``(C,)``, sets precision and device.
    """
    (batch, before, known), all_known = _unknown_first(steps)
    layer_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes), output_size=sum(sizes)).to(eps.device)
    sampled, is_sampled = _sample(sizes, eps.device)
    seen = _log_var(batch)
    averages, earlier = _averages(seen, None if all_known else known, sampled)
    candidates = torch.cat([earlier, _log_var(before[..., sampled])[None]])  # (K, N, 2, L * S)
    learns = known & (known.cumsum(0) > 1) & ~is_dead(batch[:, 1], eps) & ~is_dead(before[:, 1], eps)
    learns = (learns[:, sampled] & is_sampled).unflatten(1, (len(sizes), -1))
    weights, error = _fit(candidates, seen[..., sampled], learns)

    poisoned = ~running.isfinite().all(0)  # a NaN batch stays in running statistics
    now = torch.where(poisoned, averages[-1], _log_var(running[None])[0])
    mean, log_var = (weights[..., layer_of] * torch.cat([averages, now[None]])).sum(0)
    of_means = error[0, layer_of]
    var = log_var.exp() * (1 + of_means.square())
    mean, var = torch.where(of_means.isfinite(), torch.stack([mean, var]), running)
    return Forecast(mean, var, error)


def _unknown_first(steps: Steps) -> tuple[Steps, bool]:
    # unknown steps move to the front of their channel, where they weigh nothing
    batch, running, known = steps
    known = known & (batch + running).isfinite().all(1)
    all_known = bool(known.all())  # the usual case, and the only value here that is waited for
    if not all_known:
        order = known.byte().argsort(dim=0, stable=True)
        known = known.gather(0, order)
        batch, running = (
            torch.where(known[:, None], part.gather(0, order[:, None].expand_as(part)), 1.0)
            for part in (batch, running)
        )
    return Steps(batch, running, known), all_known


def _sample(sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    # indices of sampled channels, and whether they count: small layers are padded
    place, size = torch.arange(_SAMPLED_CHANNELS), torch.tensor(sizes)[:, None]
    spread = place * size // _SAMPLED_CHANNELS
    within = torch.where(size >= _SAMPLED_CHANNELS, spread, place.minimum(size - 1))
    starts = torch.tensor([0, *accumulate(sizes)])[:-1, None]
    return (starts + within).flatten().to(device), (place < size).flatten().to(device)


def _averages(x: Tensor, known: Tensor | None, sampled: Tensor) -> tuple[Tensor, Tensor]:
    decay = 1 - 1 / torch.tensor(SPANS).to(x)[:, None, None]
    number = torch.arange(1, len(x) + 1, device=x.device)[:, None] if known is None else known.cumsum(0)
    gains = (1 - decay) / (1 - decay ** number.clamp(min=1))  # (K - 1, N, C), or (K - 1, N, 1) without unknown steps
    average, earlier = x.new_zeros(len(SPANS), *x.shape[1:]), []
    for step, gain in zip(x, gains.unbind(1), strict=True):
        earlier.append(average[..., sampled])
        average = torch.lerp(average, step, gain[:, None])  # gain 1 at the first known step, which replaces all
    return average, torch.stack(earlier, 1)  # (K - 1, 2, C); and before each step, of the sampled channels


def _fit(candidates: Tensor, seen: Tensor, learns: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float32 if seen.device.type == "mps" else torch.float64  # MPS has no float64
    steps = learns.any(-1).to(seen)  # (N, L): in which a layer learns
    later = steps.flip(0).cumsum(0).flip(0) - steps
    weight = _DISCOUNT ** later[..., None] * learns
    total = weight.sum((0, 2))
    scale = torch.stack([torch.exp(-0.5 * seen[:, 1]), torch.ones_like(seen[:, 1])], 1)  # means are in sigma
    scale = scale.unflatten(2, learns.shape[1:]) * weight.sqrt()[:, None]
    errors = (candidates - seen).unflatten(3, learns.shape[1:]) * scale  # (K, N, 2, L, S)
    errors = errors.permute(2, 3, 0, 1, 4).flatten(3)
    products = (errors @ errors.mT / total.clamp(min=1)[:, None, None]).to(wide)  # (2, L, K, K)
    squares = products.diagonal(dim1=-2, dim2=-1)
    best = torch.zeros_like(squares).scatter_(-1, squares.argmin(-1, keepdim=True), 1.0)[..., None]
    pull = _RIDGE * squares.amin(-1).clamp(min=1e-12)[..., None, None]
    system = products + pull * torch.eye(products.shape[-1], dtype=wide, device=seen.device)
    # regular, because of the pull; `solve` would wait for the device to check it
    free, ones = torch.linalg.solve_ex(system, torch.cat([pull * best, torch.ones_like(best)], -1)).result.unbind(-1)
    weights = free + ones * ((1 - free.sum(-1)) / ones.sum(-1))[..., None]  # they add up to 1
    error = (weights[..., None, :] @ products @ weights[..., None])[..., 0, 0].clamp(min=0).sqrt()
    error = torch.where(total > 0, error, torch.nan)
    # weights (K, 2, L), and the error that they would have made, (2, L)
    return weights.permute(2, 0, 1).to(seen), error.to(seen)


def _log_var(statistics: Tensor) -> Tensor:
    mean, var = statistics.unbind(1)
    return torch.stack([mean, var.clamp(min=_SMALLEST_VARIANCE).log()], 1)


class StatisticsForecaster:
    """Records training steps and forecasts the statistics of the weights after the last one.

    The first rank records, because DistributedDataParallel broadcasts its running statistics. All ranks get its
    forecast. The steps take 512 bytes per channel in float32, and a forecast about 25 MB.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._recorder = StepRecorder(layers)
        self._steps: deque[Snapshot] = deque(maxlen=STEPS)
        wide = [layer.get_buffer("running_mean").element_size() > 2 for layer in layers.values()]
        self._wide = torch.tensor(wide).to(self._recorder.eps.device)[self._recorder.layer_of]
        self._check = True
        self._latest: tuple[Tensor, Forecast] | None = None  # of these running statistics, since the last step

    def before_batch(self) -> None:
        if get_rank() == 0:
            self._recorder.before_batch(self._check)

    def after_batch(self) -> None:
        """End a step; skip the call for a batch that failed."""
        snapshot = self._recorder.after_batch()
        if snapshot is not None:
            self._steps.append(snapshot)
            self._check, self._latest = False, None

    def abandon(self) -> None:
        self._recorder.abandon()

    def left(self) -> dict[str, str]:
        """Return the layers that can have no forecast, and why, as the first rank knows it."""
        known = broadcast_from_rank_zero(self._recoverable().to(self._recorder.eps)).split(self._recorder.sizes)
        all_known = torch.stack([part.all() for part in known]).tolist()
        unknown = [name for name, is_known in zip(self._recorder.layers, all_known, strict=True) if not is_known]
        return {name: self._recorder.untrusted.get(name, _INACCURATE) for name in unknown}

    def statistics(self) -> PopulationStatistics:
        """Forecast every layer with two steps that were recovered accurately."""
        return self._forecast()[0]

    def ema_gaps(self) -> dict[str, float]:
        """Return the larger of mean gap and variance gap from running statistics to the forecast, for its layers.

        Dead channels do not count. The gap is NaN where running statistics are not finite.
        """
        forecast, running = self._forecast()
        gaps = []
        for (name, layer), (mean, var) in zip(self._recorder.layers.items(), running, strict=True):
            if name in forecast:
                alive, expected = ~is_dead(var, layer.eps), forecast[name]
                offsets = torch.stack([mean_offsets(expected.mean, mean, var), var_offsets(expected.var, var)])
                squares = torch.where(alive, offsets.double().square(), 0.0)
                gaps.append((squares.sum(1) / alive.sum().clamp(min=1)).sqrt().amax())
        return dict(zip(forecast, torch.stack(gaps).tolist(), strict=True)) if gaps else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the last steps, with tensors on the CPU; empty on other ranks than the first."""
        if get_rank() != 0:
            return {}
        steps = [{key: v.cpu() if isinstance(v, Tensor) else v for key, v in s._asdict().items()} for s in self._steps]
        return {"sizes": list(self._recorder.sizes), "steps": steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state and state["sizes"] != self._recorder.sizes:
            raise ValueError("the layers were others, or had other numbers of channels.")
        device = self._recorder.eps.device
        self._latest = None
        for step in state.get("steps", ()):
            values: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in step.items()}
            self._steps.append(Snapshot(**values))

    def _forecast(self) -> tuple[PopulationStatistics, list[Tensor]]:
        self.abandon()  # a step that never ended
        self._check = True  # the forecast waits for the device in any case
        recorder, running = self._recorder, self._recorder.running()
        if self._latest is None or not torch.equal(self._latest[0], running):
            parts = [self._forecast_part(running, layers) for layers in _parts(recorder.starts)]
            self._latest = running, Forecast(*(torch.cat(part, -1) for part in zip(*parts, strict=True)))
        mean, var, error = self._latest[1]
        known = error[0].isfinite()[recorder.layer_of] & self._recoverable()
        shared = broadcast_from_rank_zero(torch.stack([mean, var, *running, known.to(mean)])).split(recorder.sizes, 1)
        forecast = {}
        all_known = torch.stack([part[4].all() for part in shared]).tolist()
        for name, (mean, var, *_), is_known in zip(recorder.layers, shared, all_known, strict=True):
            if is_known:
                unknown = torch.tensor(torch.nan).expand(len(mean))
                forecast[name] = LayerStatistics(mean, var, 0, 0, unknown, unknown)
        return PopulationStatistics(forecast, 0, 0, 0), [part[2:4] for part in shared]

    def _forecast_part(self, running: Tensor, layers: slice) -> Forecast:
        recorder = self._recorder
        channels = slice(recorder.starts[layers.start], recorder.starts[layers.stop])
        running, eps, sizes = running[:, channels], recorder.eps[channels], recorder.sizes[layers]
        if not self._steps:
            return Forecast(running[0], running[1], running.new_full((2, len(sizes)), torch.nan))
        step = recorder.recover(list(self._steps), layers)
        mean, var = step.before.unbind(1)
        accurate = (recovery_error(mean, var, step.decay) < MAX_ERROR) | is_dead(var, eps)
        known = step.called & accurate & self._wide[channels]
        return forecast_statistics(Steps(step.batch, step.before, known), running, eps, sizes)

    def _recoverable(self) -> Tensor:
        recorder = self._recorder
        inaccurate = torch.stack([p.any() for p in (recorder.recovery_errors() > MAX_ERROR).split(recorder.sizes)])
        trusted = torch.tensor([name not in recorder.untrusted for name in recorder.layers])
        return (~inaccurate & trusted.to(inaccurate.device))[recorder.layer_of]


def _parts(starts: Sequence[int]) -> Iterator[slice]:
    first, number = 0, len(starts) - 1
    for layer in range(1, number):
        if starts[layer + 1] - starts[first] > _CHANNELS_AT_ONCE:
            yield slice(first, layer)
            first = layer
    yield slice(first, number)
