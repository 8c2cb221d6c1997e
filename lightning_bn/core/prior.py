"""Mix the statistics of a few samples with a prior."""

from __future__ import annotations

from torch import Tensor


def with_prior(source: Tensor, target: Tensor, prior_samples: int, samples: int) -> Tensor:
    r"""Mix means, or variances, of a source and a target population (Schneider et al., 2020).

    $$p = N / (N + n), \qquad \mu = p\,\mu_s + (1 - p)\,\mu_t, \qquad \sigma^2 = p\,\sigma_s^2 + (1 - p)\,\sigma_t^2$$

    As published, without the term $p (1 - p) (\mu_s - \mu_t)^2$ of pooled samples: a batch comes from the target alone.
    In a trial the term made no difference or was worse (docs/callbacks/ada-bn.md).

    Args:
        source: The prior, ``(C,)``.
        target: What was measured, ``(C,)``.
        prior_samples: ``N``, the number of samples that the prior is worth.
        samples: ``n``, the number of measured samples.

    Example:
        >>> import torch
        >>> with_prior(torch.tensor([0.0]), torch.tensor([4.0]), prior_samples=3, samples=1)
        tensor([1.])
    """
    if not prior_samples:
        return target
    share = prior_samples / (prior_samples + samples)
    return share * source + (1 - share) * target
