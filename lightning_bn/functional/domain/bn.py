"""Domain-specific BN: choose which statistics domains share, and which each has separately (paper, Sec. 5.2)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.ranks import get_rank
from lightning_bn.functional.domain.datasets import Datasets, Domain
from lightning_bn.functional.domain.levels import Levels
from lightning_bn.functional.domain.specific import DomainSource, DomainSpecific
from lightning_bn.functional.domain.tensors import (
    Choice,
    Choices,
    State,
    add_domain_tensors,
    get_state,
    load_state,
    remove_domain_tensors,
)
from lightning_bn.layers.behavior import Handle, behaviors_of
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers, as_patterns, match_names, storing_layers


class DomainHandle(Handle):
    """Undoes `domain_bn`, and sets the current domain if domains are datasets.

    Attributes:
        layers: Qualified name -> layer with domains.
    """

    def __init__(self, layers: dict[str, _BatchNorm], datasets: Datasets | None) -> None:
        self._undo: list[Callable[[], Any]] = []
        self.layers = layers
        self._datasets = datasets

    def use_domain(self, domain: Domain) -> AbstractContextManager[None]:
        """Set the domain of the batch, or of each of its samples ``(N,)``, within a ``with`` block.

        Raises:
            ValueError: If there is no such domain, or if domains are feature levels.
            TypeError: If it is neither an int nor a 1d tensor of ints.
        """
        datasets = self._require_datasets()
        return datasets.use(datasets.of(domain))

    def set_domain(self, domain: Domain | None) -> None:
        """Set the domain of the model's input; None clears it. `use_domain` overrides it."""
        datasets = self._require_datasets()
        datasets.default = None if domain is None else datasets.of(domain)

    def state(self, affine: bool = False) -> State:
        """Copy each domain's statistics to the CPU: layer name -> ``"domain_mean"`` etc. -> ``(num_domains, C)``.

        ``affine`` includes ``domain_weight`` and ``domain_bias``, which the model's state dict holds, too.
        """
        return get_state(self.layers, affine)

    def load(self, state: State) -> None:
        """Copy a `state` into the layers.

        Raises:
            ValueError: If it is of other layers, or of another number of domains.
        """
        load_state(self.layers, state)

    def allow_copies(self) -> None:
        """Do not warn of deep copies of the model, for a caller that handles their domains (`WeightAveraging`)."""
        for layer in self.layers.values():
            for behavior in behaviors_of(layer):
                behavior.not_copied = ""

    def _require_datasets(self) -> Datasets:
        if self._datasets is None:
            raise ValueError("Domains are feature levels here: the index of a layer's call is its domain.")
        return self._datasets


def domain_bn(
    model: nn.Module,
    *,
    num_domains: int,
    train_statistics: Choice,
    population_statistics: Choice,
    affine: Choice,
    level_modules: str | Sequence[str] | None = None,
    layers: Layers = None,
) -> DomainHandle:
    r"""Choose which statistics BatchNorm layers share between domains, and which they keep per domain.

    A domain is a level of a feature pyramid that shares a head, or a dataset. The three choices are those of the
    paper's Table 5. With $\mu_d, \sigma_d^2$ the statistics of the $n_d$ values of domain $d$, and $n = \sum_d n_d$,
    the shared ones are $\mu = \sum_d \frac{n_d}{n} \mu_d$ and $\sigma^2 = \sum_d \frac{n_d}{n} (\sigma_d^2 + (\mu_d -
    \mu)^2)$. Training and evaluation should agree: ``train_statistics != population_statistics`` warns.

    *Feature levels*: ``level_modules`` names the modules whose forward runs a tower once for each level, such as
    torchvision's ``"head.*_head"``. A layer's level is the index of its call in one forward of that module. With
    ``train_statistics="shared"`` the tower runs on all levels in lockstep, and layers normalize them concatenated.
    *Datasets*: without ``level_modules``, set the domain by ``handle.use_domain(domain)``.

    When it helps: a head shared by levels (box AP 34.1 for the straightforward code, 39.1 if training and evaluation
    agree; Table 5), or datasets whose inputs differ. When it does not: with one domain.

    Each domain's statistics are buffers that no state dict holds (``handle.state()`` does). Its affine are new
    parameters, ``domain_weight`` and ``domain_bias``: create the optimizer afterwards. A deep copy is a plain model,
    and warns: call ``domain_bn`` on it to use the copied statistics.

    Args:
        model: The model.
        num_domains: Number of domains.
        train_statistics: ``"shared"`` or ``"domain"``: statistics that training normalizes with.
        population_statistics: Statistics that evaluation normalizes with.
        affine: Weight and bias.
        level_modules: Glob patterns over qualified names of modules; None for datasets.
        layers: Glob patterns over qualified layer names; None for those in the level modules, or every BatchNorm layer.

    Returns:
        A handle. ``undo()``, or the end of a ``with`` block, discards what layers keep per domain.

    Raises:
        ValueError: For an invalid choice, a pattern without a match, a layer outside of every level module, nested
            level modules, layers without running statistics, a conflicting feature, ``affine="domain"`` for a layer
            without affine.
        TypeError: For a SyncBatchNorm. In a forward: for a tower input that is not in the level module's input.
        RuntimeError: In a forward: for another number of levels, or if no domain is set.

    Example:
        >>> import torch
        >>> from lightning_bn import domain_bn
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1, momentum=None))
        >>> choices = {"train_statistics": "domain", "population_statistics": "domain", "affine": "shared"}
        >>> handle = domain_bn(model, num_domains=2, **choices)
        >>> for domain, x in enumerate(([[0.0], [2.0]], [[10.0], [14.0]])):
        ...     with handle.use_domain(domain):
        ...         model(torch.tensor(x)).flatten()
        tensor([-1.0000,  1.0000], grad_fn=<...>)
        tensor([-1.0000,  1.0000], grad_fn=<...>)
        >>> handle.state()["0"]["domain_mean"].flatten()
        tensor([ 1., 12.])
    """
    choices = check_choices(num_domains, train_statistics, population_statistics, affine, level_modules)
    names = {layer: name for name, layer in storing_layers(model, layers).items()}
    sources: Sequence[DomainSource] = [Datasets(names, choices)]
    if level_modules is not None:
        sources = _levels(model, level_modules, names, choices, strict=layers is not None)
    chosen = {name: layer for layer, name in names.items() if any(layer in source.layers for source in sources)}
    check_conflicts(chosen, "domain", model)
    without = [name for name, layer in chosen.items() if not layer.affine]
    if affine == "domain" and without:
        raise ValueError(f"Layer {without[0]!r} has no weight and bias (affine=False): pass affine='shared'.")
    if get_rank() == 0:
        _warn_if_unusual(choices, levels=level_modules is not None)

    handle = DomainHandle(chosen, sources[0] if isinstance(sources[0], Datasets) else None)
    try:
        for source in sources:
            specific = DomainSpecific(source)
            for layer in source.layers:
                add_domain_tensors(layer, choices)
                handle._undo.append(functools.partial(remove_domain_tensors, layer))
                handle._attach(layer, specific)
            for module, behavior in source.behaviors():
                handle._attach(module, behavior)
    except BaseException:
        handle.undo()
        raise
    return handle


def _levels(
    model: nn.Module, level_modules: str | Sequence[str], names: dict[_BatchNorm, str], choices: Choices, strict: bool
) -> list[Levels]:
    """The level modules, each with the chosen layers in it; if ``strict``, all of them must be in one."""
    modules = {name: module for name, module in model.named_modules() if name}
    patterns = as_patterns(level_modules, "level_modules")
    found = match_names(modules, patterns, "level_modules", f"module of {type(model).__name__}")
    for outer in found:
        inner = [name for name in found if name.startswith(f"{outer}.")]
        if inner:
            found_both = f"level_modules={level_modules!r} matches {outer!r} and {inner[0]!r} within it"
            raise ValueError(f"{found_both}: pass only the one whose forward runs a tower once for each level.")
    levels = []
    for name in found:
        inside = set(modules[name].modules()) - {modules[name]}
        levels.append(Levels(name, modules[name], {layer: n for layer, n in names.items() if layer in inside}, choices))
    outside = [name for layer, name in names.items() if not any(layer in source.layers for source in levels)]
    if outside and (strict or len(outside) == len(names)):
        where = f"Layer {outside[0]!r} is in none of the level modules {', '.join(found)}"
        raise ValueError(f"{where}. Leave it out by layers=, or name its level module.")
    return levels


def check_choices(
    num_domains: int,
    train_statistics: Choice,
    population_statistics: Choice,
    affine: Choice,
    level_modules: str | Sequence[str] | None,
) -> Choices:
    """Validate arguments of `domain_bn`."""
    if level_modules is not None:
        as_patterns(level_modules, "level_modules")
    return Choices(num_domains, train_statistics, population_statistics, affine)


def _warn_if_unusual(choices: Choices, levels: bool) -> None:
    train, population = choices.train_statistics, choices.population_statistics
    if train != population:
        ap = "2.1" if train == "shared" else "34.1" if choices.affine == "shared" else "35.5"
        warnings.warn(
            f"train_statistics={train!r} and population_statistics={population!r} are inconsistent: in the paper's "
            f"Table 5 such a RetinaNet head has {ap} AP, and one that is evaluated as it is trained 39.1.",
            stacklevel=3,
        )
    elif train == choices.affine == "shared" and not levels:
        warnings.warn("domain_bn changes nothing: datasets that share everything are plain BatchNorm.", stacklevel=3)
