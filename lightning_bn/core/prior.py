"""Mixing statistics with a prior: few samples of a new population, and what was believed before they came."""

from __future__ import annotations

from torch import Tensor


def with_prior(source: Tensor, target: Tensor, prior_samples: int, samples: int) -> Tensor:
    r"""The mean, or the variance, of a target population of which only some samples were seen (Schneider et al., 2020).

    $$p = N / (N + n), \qquad \mu = p\,\mu_s + (1 - p)\,\mu_t, \qquad \sigma^2 = p\,\sigma_s^2 + (1 - p)\,\sigma_t^2,$$

    for means and for variances alike, as published. Pooling $N$ source and $n$ target samples would add
    $p (1 - p) (\mu_s - \mu_t)^2$ to the variance. That is the spread between the two populations, and a batch to be
    normalized comes from the target alone; in a trial of ours it made no difference or was worse
    (docs/callbacks/ada-bn.md).

    Args:
        source: The prior, ``(C,)``.
        target: What was measured, ``(C,)``.
        prior_samples: ``N``, how many samples the prior is worth.
        samples: ``n``, how many samples were measured.

    Example:
        >>> import torch
        >>> with_prior(torch.tensor([0.0]), torch.tensor([4.0]), prior_samples=3, samples=1)
        tensor([1.])
    """
    if not prior_samples:
        return target
    share = prior_samples / (prior_samples + samples)
    return share * source + (1 - share) * target
