"""Domain-specific BN: what domains share, and what each has for itself, wherever the model runs (paper, Sec. 5.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_bn.callbacks.base import BatchNormCallback
from lightning_bn.functional.domain.bn import DomainHandle, check_choices, domain_bn
from lightning_bn.functional.domain.tensors import AFFINE, Choice, get_state, load_state
from lightning_bn.layers.find import Layers, as_patterns, find_bn
from lightning_bn.trainer.averaging import averagers
from lightning_bn.trainer.passes import check_sharding


class DomainSpecificBNCallback(BatchNormCallback):
    """Say what layers that see several domains share among them, and what each domain has for itself (Sec. 5.2).

    A domain is a level of a feature pyramid that a head is run on (``owner``), or a dataset (``domain_fn``, or the
    index of the dataloader). Layers have their domains in fits and in evaluations, for as long as they last; between
    them the model is a plain one, and the callback keeps what belongs to domains. See `domain_bn`, which this is.

    When it helps: a head that all levels share (RetinaNet on COCO: box AP 34.1 for the straightforward code, 39.1 as
    soon as training and evaluation agree; Table 5), a model trained on datasets whose inputs differ. When it does
    not: with one domain. Inconsistent choices (``train_statistics`` and ``population_statistics`` differ) cost up to 37 points, and warn.

    Checkpoints: the module's keys are the plain model's (but for ``affine="domain"``, which adds ``domain_weight`` and
    ``domain_bias``), and its running statistics those of all domains together, in one EMA. The statistics of domains
    are in the callback's own state: evaluate with this callback and ``ckpt_path=``.

    Cost: on a CPU, forward and backward of a RetinaNet head of 64 channels took 1.02 times as long with
    ``train_statistics="domain"``, and 1.14 times with ``train_statistics="shared"``, which copies each layer's input there and back. Samples of
    several domains in a batch are copied as well.

    Args:
        num_domains: How many there are.
        level_modules: Glob patterns over qualified names of the modules whose forward runs a tower once for each level, such as
            ``"*.head.*_head"`` for torchvision's RetinaNet and FCOS; None if domains are datasets.
        domain_fn: ``domain_fn(batch)`` says which dataset a batch is from, or, as a tensor ``(N,)``, each of its
            samples. None takes the index of the dataloader, which in training is always 0.
        train_statistics: ``"shared"``: training normalizes domains together; ``"domain"``: each by itself.
        population: ``"shared"`` or ``"domain"``: the same for evaluation.
        affine: ``"domain"`` gives each domain a weight and a bias: new parameters, there before optimizers are made.
        layers: Glob patterns over qualified layer names; None for those within owners, or every BatchNorm layer.

    Raises:
        ValueError: At the start: for what `domain_bn` refuses; a ModelCheckpoint that saves weights only, which would
            lose the statistics of domains; several train dataloaders without ``domain_fn``; weight averaging listed
            before this callback; an evaluation of domains of which no statistics are known (in a fit, a warning).
        TypeError: For SyncBatchNorm layers; for a ``domain_fn`` that returns None.
        RuntimeError: In a forward, if the number of levels is not ``domains``; for a strategy that shards the model;
            for a ``domain_fn`` that raises StopIteration.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import DomainSpecificBNCallback
        >>> callback = DomainSpecificBNCallback(num_domains=5, level_modules="*.head.*_head")
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)

        As YAML for LightningCLI:

        ```yaml
        trainer:
          callbacks:
            - class_path: lightning_bn.DomainSpecificBNCallback
              init_args: {domains: 5, owner: "*.head.*_head", sgd: shared, population: shared}
        ```
    """

    kind = "domain"

    def __init__(
        self,
        num_domains: int,
        level_modules: str | Sequence[str] | None = None,
        domain_fn: Callable[[Any], Any] | None = None,  # of int | Tensor, jsonargparse refuses unannotated ones
        train_statistics: Choice = "domain",
        population_statistics: Choice = "domain",
        affine: Choice = "shared",
        layers: Layers = None,
    ) -> None:
        check_choices(num_domains, train_statistics, population_statistics, affine, level_modules)
        as_patterns(layers)
        if domain_fn is not None and not callable(domain_fn):
            raise TypeError(f"domain_fn must be a function from a batch to its domain but is {domain_fn!r}.")
        if level_modules is not None and domain_fn is not None:
            raise ValueError("Domains are feature levels (level_modules=) or datasets (domain_fn=): pass one of them.")
        self.num_domains = num_domains
        self.level_modules = level_modules
        self.domain_fn = domain_fn
        self.train_statistics: Choice = train_statistics
        self.population_statistics: Choice = population_statistics
        self.affine: Choice = affine
        self.layers = layers
        self._handle: DomainHandle | None = None
        self._averagers: list[Any] = []
        self._state: dict[str, Any] = {}
        self._begun = False  # whether the layers' domains are more than what they started as
        self._validated: set[int] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin, before anybody copies the model, makes optimizers of its parameters, or wraps it."""
        self._take_back()
        self._validated = set()
        check_sharding(trainer)
        self._check_overlap(trainer, pl_module)
        self._averagers = averagers(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and any(callbacks.index(a) < callbacks.index(self) for a in self._averagers):
            raise ValueError(
                f"DomainSpecificBNCallback stands behind {type(self._averagers[0]).__name__} in "
                "Trainer(callbacks=...), which would average a model without domains: swap them."
            )
        self._handle = domain_bn(
            pl_module,
            num_domains=self.num_domains,
            train_statistics=self.train_statistics,
            population_statistics=self.population_statistics,
            affine=self.affine,
            level_modules=self.level_modules,
            layers=self.layers,
        )
        if self._averagers:
            self._handle.allow_copies()
        if stage != "fit":  # which starts anew, or from a checkpoint that is restored after this
            self._restore(self._state)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what would lose statistics."""
        super().on_fit_start(trainer, pl_module)
        self._check_replaced(pl_module)
        if self.population_statistics == "domain" and any(
            getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks
        ):
            raise ValueError(
                "A ModelCheckpoint has save_weights_only=True, and so would lose the statistics of domains, which are "
                "in the callback's state: save whole checkpoints."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse training data whose domain cannot be known."""
        if self.level_modules is not None or self.domain_fn is not None:
            return
        loaders = trainer.fit_loop._combined_loader
        if loaders is not None and len(loaders.flattened) > 1:
            raise ValueError(
                f"There are {len(loaders.flattened)} train dataloaders, and Lightning does not say which of them a "
                "batch is from: have the datasets say it in each sample, and pass domain_fn=."
            )
        rank_zero_warn(
            "DomainSpecificBNCallback takes all training batches to be of domain 0, the index of the one train "
            "dataloader: pass domain_fn= to tell samples apart, or level_modules= for feature levels."
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Say which domain the model is shown."""
        self._show(trainer, batch, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Clear the current domain."""
        self._begun = True
        self._show_nothing()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an evaluation with statistics of an unknown domain."""
        self._check_replaced(pl_module)
        if trainer.state.fn != "fit" and self.population_statistics == "domain" and not self._state:
            raise ValueError(
                "DomainSpecificBNCallback knows no statistics of domains to evaluate with: fit with this callback "
                "before, or pass ckpt_path=, a checkpoint of such a fit."
            )

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Say which domain the model is shown."""
        self._show(trainer, batch, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Clear the current domain."""
        self._show_nothing()

    on_validation_start = on_predict_start = on_test_start
    on_validation_batch_start = on_predict_batch_start = on_test_batch_start
    on_validation_batch_end = on_predict_batch_end = on_test_batch_end

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Between fits the affine of domains is not in the module; it is put where it is otherwise."""
        if self._handle is None and self._state:
            for name, own in self._state["statistics"].items():
                checkpoint["state_dict"].update({f"{name}.{key}": own[key] for key in AFFINE if key in own})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Plain layers again."""
        self._take_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plain layers again."""
        self._take_back()

    def state_dict(self) -> dict[str, Any]:
        """The statistics of domains: the module's, and those of averaged weights, where there are any."""
        return self._exported() if self._handle is not None else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back.

        Raises:
            ValueError: If they are none, or those of a fit with other choices; those there were stay.
        """
        missing = [key for key in ("statistics", "averaged") if key not in state_dict]
        if state_dict and missing:
            raise ValueError(
                f"This is no state of DomainSpecificBNCallback, or only a part of one: it has no {missing[0]!r}."
            )
        self._restore(state_dict)
        self._state = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has what belongs to domains, and no hold on layers."""
        return {**vars(self), "_handle": None, "_averagers": [], "_begun": False, "_state": self.state_dict()}

    @contextmanager
    def showing_batch(self, batch: Any, dataloader_idx: int = 0) -> Iterator[None]:
        """Say, for a while, which domain the model is shown: the batch's."""
        if self._handle is None or self.level_modules is not None:
            yield
        else:
            with self._handle.use_domain(self._domain(batch, dataloader_idx)):
                yield

    def _domain(self, batch: Any, dataloader_idx: int) -> int | Tensor:
        if self.domain_fn is None:
            return dataloader_idx
        try:
            domain: int | Tensor | None = self.domain_fn(batch)
        except StopIteration as error:  # would end Lightning's epoch without a word
            raise RuntimeError("domain_fn raised StopIteration.") from error
        if domain is None:
            raise TypeError(
                "domain_fn(batch) is None: it must return the batch's domain, a whole number, or a tensor (N,) of one "
                "for each sample."
            )
        return domain

    def _show(self, trainer: Trainer, batch: Any, dataloader_idx: int) -> None:
        if self._handle is None or self.level_modules is not None:
            return
        domain = self._domain(batch, dataloader_idx)
        self._handle.set_domain(domain)
        if trainer.state.fn != "fit" and self.population_statistics == "domain":
            self._check_untrained(torch.as_tensor(domain))
        elif trainer.validating and self.population_statistics == "domain":
            self._warn_of_untrained(torch.as_tensor(domain))

    def _show_nothing(self) -> None:
        if self._handle is not None and self.level_modules is None:
            self._handle.set_domain(None)

    def _check_untrained(self, domain: Tensor) -> None:
        for name, own in self._state["statistics"].items():
            untrained = [int(d) for d in domain.flatten().unique() if not own["domain_batches"][int(d)]]
            if untrained:
                raise ValueError(
                    f"Domain {untrained[0]} is evaluated, and layer {name!r} was never trained on it: there are no "
                    "population statistics of it."
                )

    def _warn_of_untrained(self, domain: Tensor) -> None:
        """In a fit a domain may come later; what is logged of it before is worth nothing."""
        assert self._handle is not None
        new = set(domain.flatten().tolist()) - self._validated
        self._validated |= new
        for d in sorted(new):
            untrained = [n for n, m in self._handle.layers.items() if not m.get_buffer("domain_batches")[d]]
            if untrained:
                rank_zero_warn(
                    f"Domain {d} is validated, and layer {untrained[0]!r} was never trained on it: it is normalized "
                    "with the statistics that it started with. If its samples are of a domain that is trained on, say "
                    "so by domain_fn=."
                )

    def _check_replaced(self, module: LightningModule) -> None:
        there = set(find_bn(module).values())
        for name, layer in self._handle.layers.items() if self._handle is not None else ():
            if layer not in there:
                raise TypeError(
                    f"Layer {name!r} was replaced after setup, and its domains with it: by configure_model (make "
                    "layers in __init__) or Trainer(sync_batchnorm=True), whose SyncBatchNorm cannot have domains."
                )

    def _exported(self, affine: bool = False) -> dict[str, Any]:
        if self._handle is None or (self.population_statistics == self.affine == "shared"):
            return {}
        averaged = [a._average_model.module for a in self._averagers if a._average_model is not None]
        return {
            "statistics": self._handle.state(affine),
            "averaged": [get_state({n: m.get_submodule(n) for n in self._handle.layers}, affine) for m in averaged],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Averaged statistics go with averaged weights, which are the module's where nothing is averaged now."""
        if self._handle is None or not state:
            return
        averaged = [a._average_model.module for a in self._averagers if a._average_model is not None]
        saved = state["averaged"]
        own = state["statistics"] if averaged or not saved else saved[0]
        load_state(self._handle.layers, own)
        for module, its in zip(averaged, saved or [own] * len(averaged), strict=False):
            load_state({n: module.get_submodule(n) for n in self._handle.layers}, its)
        self._begun = True

    def _take_back(self) -> None:
        """Plain layers; what is kept is what was there before, unless something has begun."""
        if self._handle is not None:
            if self._begun:
                self._state = self._exported(affine=True) or self._state
            self._handle.undo()
            self._handle, self._begun = None, False
