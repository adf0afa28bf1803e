"""At which noise level does a sample lie? A posterior over levels, told from energy (energy.py) or by a network.

All in the variance-preserving form u = alpha * x0 + sqrt(v) * eps; samples (B, C, H, W) or (B, C, T, H, W), judged each
by itself.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .levels import alpha_and_variance


def averaged_terms(levels: torch.Tensor) -> torch.Tensor:
    """What guidance needs the posterior means of, (B, 3, K) of levels (B, K): 1 / (1 + alpha), 1 / v and ln v.

    alpha / v is the second less the first.
    """
    alpha, v = alpha_and_variance(levels)
    return torch.stack([(1.0 + alpha).reciprocal(), v.reciprocal(), v.log()], dim=1)


class Posterior(NamedTuple):
    """p(level | u): `levels` (B, K) log-SNR and `gamma` (B, K), which sums to 1; `means` (B, 3) of the averaged_terms under
    it. All float32, on the sample's device.
    """

    levels: torch.Tensor
    gamma: torch.Tensor
    means: torch.Tensor

    @classmethod
    def of(cls, levels: torch.Tensor, gamma: torch.Tensor, terms: torch.Tensor | None = None) -> "Posterior":
        """terms: averaged_terms of the levels, (B or 1, 3, K), if they are at hand. All three (A, B, ...) for A posteriors a sample."""
        terms = averaged_terms(levels) if terms is None else terms
        return cls(levels, gamma, (gamma[..., None, :] * terms).sum(dim=-1))

    def precision_and_signal(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of 1 / v and of alpha / v under the posterior, each (B,)."""
        share, precision, _ = self.means.unbind(1)
        return precision, precision - share

    def log_variance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of ln v under the posterior, each (B,)."""
        mean = self.means[:, 2]
        away = F.softplus(self.levels) + mean[:, None]  # ln v = -softplus(log-SNR)
        return mean, (self.gamma * away.square()).sum(dim=1)

    def surplus(self, level: torch.Tensor) -> torch.Tensor:
        """How much noise too much at a step of this level, (B,) >= 0: ln(v of the sample / v of the step)."""
        mean, variance = self.log_variance()
        return beyond_chance(mean + F.softplus(level), variance)  # ln v = -softplus(log-SNR)

    def noisiest(self) -> "Posterior":
        """For each sample the noisiest of its posteriors, at most two: levels and gamma (A, B, K), means (A, B, 3)."""
        if len(self.means) == 1:
            return Posterior(*(only[0] for only in self))
        chosen = self.means[0, :, 2:] >= self.means[1, :, 2:]
        return Posterior(*(torch.where(chosen, *both) for both in self))

    def likeliest(self) -> torch.Tensor:
        """The level with the largest share, (B,)."""
        return self.levels.gather(1, self.gamma.argmax(dim=1, keepdim=True))[:, 0]


class Measured(NamedTuple):
    """Where samples were found to lie.

    posterior: p(level | u). surplus: how much noise too much, (B,) >= 0: the log-SNR of the step less that of the sample.
    kept: how much of its signal a sample still has, (B,), 1 or less.
    """

    posterior: Posterior
    surplus: torch.Tensor
    kept: torch.Tensor


def beyond_chance(gap: torch.Tensor, variance: torch.Tensor | float) -> torch.Tensor:
    """Gaps, shrunk where they are within chance of this variance; 0 for negative ones: a sample with too little noise counts
    as aligned. The factor gap^2 / (gap^2 + variance) is Wiener's: a gap as small as its own spread counts half.
    """
    gap = gap.clamp_min(0.0)
    squares = gap.square()
    return gap * squares / (squares + variance).clamp_min(1e-12)


def column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value a sample (B,), or (2, B), in a shape that multiplies `like` (B, ...)."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def inner(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of x * y over everything but the batch: (B,) of y (B, ...) and as large an x, (2, B) of two of them (2, B, ...).

    weight: (B, 1, ...), which positions count. No product of matrices, which autocast would make in half precision.
    """
    if weight is not None:
        x = x * weight
    return (x.flatten(x.ndim - y.ndim + 1) * y.flatten(1)).sum(dim=-1)


def inner_of_each(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Sums of x^2, (2, B), of two batches (2, B, ...)."""
    weighted = x if weight is None else x * weight
    return (weighted.flatten(2) * x.flatten(2)).sum(dim=-1)
