"""Domain-specific BN: what domains have in common, and what each has for itself (paper, Sec. 5.2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.core.checks import check_int
from lightning_bn.core.ranks import get_rank
from lightning_bn.functional.domain.datasets import Datasets, Domain, SplitByDomain
from lightning_bn.functional.domain.levels import Levels
from lightning_bn.functional.domain.specific import (
    AFFINE,
    STATISTICS,
    Choice,
    DomainSpecific,
    Where,
    give_domains,
)
from lightning_bn.layers.behavior import Behavior, Handle, attach, behaviors_of, detach
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers, as_patterns, chosen, storing_layers


class DomainHandle(Handle):
    """The way back from domain-specific BN, which is also told which dataset the model is shown.

    Attributes:
        layers: Qualified name -> layer with domains.
    """

    def __init__(
        self, layers: dict[str, _BatchNorm], undo: list[Callable[[], None]], datasets: Datasets | None
    ) -> None:
        self._undo = undo
        self.layers = layers
        self._datasets = datasets

    def use_domain(self, domain: Domain) -> AbstractContextManager[None]:
        """Say, for a while, which domain the model is shown.

        Args:
            domain: That of the batch; or of each of its samples, ``(N,)``.

        Raises:
            ValueError: If there is no such domain, or if the domains are feature levels, which need nobody to say so.
            TypeError: If it is no whole number, nor a tensor of some.
        """
        return self._require_datasets().use_domain(domain)

    def show(self, domain: Domain | None) -> None:
        """Set the current domain; `use_domain` overrides it inside its block."""
        datasets = self._require_datasets()
        datasets.current = None if domain is None else datasets.checked(domain)

    def _require_datasets(self) -> Datasets:
        if self._datasets is None:
            raise ValueError("These domains are feature levels: the number of a call says which one it is.")
        return self._datasets

    def expect_copies(self) -> None:
        """Say nothing of deep copies: whoever makes them looks after what each domain has (`WeightAveraging` does)."""
        for layer in self.layers.values():
            for behavior in behaviors_of(layer):
                behavior.not_copied = ""

    def state(self, affine: bool = False) -> dict[str, dict[str, Tensor]]:
        """What layers keep of each domain, copied to the CPU: layer name -> name -> ``(domains, C)``.

        Args:
            affine: Also parameters, which the model's own state dict holds while the layers have domains.
        """
        return state_of(self.layers, affine)

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Give the layers back what `state` has found in them.

        Raises:
            ValueError: If it is of other layers, or of another number of domains.
        """
        take_state(self.layers, state)


def state_of(layers: dict[str, _BatchNorm], affine: bool = False) -> dict[str, dict[str, Tensor]]:
    """What layers keep of each domain, copied to the CPU."""
    keys = (*STATISTICS, *(AFFINE if affine else ()))
    found = {}
    for name, layer in layers.items():
        own = {**layer._buffers, **layer._parameters}
        found[name] = {k: v.detach().cpu().clone() for k in keys if (v := own.get(k)) is not None}
    return {name: own for name, own in found.items() if own}


def take_state(layers: dict[str, _BatchNorm], state: dict[str, dict[str, Tensor]]) -> None:
    """Give layers back what `state_of` has found in them; those that evaluate all domains alike need no statistics.

    Raises:
        ValueError: If it is of other layers, or of another number of domains.
    """
    for name, layer in layers.items():
        own = {**layer._buffers, **layer._parameters}
        saved = state.get(name, {})
        if any(own.get(key) is not None and key not in saved for key in STATISTICS):
            raise ValueError(
                f"There are no saved statistics of domains of layer {name!r}: were its layers= others, or population= "
                "and affine=?"
            )
        for key, value in saved.items():
            stored = own.get(key)
            if stored is None and key in STATISTICS:
                continue  # population_statistics="shared": all domains together are in the layer's own running statistics
            if stored is None or stored.shape != value.shape:
                there = "none" if stored is None else f"{len(stored)} domains"
                raise ValueError(
                    f"{key} of layer {name!r} was saved for {len(value)} domains, and there are {there} now: pass the "
                    "num_domains=, population_statistics= and affine= of the fit that saved it."
                )
            with torch.no_grad():
                stored.copy_(value)


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
    r"""Say what BatchNorm layers that see several domains share among them, and what each domain has for itself.

    A domain is a level of a feature pyramid that a head is run on, or a dataset. Three choices, as in Table 5: whether
    training normalizes all domains together (``train_statistics``), whether evaluation does (``population_statistics``), and whether they have
    one weight and bias. With $\mu_d, \sigma_d^2$ the statistics of domain $d$ in the batch and $n_d$ its values, the
    shared ones are $\mu = \sum_d \frac{n_d}{n} \mu_d$ and $\sigma^2 = \sum_d \frac{n_d}{n} (\sigma_d^2 + (\mu_d -
    \mu)^2)$.

    RetinaNet on COCO, BatchNorm in a head that all five levels share (box AP, Table 5):

    | ``train_statistics`` | ``population_statistics`` | ``affine`` | AP |
    |---|---|---|---|
    | shared | shared | shared | 39.1 |
    | shared | domain | shared | 2.1 |
    | domain | domain | shared | 39.1 |
    | domain | shared | shared | 34.1 |
    | domain | shared | domain | 35.5 |
    | domain | domain | domain | 39.2 |

    When it helps: a head that is run on several levels, or a model trained on several datasets whose inputs differ. The
    straightforward code is the fourth row: each call normalizes by itself, and all of them move one EMA. ``train_statistics`` and
    ``population_statistics`` should be the same; where they are not, this warns. When it does not: with one domain.

    *Feature levels*: ``owner`` names the modules whose forward runs a tower once for each level, such as torchvision's
    ``"head.*_head"``, unmodified. A layer's level is the number of its call in a forward of its owner.
    ``train_statistics="shared"`` normalizes all levels together as one flattened and concatenated tensor: given its first level,
    the tower is run on all of them in lockstep, and the owner's later calls are answered from that. *Datasets*: without
    ``level_modules``, say which one the model is shown by ``handle.use_domain(domain)``; ``train_statistics="shared"`` then normalizes
    each batch as it is.

    Statistics of domains are buffers that no state dict holds (``handle.state()`` does). The layer's own running
    statistics stay those of all domains together. The affine of domains are new parameters, ``domain_weight`` and
    ``domain_bias``: make the optimizer, and wrap the model, afterwards; the layer's own ones get no gradient meanwhile.
    A deep copy is a plain model, which evaluates all domains alike, and warns: ``domain_bn`` on it takes over what each
    domain has in the original.

    Cost: levels apart, one kernel each as without; together, a copy of the input there and back: forward and backward
    of a RetinaNet head of 64 channels took 1.02 and 1.14 times as long on a CPU. Samples of several domains in a batch
    are copied there and back as well. `precise_bn` measures each domain.

    Args:
        model: The model.
        num_domains: How many there are.
        train_statistics: What training normalizes with.
        population_statistics: What evaluation normalizes with.
        affine: Whether each domain has a weight and a bias.
        level_modules: Glob patterns over the qualified names of modules; None for datasets.
        layers: Glob patterns over qualified layer names; None takes those within owners, or every BatchNorm layer.

    Returns:
        A handle: ``undo()`` it, or use it as a context manager, to have plain layers again. What they kept for each
        domain is then gone.

    Raises:
        ValueError: For a choice that is none, a pattern that matches nothing, a layer outside of every owner, owners
            within each other, layers without running statistics, or that `ghost_bn`, `sync_bn`,
            `mini_batch_inference`, `adapt_bn` or another ``domain_bn`` acts on, or layers
            without an affine for domains to have their own. In a forward: for samples of several domains of which
            one has a single value per channel, if ``train_statistics="domain"``.
        TypeError: For a SyncBatchNorm. In a forward: for a tower input that is no element of its owner's input.
        RuntimeError: In a forward: if the number of levels is another, or nobody has said which domain it is.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_bn import domain_bn
        >>> model = nn.Sequential(nn.BatchNorm1d(1, momentum=None))
        >>> handle = domain_bn(model, num_domains=2, train_statistics="domain", population_statistics="domain", affine="shared")
        >>> for domain, x in enumerate(([[0.0], [2.0]], [[10.0], [14.0]])):
        ...     with handle.use_domain(domain):
        ...         model(torch.tensor(x)).flatten()
        tensor([-1.0000,  1.0000], grad_fn=<...>)
        tensor([-1.0000,  1.0000], grad_fn=<...>)
        >>> handle.state()["0"]["domain_mean"].flatten()
        tensor([ 1., 12.])
    """
    require_choices(num_domains, train_statistics, population_statistics, affine, level_modules)
    found = storing_layers(model, layers)
    owners = find_owners(model, level_modules)
    if owners:
        of_owner = {name: {m for m in module.modules() if m is not module} for name, module in owners.items()}
        outside = [n for n, m in found.items() if not any(m in within for within in of_owner.values())]
        if outside and layers is not None:
            raise ValueError(
                f"Layer {outside[0]!r} is in none of the owners {', '.join(owners)}: leave it out by layers=, or name "
                "its owner, too."
            )
        found = {name: layer for name, layer in found.items() if name not in outside}
        if not found:
            raise ValueError(f"There is no BatchNorm layer within {', '.join(owners)}.")
    check_conflicts(found, "domain", model)
    for name, layer in found.items():
        if affine == "domain" and not layer.affine:
            raise ValueError(f"Layer {name!r} has no weight and bias (affine=False), so domains cannot have their own.")
    if get_rank() == 0 and train_statistics != population_statistics:
        warnings.warn(inconsistent(train_statistics, population_statistics, affine), stacklevel=2)
    if get_rank() == 0 and not owners and train_statistics == population_statistics == affine == "shared":
        warnings.warn("domain_bn changes nothing: datasets that share everything are plain BatchNorm.", stacklevel=2)
    undo: list[Callable[[], None]] = []
    names = {layer: name for name, layer in found.items()}
    datasets = None if owners else Datasets(num_domains)
    wheres: list[tuple[Where, dict[_BatchNorm, str]]] = []
    if datasets is not None:
        wheres.append((datasets, names))
    for name, module in owners.items():
        within = {layer: n for layer, n in names.items() if layer in of_owner[name]}
        wheres.append((Levels(name, module, within, num_domains, train_statistics), within))
    handle = DomainHandle(found, undo, datasets)
    try:
        for where, within in wheres:
            specific = DomainSpecific(within, num_domains, population_statistics, affine, where)
            for layer in within:
                undo.append(give_domains(layer, num_domains, population_statistics, affine))
                undo.append(_given(layer, specific))
            if isinstance(where, Levels):
                where.start(undo)
            elif isinstance(where, Datasets):
                for layer in within:
                    undo.append(_given(layer, SplitByDomain(names, where, specific, train_statistics)))
    except BaseException:  # nobody has the handle
        handle.undo()
        raise
    return handle


def _given(layer: _BatchNorm, behavior: Behavior) -> Callable[[], None]:
    attach(layer, behavior)
    return lambda: detach(layer, behavior)


def inconsistent(train_statistics: Choice, population_statistics: Choice, affine: Choice) -> str:
    """What to say of training and evaluation that normalize differently."""
    worse = "2.1" if train_statistics == "shared" else "34.1" if affine == "shared" else "35.5"
    return (
        f"train_statistics={train_statistics!r} and population_statistics={population_statistics!r} are inconsistent: layers are evaluated with statistics of another "
        f"kind than they are trained with. In the paper's Table 5 such a RetinaNet head has {worse} AP, and a "
        "consistent one 39.1."
    )


def require_choices(
    num_domains: int,
    train_statistics: Choice,
    population_statistics: Choice,
    affine: Choice,
    level_modules: str | Sequence[str] | None,
) -> None:
    """Refuse arguments of `domain_bn` that are none.

    Raises:
        ValueError: Naming the argument.
        TypeError: Likewise.
    """
    check_int("num_domains", num_domains, at_least=2)
    for name, choice in (
        ("train_statistics", train_statistics),
        ("population_statistics", population_statistics),
        ("affine", affine),
    ):
        if choice not in get_args(Choice):
            raise ValueError(f"{name} must be 'shared' or 'domain' but is {choice!r}.")
    if level_modules is not None:
        as_patterns(level_modules, "level_modules")


def find_owners(model: nn.Module, level_modules: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules that ``level_modules`` names, none of them within another; none for None.

    Raises:
        ValueError: If a pattern matches nothing, or one owner is within another.
    """
    if level_modules is None:
        return {}
    modules = {name: module for name, module in model.named_modules() if name}
    names = chosen(
        modules, as_patterns(level_modules, "level_modules"), "level_modules", f"module of {type(model).__name__}"
    )
    for outer in names:
        inner = [name for name in names if name.startswith(f"{outer}.")]
        if inner:
            raise ValueError(
                f"level_modules={level_modules!r} matches {outer!r} and, within it, {inner[0]!r}: name the one whose forward runs a "
                "tower once for each level."
            )
    return {name: modules[name] for name in names}
