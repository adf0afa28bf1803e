"""At which noise level does a sample lie? A posterior over levels, from a trained network or from residual energy.

All in the variance-preserving form u = alpha * x0 + sqrt(v) * eps; samples (B, C, H, W) or (B, C, T, H, W), judged each
by itself.
"""

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

    def log_variance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of ln v under the posterior, each (B,)."""
        values = torch.log(alpha_and_variance(self.levels)[1])
        mean = (self.gamma * values).sum(dim=1)
        spread = (self.gamma * (values - mean[:, None]).square()).sum(dim=1)
        return mean, spread.clamp_min(0).sqrt()

    def likeliest(self) -> torch.Tensor:
        """The level with the largest share, (B,)."""
        return self.levels.gather(1, self.gamma.argmax(dim=1, keepdim=True))[:, 0]


def column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value a sample (B,) in a shape that multiplies `like` (B, ...), and in its dtype."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def mean_square(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of x^2 over everything but the batch, (B,) float32; `weight` (B, 1, ...) says which positions count."""
    squares = x.float().square()
    if weight is None:
        return squares.flatten(1).mean(dim=1)
    weight = weight.float().expand(squares.shape).flatten(1)
    return (squares.flatten(1) * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)


def energy_posterior(
    u: torch.Tensor, anchor: torch.Tensor, weight: torch.Tensor | None = None, noisiest: float = LOG_SNR_RANGE[0]
) -> Posterior:
    """p(level | u) if u is alpha * anchor + noise: from the energy that remains when the anchor is taken away.

    With n dimensions, log p(u | level) = -n/2 (ln v + |u - alpha * anchor|^2 / (n v)) + const, every level equally
    likely before. Found on a coarse grid over all levels, kept on a fine one, as wide as four of its standard
    deviations, sqrt(2 / n) in ln v.

    Args:
        anchor: (B, ...), a clean estimate. weight: which positions count, as in mean_square.
        noisiest: the lowest log-SNR that a sample can have.
    """
    of_u, of_anchor = mean_square(u, weight), mean_square(anchor, weight)
    across = (mean_square(u + anchor, weight) - mean_square(u - anchor, weight)) / 4
    n = u[0].numel() * (1.0 if weight is None else float(weight.float().mean()))

    def log_likelihood(levels: torch.Tensor) -> torch.Tensor:
        alpha, v = alpha_and_variance(levels)
        energy = of_u[:, None] - 2 * alpha * across[:, None] + alpha.square() * of_anchor[:, None]
        return (-0.5 * n * (v.log() + energy.clamp_min(0.0) / v)).nan_to_num(-1e30)

    coarse = torch.linspace(noisiest, LOG_SNR_RANGE[1], COARSE, device=u.device).expand(len(u), -1)
    centre = coarse.gather(1, log_likelihood(coarse).argmax(dim=1, keepdim=True))
    spread = (2.0 / max(n, 1.0)) ** 0.5 / alpha_and_variance(centre)[0].square()
    half = torch.clamp(4.0 * spread, min=2.0 * (LOG_SNR_RANGE[1] - noisiest) / (COARSE - 1))
    levels = (centre + half * torch.linspace(-1.0, 1.0, NODES, device=u.device)).clamp(noisiest, LOG_SNR_RANGE[1])
    return Posterior(levels, log_likelihood(levels).softmax(dim=1))


def noisier_of(one: Posterior, other: Posterior) -> Posterior:
    """For each sample the posterior with the larger mean noise."""
    chosen = (one.log_variance()[0] >= other.log_variance()[0])[:, None]
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
        self.previous: torch.Tensor | None = None

    def before(self, u: torch.Tensor, level: torch.Tensor) -> Posterior | None:
        """The posterior known before the model is asked; None at the first step."""
        if self.previous is None or self.previous.shape != u.shape:
            return None
        return energy_posterior(u, self.previous, self.weight, self.noisiest)

    def after(self, u: torch.Tensor, level: torch.Tensor, denoised: torch.Tensor) -> Posterior:
        """The posterior with the model's estimate at this step, (B, ...), taken into account."""
        now, before = energy_posterior(u, denoised, self.weight, self.noisiest), self.before(u, level)
        return now if before is None else noisier_of(before, now)

    def keep(self, denoised: torch.Tensor) -> None:
        """The model's own estimate at this step, before any correction: it stands for the image at the next one."""
        self.previous = denoised


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
