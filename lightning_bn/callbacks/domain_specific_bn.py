"""Domain-specific BN in fits and evaluations (paper, Sec. 5.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_bn.callbacks.base import BatchNormCallback
from lightning_bn.core.batch_sizes import call_on_batch
from lightning_bn.functional.domain.bn import DomainHandle, check_choices, domain_bn
from lightning_bn.functional.domain.tensors import AFFINE, Choice, State, get_state, load_state
from lightning_bn.layers.find import Layers, as_patterns, find_bn
from lightning_bn.trainer.compat import averaged_model, train_loaders, weight_averagers
from lightning_bn.trainer.passes import check_sharding


class DomainSpecificBNCallback(BatchNormCallback):
    """Choose which statistics domains share, and which each domain has for itself (Sec. 5.2). See `domain_bn`.

    A domain is a level of a feature pyramid (``level_modules``) or a dataset (``domain_fn``). Checkpoints have the
    plain model's keys. The callback's state has the statistics of domains: evaluate with it and ``ckpt_path=``.

    It helps a head shared by feature levels, and a model trained on datasets whose inputs differ.
    It does not help with one domain, or with a domain that has few training samples.
    Cost: copies of inputs and outputs, if domains share a batch or its statistics.

    Args:
        num_domains: Number of domains.
        level_modules: Glob patterns over qualified names of the modules whose forward runs a tower once for each level,
            such as ``"*.head.*_head"`` for torchvision's RetinaNet; None for datasets.
        domain_fn: Function from a batch to its dataset, or to a tensor ``(N,)`` with that of each sample. None takes
            the index of the dataloader, which is always 0 in training.
        train_statistics: ``"shared"`` or ``"domain"``: statistics that training normalizes with.
        population_statistics: Statistics that evaluation normalizes with. Inconsistent choices cost accuracy, and warn.
        affine: ``"domain"`` gives each domain a weight and a bias, created before the optimizers.
        layers: Glob patterns over qualified layer names; None for those in the level modules, or every BatchNorm layer.

    Raises:
        ValueError: At the start: for what `domain_bn` refuses, a setup that loses or lacks statistics of domains, or
            several train dataloaders without ``domain_fn``.
        TypeError: For SyncBatchNorm layers, or a ``domain_fn`` that returns None.
        RuntimeError: For another number of levels in a forward, or a strategy that shards the model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bn import DomainSpecificBNCallback
        >>> callback = DomainSpecificBNCallback(5, level_modules="*.head.*_head")
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    kind = "domain"

    def __init__(
        self,
        num_domains: int,
        *,
        level_modules: str | Sequence[str] | None = None,
        domain_fn: Callable[[Any], Any] | None = None,  # not int | Tensor: jsonargparse refuses unannotated functions
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
        self._trained = False  # until then the tensors of domains are copies of the layers' own
        self._checked: set[int] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # domains must exist before the model is copied or wrapped, and before its optimizers are created
        self._undo()
        self._checked = set()
        check_sharding(trainer)
        self._check_overlap(trainer, pl_module)
        self._averagers = weight_averagers(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and any(callbacks.index(a) < callbacks.index(self) for a in self._averagers):
            raise ValueError(
                f"DomainSpecificBNCallback must come before {type(self._averagers[0]).__name__} in "
                "Trainer(callbacks=...): otherwise the average is of a model without domains."
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
        if stage != "fit":  # a fit starts from the plain model, or from a checkpoint that is restored after this hook
            self._load(self._state)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._check_replaced(pl_module)
        weights_only = any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks)
        if self.population_statistics == "domain" and weights_only:
            raise ValueError(
                "ModelCheckpoint(save_weights_only=True) would lose the statistics of domains, which are in the state "
                "of DomainSpecificBNCallback: pass save_weights_only=False."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.level_modules is not None or self.domain_fn is not None:
            return
        loaders = train_loaders(trainer)
        if loaders is not None and len(loaders.flattened) > 1:
            raise ValueError(
                f"There are {len(loaders.flattened)} train dataloaders, and Lightning does not report the one that a "
                "batch is from: store the domain in each sample, and pass domain_fn=."
            )
        rank_zero_warn(
            "DomainSpecificBNCallback takes all training batches to be of domain 0, the index of the only train "
            "dataloader: pass domain_fn= for datasets, or level_modules= for feature levels."
        )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_replaced(pl_module)
        if trainer.state.fn != "fit" and self.population_statistics == "domain" and not self._state:
            raise ValueError(
                "DomainSpecificBNCallback has no statistics of domains to evaluate with: fit with this callback first, "
                "or pass ckpt_path=, a checkpoint of such a fit."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._trained |= trainer.training
        if self._handle is not None and self.level_modules is None:
            domain = self._domain(batch, dataloader_idx)
            self._handle.set_domain(domain)
            if self.population_statistics == "domain" and (trainer.state.fn != "fit" or trainer.validating):
                self._check_trained(trainer, domain)

    def on_train_batch_end(self, *_: Any) -> None:
        if self._handle is not None and self.level_modules is None:
            self._handle.set_domain(None)

    on_validation_start = on_predict_start = on_test_start
    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_train_batch_end  # type: ignore[assignment]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._handle is None and self._state:  # after a fit, the module no longer has the affine of domains
            for name, tensors in self._state["statistics"].items():
                checkpoint["state_dict"] |= {f"{name}.{key}": tensors[key] for key in AFFINE if key in tensors}

    def teardown(self, *_: Any, **__: Any) -> None:
        self._undo()

    on_exception = teardown

    def state_dict(self) -> dict[str, Any]:
        return self._export() if self._handle is not None else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        missing = [key for key in ("statistics", "averaged") if key not in state_dict]
        if state_dict and missing:
            raise ValueError(f"The state of DomainSpecificBNCallback is incomplete: it has no {missing[0]!r}.")
        self._load(state_dict)
        self._state = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None, "_averagers": [], "_trained": False, "_state": self.state_dict()}

    @contextmanager
    def use_domain_of(self, batch: Any, dataloader_idx: int = 0) -> Iterator[None]:
        """Set the domain in a ``with`` block, to run the model on a batch outside Lightning's loops."""
        if self._handle is None or self.level_modules is not None:
            yield
        else:
            with self._handle.use_domain(self._domain(batch, dataloader_idx)):
                yield

    def _domain(self, batch: Any, dataloader_idx: int) -> int | Tensor:
        if self.domain_fn is None:
            return dataloader_idx
        domain: int | Tensor | None = call_on_batch("domain_fn", self.domain_fn, batch)
        if domain is None:
            raise TypeError("domain_fn(batch) is None: return an int, or a tensor (N,) with one int per sample.")
        return domain

    def _check_trained(self, trainer: Trainer, domain: int | Tensor) -> None:
        assert self._handle is not None
        new = set(torch.as_tensor(domain).flatten().tolist()) - self._checked
        self._checked |= new
        for d in sorted(new):
            untrained = [n for n, layer in self._handle.layers.items() if not layer.get_buffer("domain_batches")[d]]
            if untrained:
                message = (
                    f"Domain {d} is evaluated, but layer {untrained[0]!r} was never trained on it, so its statistics "
                    "are the initial ones. If it is one of the domains that were trained on, change domain_fn=."
                )
                if trainer.state.fn != "fit":
                    raise ValueError(message)
                rank_zero_warn(message)  # the domain may be trained on later

    def _check_replaced(self, module: LightningModule) -> None:
        present = set(find_bn(module).values())
        for name, layer in self._handle.layers.items() if self._handle is not None else ():
            if layer not in present:
                raise TypeError(
                    f"Layer {name!r} was replaced after setup, without its domains: create layers in __init__, not in "
                    "configure_model, and pass Trainer(sync_batchnorm=False)."
                )

    def _averaged_layers(self) -> list[dict[str, Any]]:
        assert self._handle is not None
        models: list[nn.Module] = [m.module for m in map(averaged_model, self._averagers) if m is not None]
        return [{name: model.get_submodule(name) for name in self._handle.layers} for model in models]

    def _export(self, affine: bool = False) -> dict[str, Any]:
        if self._handle is None or (self.population_statistics == self.affine == "shared"):
            return {}
        averaged = [get_state(layers, affine) for layers in self._averaged_layers()]
        return {"statistics": self._handle.state(affine), "averaged": averaged}

    def _load(self, state: dict[str, Any]) -> None:
        if self._handle is None or not state:
            return
        averaged, saved = self._averaged_layers(), state["averaged"]
        # a checkpoint has the averaged weights as the module's: without averaging now, it needs their statistics
        own: State = state["statistics"] if averaged or not saved else saved[0]
        self._handle.load(own)
        for layers, statistics in zip(averaged, saved or [own] * len(averaged), strict=False):
            load_state(layers, statistics)
        self._trained = True

    def _undo(self) -> None:
        if self._handle is not None:
            if self._trained:  # otherwise the state of an earlier fit stays
                self._state = self._export(affine=True) or self._state
            self._handle.undo()
            self._handle, self._trained = None, False
