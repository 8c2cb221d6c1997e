"""Ghost BN: normalize groups of the training batch separately (paper, App. A.5)."""

from __future__ import annotations

from typing import get_args

from torch import nn

from lightning_bn.core.checks import check_int
from lightning_bn.layers.behavior import Handle
from lightning_bn.layers.conflicts import check_conflicts
from lightning_bn.layers.find import Layers, changeable_layers
from lightning_bn.layers.ghost import Ghost, Grouping


def ghost_bn(
    model: nn.Module,
    *,
    size: int | None = None,
    splits: int | None = None,
    grouping: Grouping = "interleaved",
    layers: Layers = None,
) -> Handle:
    r"""Make BatchNorm layers normalize groups ("ghosts") of the training batch, each with its own statistics.

    With $g$ groups $B_0 \dots B_{g-1}$ of a batch, $y_i = \gamma (x_i - \mu_{B_k}) / \sigma_{B_k} + \beta$ for every
    sample $i \in B_k$: a normalization batch smaller than the batch of a device. Only the normalization of training
    changes. In eval mode, and in layers that are frozen, nothing does; the running statistics are updated once a
    forward, with the layer's momentum and the statistics of the *whole* batch, the variance between groups included;
    the layers keep their identity and their state dict; `precise_bn` normalizes its batches whole, since it wants the
    largest normalization batch there is (Table 2).

    When it helps: as a regulariser where the batch of a device holds more than about 128 samples (validation error
    with population statistics 23.7 % at normalization batches of 1024 and 512, 23.2 to 23.5 at 16 to 128; Fig. 5 and
    6); and against information that leaks through batches that are put together by a pattern (Sec. 6.1, Fig. 8). When
    it does not: groups of 8 and fewer cost accuracy (24.3 % at 8, 32.5 at 2). Evaluate with statistics of `precise_bn`
    where groups are small, since those of training's activations drift away from what evaluation sees.

    A batch of $N$ samples is divided into $\lceil N / size \rceil$ or ``splits`` groups whose sizes differ by one at
    most: 33 samples at ``size=32`` make groups of 17 and 16. A smaller batch is one group. There are fewer groups
    where one would hold a single value per channel, which has no variance: rows ``(N, C)`` come at least in pairs.

    Cost: for interleaved groups of one size in an NCHW input, none but about 0.14 ms a layer: one call of torch's
    kernel, on a view, normalizes all groups. Others have no such view: groups of different size, as in a ragged last
    batch, and ``channels_last`` are copied there and back, ``"contiguous"`` groups are normalized one after the other;
    forward and backward of the layer then take 2.4 to 2.6 and 1.1 to 1.3 times as long on a CPU
    (benchmarks/RESULTS.md). A compiled model is compiled again for every new size of a batch.

    Args:
        model: The model.
        size: Most samples in a group. 32 is the paper's normalization batch for ImageNet. Either this
        splits: or the number of groups.
        grouping: ``"interleaved"``: of $g$ groups, sample i belongs to group i mod g. ``"contiguous"``: groups are
            runs of samples. By default interleaved, because it separates what lies side by side in an ordered batch
            (c0, c0, c1, c1, ...), which is what leaks.
        layers: Glob patterns over qualified layer names; None takes every BatchNorm layer.

    Returns:
        A handle: ``undo()`` it, or use it as a context manager, to normalize whole batches again.

    Raises:
        ValueError: If not exactly one of ``size`` and ``splits`` is given or it is less than 1, ``grouping`` is
            neither of the two, a pattern matches nothing, or a chosen layer has ghosts already or is under `sync_bn`.
        TypeError: If a chosen layer is a `SyncBatchNorm`, or, in its first forward in training, if its class does not
            normalize by calling ``torch.nn.functional.batch_norm``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_bn import ghost_bn
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> x = torch.tensor([[0.0], [10.0], [2.0], [14.0]])
        >>> with ghost_bn(model, size=2):  # samples 0 and 2, samples 1 and 3
        ...     model(x).flatten()
        tensor([-1.0000, -1.0000,  1.0000,  1.0000], grad_fn=<...>)
        >>> model[0].running_mean  # 0.9 * 0 + 0.1 * 6.5
        tensor([0.6500])
    """
    require_ghosts(size, splits, grouping)
    chosen = changeable_layers(model, layers)
    check_conflicts(chosen, "ghost", model)
    return Handle(chosen.values(), Ghost(chosen, size, splits, grouping))


def require_ghosts(size: int | None, splits: int | None, grouping: str) -> None:
    """Raise for arguments of `ghost_bn` that do not say how to divide a batch.

    Raises:
        ValueError: Naming the argument.
    """
    if (size is None) == (splits is None):
        raise ValueError(f"Give either size= or splits=, not size={size!r} and splits={splits!r}.")
    for name, number in (("size", size), ("splits", splits)):
        if number is not None:
            check_int(name, number, at_least=1)
    if grouping not in get_args(Grouping):
        raise ValueError(f"grouping must be one of {', '.join(map(repr, get_args(Grouping)))} but is {grouping!r}.")
