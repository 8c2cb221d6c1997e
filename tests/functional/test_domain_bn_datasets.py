"""domain_bn on datasets: a domain for each batch, or for each sample of it, against Table 5's rows by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import find_bn, precise_bn
from tests.functional.domains import EVERY, ReferenceBN, add_domains, as_images, as_rows


def net() -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 2)
    return nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(inplace=True), second, nn.BatchNorm2d(4)).double()


def batch(seed: int, ids: list[int]) -> tuple[Tensor, Tensor]:
    own = torch.Generator().manual_seed(seed)
    domain = torch.tensor(ids)
    x = torch.randn(len(ids), 2, 6, 5, generator=own, dtype=torch.float64)
    return x * (1 + domain.view(-1, 1, 1, 1)) + 3 * domain.view(-1, 1, 1, 1), domain


BATCHES = [batch(0, [0, 1, 2, 1, 0]), batch(1, [2, 0, 0, 2]), batch(2, [1, 1, 1]), batch(3, [2, 1, 0, 0, 0, 2])]


class ByHand:
    def __init__(self, model: nn.Sequential, row: int) -> None:
        self.model, self.bn, self.inputs = model, ReferenceBN(model, row, 3), {}

    def __call__(self, x: Tensor, domain: Tensor) -> Tensor:
        for name, m in self.model.named_children():
            self.inputs[name] = x.detach()
            x = self.normalized(m, x, domain) if isinstance(m, nn.BatchNorm2d) else m(x.clone())  # ReLU is in place
        return x

    def normalized(self, bn: nn.BatchNorm2d, x: Tensor, domain: Tensor) -> Tensor:
        y = torch.empty_like(x)
        for d, rows in self.bn(bn, {d: as_rows(x[domain == d]) for d in domain.unique().tolist()}).items():
            y[domain == d] = as_images(rows, x[domain == d])
        return y


def with_gradients(output: Tensor, model: nn.Module, x: Tensor) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [output, *torch.autograd.grad((output * weights).sum(), wanted)]


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(list(ours), list(theirs), rtol=1e-10, atol=1e-11)


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), rows.var(0, correction=0)


@pytest.mark.parametrize(("row", "per"), [*((row, "sample") for row in EVERY), (1, "batch"), (6, "batch")])
def test_datasets_train_and_evaluate_as_their_row_of_table_5(row: int, per: str) -> None:
    model = net()
    handle = add_domains(model, row)
    for layer in find_bn(model).values():
        for p in layer.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    by_hand = ByHand(model, row)
    for x, domain in BATCHES:
        if per == "batch":
            domain = torch.full_like(domain, int(domain[0]))
        x = x.clone().requires_grad_()
        with handle.use_domain(domain if per == "sample" else int(domain[0])):
            ours = with_gradients(model(x), model, x)
        assert_close(ours, with_gradients(by_hand(x, domain), model, x))
    for name, layer in find_bn(model).items():
        assert_close((layer.running_mean, layer.running_var), by_hand.bn.running[layer])
        assert int(layer.num_batches_tracked) == len(BATCHES)
        if EVERY[row][1] == "domain":
            own, bn = handle.state()[name], by_hand.bn
            assert_close((own["domain_mean"], own["domain_var"]), (bn.means[layer], bn.variances[layer]))
    x, domain = BATCHES[0]
    handle.set_domain(domain)
    assert_close([model.eval()(x)], [by_hand(x, domain)])
    handle.undo()
    assert [type(m) for m in model] == [type(m) for m in net()]


@pytest.mark.parametrize("row", [1, 2, 4])
def test_a_pass_measures_each_domain_of_mixed_batches_as_one(row: int) -> None:
    model, by_hand = net(), ByHand(net(), row)
    handle = add_domains(model, row)

    def forward(model: nn.Module, batch: Any) -> None:
        with handle.use_domain(batch[1]):
            model(batch[0])

    statistics = precise_bn(model, BATCHES, forward=forward, normalization_batch_size="population")
    x, domain = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    by_hand(x, domain)
    for name, layer in find_bn(model).items():
        given = by_hand.inputs[name]
        assert_close((layer.running_mean, layer.running_var), moments(as_rows(given)))
        assert statistics[name].count == len(as_rows(given))
        for d in range(3) if EVERY[row][1] == "domain" else ():
            own, found = as_rows(given[domain == d]), handle.state()[name]
            assert_close((found["domain_mean"][d], found["domain_var"][d]), moments(own))
            assert statistics[name].domains[d].count == len(own)


def test_a_checkpointed_block_is_recomputed_as_its_domains() -> None:
    models, found = (net(), net()), []
    for model in models:
        add_domains(model, 6).set_domain(BATCHES[0][1])
        x = BATCHES[0][0].clone().requires_grad_()
        output = model(x) if model is models[0] else checkpoint(model, x, use_reentrant=False)
        found.append(with_gradients(output, model, x))
    assert_close(*found)
    assert_close(*(m.buffers() for m in models))


@pytest.mark.parametrize("row", [2, 3, 6])
def test_a_domain_of_one_value_uses_stored_statistics_and_moves_none(row: int) -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(2)), torch.randn(4, 2)
    handle = add_domains(model, row)
    before = {k: v.clone() for k, v in model.named_buffers()}
    with handle.use_domain(torch.tensor([0, 0, 1, 0])):
        if row == 2:
            model(x)
            own = handle.state()["0"]
            assert own["domain_batches"].tolist() == [1, 0, 0] and own["domain_var"][1:].eq(1).all()
        else:
            with pytest.warns(UserWarning, match="Layer '0' gets one value per channel of domain 1"):
                output = model(x)
            if "0.domain_mean" in before:  # the domain's initial mean 0 and variance 1
                torch.testing.assert_close(output[2], x[2] / (1 + 1e-5) ** 0.5)
            stored = {k: v for k, v in model.named_buffers() if k.startswith("0.domain_")}
            assert all(v[1:].equal(before[k][1:]) for k, v in stored.items())
            whole = nn.BatchNorm1d(2)
            whole(x[[0, 1, 3]])
            torch.testing.assert_close(model[0].running_var, whole.running_var)
            model(x)  # warns once
        model.eval()(x)  # which needs no second value


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        *((wrong, ValueError) for wrong in (3, -1, torch.tensor(3), torch.tensor([0, 5]))),
        *((wrong, TypeError) for wrong in ("a", torch.tensor([0.0, 1.0]), True)),
    ],
)
def test_what_is_no_domain_is_refused(wrong: Any, error: type[Exception]) -> None:
    handle = add_domains(net(), 4)
    with pytest.raises(error, match=r"[Dd]omain"), handle.use_domain(wrong):
        pass


def test_a_forward_without_domains_or_of_other_samples_is_refused_and_levels_have_none_set() -> None:
    model, (x, domain) = net(), BATCHES[0]
    handle = add_domains(model, 4)
    with pytest.raises(RuntimeError, match="No domain is set"):
        model(x)
    with handle.use_domain(domain[:2]), pytest.raises(ValueError, match=r"Layer '1' gets 5 rows, but .* of 2 samples"):
        model(x)
    levels = add_domains(nn.Sequential(net()), 4, level_modules="0")
    with pytest.raises(ValueError, match="feature levels"):
        levels.set_domain(1)


def test_the_state_goes_back_into_another_model() -> None:
    first = net()
    trained, other = add_domains(first, 4), add_domains(net(), 4)
    x, ids = batch(0, [0, 1, 1, 0, 1, 0])
    with trained.use_domain(ids):
        first(x)
    other.load(trained.state())
    torch.testing.assert_close(other.state(), trained.state(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="state has no statistics of domains"):
        other.load({})
