"""At which noise level does a sample lie? A posterior over levels, from a trained network or from residual energy.

All in the variance-preserving form u = alpha * x0 + sqrt(v) * eps; samples (B, C, H, W) or (B, C, T, H, W), judged each
by itself.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .levels import LOG_SNR_RANGE, alpha_and_variance

COARSE, NODES = 256, 65
"""Levels among which the likeliest is looked for, and levels around it at which an energy's posterior is kept."""


@dataclass(frozen=True)
class Posterior:
    """p(level | u): `levels` (B, K) log-SNR and `gamma` (B, K), which sums to 1. Both float32, on the sample's device."""

    levels: torch.Tensor
    gamma: torch.Tensor

    @functools.cached_property
    def coefficients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and v of the levels, each (B, K)."""
        return alpha_and_variance(self.levels)

    @functools.cached_property
    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of ln v under the posterior, each (B,)."""
        values = self.coefficients[1].log()
        mean = (self.gamma * values).sum(dim=1)
        spread = (self.gamma * (values - mean[:, None]).square()).sum(dim=1)
        return mean, spread.clamp_min(0).sqrt()

    def log_variance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `moments`."""
        return self.moments

    def likeliest(self) -> torch.Tensor:
        """The level with the largest share, (B,)."""
        return self.levels.gather(1, self.gamma.argmax(dim=1, keepdim=True))[:, 0]


def column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value a sample (B,) in a shape that multiplies `like` (B, ...), and in its dtype."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def mean_product(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of x * y over everything but the batch, (B,) float32; `weight` (B, 1, ...) says which positions count."""
    products = x.float() * y.float()
    if weight is None:
        return products.flatten(1).mean(dim=1)
    weight = weight.float().expand(products.shape).flatten(1)
    return (products.flatten(1) * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)


def mean_square(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of x^2, as in mean_product."""
    return mean_product(x, x, weight)


class EnergyGrid:
    """The levels among which an energy's posterior is looked for: the coarse ones and what they need, made once.

    The expressions below are written for few operations, each of which is a launch on a GPU at every step of a run.

    Args:
        noisiest: the lowest log-SNR that a sample can have.
        dimensions: n, how many values of a sample count.
    """

    def __init__(self, noisiest: float, dimensions: float, device: torch.device):
        self.noisiest, self.dimensions = noisiest, dimensions
        self.coarse = torch.linspace(noisiest, LOG_SNR_RANGE[1], COARSE, device=device)[None]
        self.of_coarse = self._terms(*alpha_and_variance(self.coarse))
        self.around = torch.linspace(-1.0, 1.0, NODES, device=device)[None]
        self.least_half = 2.0 * (LOG_SNR_RANGE[1] - noisiest) / (COARSE - 1)
        self.spread = 4.0 * (2.0 / max(dimensions, 1.0)) ** 0.5

    @staticmethod
    def _terms(alpha: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return -2.0 * alpha, alpha.square(), v.reciprocal(), v.log()

    def _log_likelihood(self, terms: tuple[torch.Tensor, ...], of_u, across, of_anchor) -> torch.Tensor:
        minus_two_alpha, alpha_squared, precision, log_v = terms
        energy = torch.addcmul(torch.addcmul(of_u, minus_two_alpha, across), alpha_squared, of_anchor).clamp_min(0.0)
        return (torch.addcmul(log_v, energy, precision) * (-0.5 * self.dimensions)).nan_to_num(-1e30)

    def posterior(self, of_u: torch.Tensor, across: torch.Tensor, of_anchor: torch.Tensor) -> Posterior:
        """p(level | u) from the mean squares of u and of the anchor and from the mean of their product, each (B,).

        log p(u | level) = -n/2 (ln v + |u - alpha * anchor|^2 / (n v)) + const, every level equally likely before. Found
        on the coarse grid over all levels, kept on a fine one, as wide as four of its standard deviations, sqrt(2 / n) in
        ln v.
        """
        means = of_u[:, None], across[:, None], of_anchor[:, None]
        chosen = self._log_likelihood(self.of_coarse, *means).argmax(dim=1)
        centre = self.coarse[0][chosen][:, None]
        half = (self.spread / torch.sigmoid(centre)).clamp_min(self.least_half)
        levels = torch.addcmul(centre, half, self.around).clamp(self.noisiest, LOG_SNR_RANGE[1])
        terms = self._terms(*alpha_and_variance(levels))
        return Posterior(levels, self._log_likelihood(terms, *means).softmax(dim=1))


def energy_posterior(
    u: torch.Tensor, anchor: torch.Tensor, weight: torch.Tensor | None = None, noisiest: float = LOG_SNR_RANGE[0]
) -> Posterior:
    """p(level | u) if u is alpha * anchor + noise: from the energy that remains when the anchor is taken away.

    Args:
        anchor: (B, ...), a clean estimate. weight: which positions count, as in mean_square.
        noisiest: the lowest log-SNR that a sample can have.
    """
    share = 1.0 if weight is None else float(weight.float().mean())
    grid = EnergyGrid(noisiest, u[0].numel() * share, u.device)
    return grid.posterior(mean_square(u, weight), mean_product(u, anchor, weight), mean_square(anchor, weight))


def noisier_of(one: Posterior, other: Posterior) -> Posterior:
    """For each sample the posterior with the larger mean noise."""
    chosen = (one.moments[0] >= other.moments[0])[:, None]
    return Posterior(torch.where(chosen, one.levels, other.levels), torch.where(chosen, one.gamma, other.gamma))


class EnergyEstimator:
    """The training-free estimate: the noise that a sample has is what remains when its clean image is taken away.

    Two clean estimates can stand for that image. The model's own at this step: right while the noise hides details, but
    late in a run a network takes surplus noise for detail. And the one of the step before: a sampler makes each sample
    from it, so whatever was added on the way shows, at any noise level; it asks nothing of the model and is known
    before the model is asked. The larger of both counts.

    Args:
        weight: which positions count, as in mean_square.
        noisiest: the lowest log-SNR of the model's schedule. Nothing has more noise than pure noise: chance in it, at the
            first step of a run, is no surplus.
    """

    def __init__(self, weight: torch.Tensor | None = None, noisiest: float = LOG_SNR_RANGE[0]):
        self.weight, self.noisiest = weight, noisiest
        self.share = 1.0 if weight is None else float(weight.float().mean())
        self.grid: EnergyGrid | None = None
        self.previous: torch.Tensor | None = None
        self._squares: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._before: tuple[torch.Tensor, Posterior] | None = None

    def _square(self, x: torch.Tensor) -> torch.Tensor:
        """mean_square of u and of estimates, each taken once while it is used."""
        for known, value in self._squares:
            if known is x:
                return value
        self._squares.append((x, mean_square(x, self.weight)))
        return self._squares[-1][1]

    def _posterior(self, u: torch.Tensor, anchor: torch.Tensor) -> Posterior:
        dimensions = u[0].numel() * self.share
        if self.grid is None or self.grid.dimensions != dimensions:
            self.grid = EnergyGrid(self.noisiest, dimensions, u.device)
        return self.grid.posterior(self._square(u), mean_product(u, anchor, self.weight), self._square(anchor))

    def before(self, u: torch.Tensor, level: torch.Tensor) -> Posterior | None:
        """The posterior known before the model is asked; None at the first step."""
        if self.previous is None or self.previous.shape != u.shape:
            return None
        if self._before is None or self._before[0] is not u:
            self._before = (u, self._posterior(u, self.previous))
        return self._before[1]

    def after(self, u: torch.Tensor, level: torch.Tensor, denoised: torch.Tensor) -> Posterior:
        """The posterior with the model's estimate at this step, (B, ...), taken into account."""
        now, before = self._posterior(u, denoised), self.before(u, level)
        return now if before is None else noisier_of(before, now)

    def keep(self, denoised: torch.Tensor) -> None:
        """The model's own estimate at this step, before any correction: it stands for the image at the next one."""
        self.previous, self._before = denoised, None
        self._squares = [known for known in self._squares if known[0] is denoised]


class NetworkEstimator:
    """The estimate of a trained predictor.

    Args:
        judge: u (B, ...) -> logits (B, K).
        levels: (K,) log-SNR of the classes.
    """

    def __init__(self, judge: Callable[[torch.Tensor], torch.Tensor], levels: torch.Tensor):
        self.judge = judge
        self.levels = levels
        self._known: tuple[torch.Tensor, Posterior] | None = None

    def before(self, u: torch.Tensor, level: torch.Tensor) -> Posterior:
        gamma = self.judge(u).float().nan_to_num().softmax(dim=1)
        posterior = Posterior(self.levels.to(u.device).expand(len(u), -1), gamma)
        self._known = (u, posterior)
        return posterior

    def after(self, u: torch.Tensor, level: torch.Tensor, denoised: torch.Tensor) -> Posterior:
        if self._known is not None and self._known[0] is u:
            return self._known[1]
        return self.before(u, level)

    def keep(self, denoised: torch.Tensor) -> None:
        self._known = None
