"""At which noise level does a sample lie? A posterior over levels, told from energy (energy.py) or by a network.

All in the variance-preserving form u = alpha * x0 + sqrt(v) * eps; samples (B, C, H, W) or (B, C, T, H, W), judged each
by itself.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .levels import alpha_and_variance


def averaged_terms(levels: torch.Tensor) -> torch.Tensor:
    """What guidance needs the posterior means of, (B, 5, K) of levels (B, K): 1 / v, ln v, d, d^2 and alpha / v.

    d is ln v from the middle level's on: a variance taken from d and d^2 loses no digits.
    """
    alpha, v = alpha_and_variance(levels)
    return terms_of(alpha / v, v.reciprocal(), v.log())


def terms_of(signal: torch.Tensor, precision: torch.Tensor, log_v: torch.Tensor) -> torch.Tensor:
    """averaged_terms of levels whose alpha / v, 1 / v and ln v, each (B, K), are at hand."""
    d = log_v - log_v[:, log_v.shape[1] // 2, None]
    return torch.stack([precision, log_v, d, d.square(), signal], dim=1)


@dataclass(frozen=True)
class Posterior:
    """p(level | u): `levels` (B, K) log-SNR and `gamma` (B, K), which sums to 1; `means` (B, 5) of the averaged_terms under
    it. All float32, on the sample's device.
    """

    levels: torch.Tensor
    gamma: torch.Tensor
    means: torch.Tensor

    @classmethod
    def of(cls, levels: torch.Tensor, gamma: torch.Tensor, terms: torch.Tensor | None = None) -> "Posterior":
        """terms: averaged_terms of the levels, (B or 1, 5, K), if they are at hand."""
        terms = averaged_terms(levels) if terms is None else terms
        return cls(levels, gamma, (gamma[:, None] * terms).sum(dim=2))

    def log_variance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of ln v under the posterior, each (B,)."""
        _, mean, d, d_squared, _ = self.means.unbind(1)
        return mean, torch.addcmul(d_squared, d, d, value=-1).clamp_min(0)

    def surplus(self, level: torch.Tensor) -> torch.Tensor:
        """How much noise too much at a step of this level, (B,) >= 0: ln(v of the sample / v of the step)."""
        mean, variance = self.log_variance()
        return beyond_chance(mean + F.softplus(level), variance)  # ln v = -softplus(log-SNR)

    def noisier_half(self) -> "Posterior":
        """For each sample the noisier one of two posteriors, those of all samples (2 B, ...) one after the other."""
        means = self.means.unflatten(0, (2, -1))
        chosen = (means[0, :, 1] >= means[1, :, 1])[:, None]
        return Posterior(*(torch.where(chosen, *both.chunk(2)) for both in (self.levels, self.gamma, self.means)))

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
    """One value a sample (B,) in a shape that multiplies `like` (B, ...), and in its dtype."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def mean_product(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None, dims: int = 0) -> torch.Tensor:
    """Mean of x * y over everything but the batch, (B,) float32; `weight` (B, 1, ...) says which positions count.

    dims: of one batch (B, ...), where x has more: of (2, B, ...) there are the means (2, B).
    """
    products = x.float() * y.float()
    first = 1 + (products.ndim - dims if dims else 0)
    if weight is None:
        return products.flatten(first).mean(dim=first)
    weight = weight.float().expand(products.shape).flatten(first)
    return (products.flatten(first) * weight).sum(dim=first) / weight.sum(dim=first).clamp_min(1.0)


def mean_square(x: torch.Tensor, weight: torch.Tensor | None = None, dims: int = 0) -> torch.Tensor:
    """Mean of x^2, as in mean_product."""
    return mean_product(x, x, weight, dims)
